# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Benchmarks by name; each gives rows `{name, ours_s, reference_s, ratio, bar, unit}` and is imported when called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_APP = Path(__file__).resolve().parents[2] / "apps" / "activelearning"


def _lazily(module: str) -> Callable[[], list[Row]]:
    def run() -> list[Row]:
        if str(_APP) not in sys.path:
            sys.path.insert(0, str(_APP))
        rows: list[Row] = importlib.import_module(module).run()
        return rows

    return run


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "query": _lazily("eval.benchmarks.query"),
    "training": _lazily("eval.benchmarks.training"),
}
