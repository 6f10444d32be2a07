# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Timing of two implementations of the same task: interleaved, medians, one thread, CPU seconds."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks import Row

Work = Callable[[], object]


def ratio(name: str, ours: Work, reference: Work, bar: float, repeats: int = 5, reference_repeats: int = 3) -> Row:
    """Row that compares CPU seconds of `ours` and `reference`, run in turns; `bar` is the least ratio wanted."""
    times: tuple[list[float], list[float]] = ([], [])
    with one_thread():
        for turn in range(max(repeats, reference_repeats)):
            for work, found, wanted in ((ours, times[0], repeats), (reference, times[1], reference_repeats)):
                if turn < wanted:
                    began = time.process_time()
                    work()
                    found.append(time.process_time() - began)
    mine, plain = (statistics.median(t) for t in times)
    return row(name, mine, plain, bar)


def limit(name: str, ours: Work, seconds: float, repeats: int = 5) -> Row:
    """Row for a piece of work that must end within `seconds`; the ratio is seconds allowed to seconds taken."""
    taken = []
    with one_thread():
        for _ in range(repeats):
            began = time.perf_counter()
            ours()
            taken.append(time.perf_counter() - began)
    return row(name, statistics.median(taken), seconds, 1.0)


def memory(name: str, ours: Work, reference: Work, bar: float) -> Row:
    """Row that compares extra peak memory in MiB, each measured in a process of its own."""
    return {**row(name, _extra_peak(ours), _extra_peak(reference), bar), "unit": "MiB"}


def row(name: str, ours: float, reference: float, bar: float) -> Row:
    """One row of results."""
    return {
        "name": name,
        "ours_s": round(ours, 5),
        "reference_s": round(reference, 5),
        "ratio": round(reference / ours, 2),
        "bar": bar,
        "unit": "s",
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on a single thread while inside; numpy's loops have one anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _extra_peak(work: Work) -> float:
    fork = multiprocessing.get_context("fork")  # the inputs are there already and cost the child nothing
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=_measure, args=(work, there))
    child.start()
    found = float(here.recv())
    child.join()
    return found


def _measure(work: Work, pipe: Any) -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = work()
    pipe.send((_status("VmHWM") - before) / 1024)
    del result


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
