# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What a fuzzing run counts: cases and outcomes by surface, and an example of each failure that can be repeated."""

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

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

MOST_FAILURES = 20
MOST_MIB = 300.0


@dataclass
class Tally:
    """One surface: cases, how they ended, seconds, memory of whoever was asked, and what should not have been."""

    surface: str
    cases: int = 0
    seconds: float = 0.0
    memory_mib: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def fail(self, kind: str, example: Any, detail: str) -> None:
        """Counts a failure; the first of each kind are kept with what repeats them."""
        self.failed += 1
        self.outcomes[kind] += 1
        known = [failure for failure in self.failures if failure["kind"] == kind and failure["detail"] == detail]
        if not known and len(self.failures) < MOST_FAILURES:
            self.failures.append({"kind": kind, "detail": detail, "example": example})

    def check_memory(self) -> None:
        """A surface that made somebody grow by more than is left to chance has failed."""
        if self.memory_mib > MOST_MIB:
            self.fail("memory", None, f"grew by {self.memory_mib:.0f} MiB, at most {MOST_MIB:.0f} are expected")

    def to_json(self) -> dict[str, Any]:
        """What is written of it."""
        return {
            "surface": self.surface,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "memory_mib": round(self.memory_mib, 1),
            "outcomes": dict(sorted(self.outcomes.items())),
            "failed": self.failed,
            "failures": self.failures,
        }


def drive(tally: Tally, cases: SearchStrategy[Any], wanted: int, number: int, one: Callable[[Any], None]) -> None:
    """Runs `one` on `wanted` drawn cases; the same `number` draws the same cases.

    Nothing is raised or shrunk: `one` notes what it finds, so that a failure early on hides none behind it.
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
    """Libraries say nothing about what they find odd in a file: here all of them are."""
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
