# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Counts of a fuzzing run: cases and outcomes per surface, and a repeatable example of each failure."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

MOST_FAILURES = 20
MOST_MIB = 300.0
# Permitted growth in the second half of many cases: imports and caches of the first use are complete by then.
MOST_LATER_MIB = 50.0
MANY = 1000


@dataclass
class Tally:
    """One surface: cases, their outcomes, seconds, memory of the process under test, and failures.

    `grown_mib` is the memory of the process under test above `rest_mib`, after each case.
    """

    surface: str
    cases: int = 0
    seconds: float = 0.0
    rest_mib: float = 0.0
    grown_mib: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def fail(self, kind: str, example: Any, detail: str) -> None:
        """Count a failure; the first ones of each kind are kept with the input that repeats them."""
        self.failed += 1
        self.outcomes[kind] += 1
        known = [failure for failure in self.failures if failure["kind"] == kind and failure["detail"] == detail]
        if not known and len(self.failures) < MOST_FAILURES:
            self.failures.append({"kind": kind, "detail": detail, "example": example})

    def check_memory(self) -> None:
        """Record a failure if the process under test grew by more than chance allows, or kept growing."""
        grown = max(self.grown_mib, default=0.0)
        if grown > MOST_MIB:
            self.fail("memory", None, f"grew by {grown:.0f} MiB, at most {MOST_MIB:.0f} are expected")
        later = grown - max(self.grown_mib[: len(self.grown_mib) // 2], default=grown)
        if len(self.grown_mib) >= MANY and later > MOST_LATER_MIB:
            told = f"the second half of the cases added {later:.0f} MiB, at most {MOST_LATER_MIB:.0f} are expected"
            self.fail("memory that goes on growing", None, told)

    def _tenths(self) -> list[NDArray[np.float64]]:
        return [part for part in np.array_split(np.array(self.grown_mib, dtype=float), 10) if len(part)]

    def to_json(self) -> dict[str, Any]:
        """Return the entry of this surface in the report."""
        return {
            "surface": self.surface,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "memory_mib": round(max(self.grown_mib, default=0.0), 1),
            "memory_of_tenths_mib": [round(float(part.max()), 1) for part in self._tenths()],
            "outcomes": dict(sorted(self.outcomes.items())),
            "failed": self.failed,
            "failures": self.failures,
        }


def drive(tally: Tally, cases: SearchStrategy[Any], wanted: int, number: int, one: Callable[[Any], None]) -> None:
    """Run `one` on `wanted` drawn cases; the same `number` draws the same cases.

    Nothing is raised or shrunk: `one` records its findings, so that an early failure does not hide later ones.
    """
    began, until = time.perf_counter(), tally.cases + wanted
    turn = 0
    while tally.cases < until and turn < 50:

        @seed(number * 1000 + turn)
        @settings(
            max_examples=until - tally.cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def ask(case: Any) -> None:
            if tally.cases < until:
                one(case)
                tally.cases += 1  # not one that hypothesis gives up half drawn

        with quiet():
            ask()
        turn += 1
    tally.seconds += time.perf_counter() - began


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings about odd files: here all files are odd."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def where(error: BaseException) -> str:
    """The error and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:200]} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"


def resident_mib(process: psutil.Process) -> float:
    """Memory of a process."""
    return float(process.memory_info().rss) / 2**20
