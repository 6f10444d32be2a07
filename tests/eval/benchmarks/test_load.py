# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The load benchmark's own arithmetic; the measurement itself is `python -m eval bench load`."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

import numpy as np
import pytest

from eval.benchmarks import load
from eval.benchmarks.load import Samples


def test_growth_compares_the_last_tenth_with_the_second():
    samples = Samples([(float(second), 1000 + second, 20, 3) for second in range(101)])
    assert samples.growth(lambda taken: np.median(taken[:, 1])) == (1095, 1014.5)
    assert samples.growth(lambda taken: np.min(taken[:, 2] - taken[:, 3])) == (17, 17)


def test_a_file_that_stays_open_is_seen(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load, "_SAMPLE_SECONDS", 0.02)
    samples, over = Samples(), threading.Event()
    watch = threading.Thread(target=samples.watch, args=(os.getpid(), over))
    watch.start()
    with ExitStack() as held:
        held.callback(watch.join)
        held.callback(over.set)
        for name in (None, "plain", load._LEDGER):
            before = len(samples.taken)
            if name is not None:
                held.enter_context(open(tmp_path / name, "w"))
            while len(samples.taken) < before + 3:
                over.wait(0.01)
    first, last = samples.taken[0], samples.taken[-1]
    assert last[2] - first[2] == 2
    assert last[3] - first[3] == 1
