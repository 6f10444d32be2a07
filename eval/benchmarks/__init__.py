# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Benchmarks by name; each gives rows `{name, ours_s, reference_s, ratio, bar, unit}` and is imported when called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from eval.app_path import add_app

Row = dict[str, Any]


def _lazily(module: str) -> Callable[[], Iterator[Row]]:
    def run() -> Iterator[Row]:
        add_app()
        yield from importlib.import_module(module).run()

    return run


BENCHMARKS: dict[str, Callable[[], Iterator[Row]]] = {
    "query": _lazily("eval.benchmarks.query"),
    "surfaces": _lazily("eval.benchmarks.surfaces"),
    "training": _lazily("eval.benchmarks.training"),
    "equal": _lazily("eval.benchmarks.equal"),
    "nnunet": _lazily("eval.benchmarks.nnunet"),
    "scoring": _lazily("eval.benchmarks.scoring"),
    "rounds": _lazily("eval.benchmarks.rounds"),
    "latency": _lazily("eval.benchmarks.latency"),
    "load": _lazily("eval.benchmarks.load"),
    "large": _lazily("eval.benchmarks.large"),
}
