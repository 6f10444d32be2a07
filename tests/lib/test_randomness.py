# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lib.randomness import child_rng


def test_children_depend_on_seed_and_keys_only() -> None:
    first = child_rng(1, 2, "noise", "case").random(3)
    np.testing.assert_array_equal(first, child_rng(1, 2, "noise", "case").random(3))
    for other in (child_rng(2, 2, "noise", "case"), child_rng(1, 3, "noise", "case"), child_rng(1, 2, "noise", "cas")):
        assert not np.array_equal(first, other.random(3))
    with pytest.raises(ValueError, match="seed must be zero or a positive whole number"):
        child_rng(-1)


def test_another_process_draws_the_same() -> None:
    code = "from lib.randomness import child_rng; print(child_rng(7, 'a', 1).integers(10**9))"
    path = "import sys; sys.path.insert(0, 'apps/activelearning');"
    out = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == child_rng(7, "a", 1).integers(10**9)
