# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The latency benchmark's own arithmetic; the measurement itself is `python -m eval bench latency`."""

from __future__ import annotations

import time

import numpy as np
import pytest

from eval.benchmarks.latency import BARS, Annotators, Times
from eval.runner.server import free_port


def test_rows_tell_the_95th_percentile_against_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Times()
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    for milliseconds in range(1, 101):
        times.note("save", 1.0 - milliseconds / 1000)
    times.note("download", 0.0)
    (row,) = times.rows(" here")
    assert row["name"] == "save here: p95"
    assert row["ours_s"] == pytest.approx(np.percentile(np.arange(1, 101), 95) / 1000, abs=1e-5)
    assert (row["reference_s"], row["p50_s"], row["requests"]) == (BARS["save"], 0.0505, 100)
    assert row["ratio"] == round(BARS["save"] / row["ours_s"], 2)


def test_a_poll_that_fails_ends_the_measurement() -> None:
    with Annotators(f"http://127.0.0.1:{free_port()}", {}, Times(), "random") as people:
        people._watch.join(30)
        with pytest.raises(RuntimeError, match="/info: "):
            people.check()
