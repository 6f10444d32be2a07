# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Parts of the slow tests, one of which runs on every push."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.conftest import other_parts

SLOW = [SimpleNamespace(nodeid=f"tests/test_a.py::test_{number}") for number in range(10)]


def test_parts_are_disjoint_complete_and_even() -> None:
    parts = [[item for item in SLOW if item not in other_parts(SLOW, f"{k}/4")] for k in range(4)]
    assert sorted(item.nodeid for part in parts for item in part) == sorted(item.nodeid for item in SLOW)
    assert sorted(map(len, parts)) == [2, 2, 3, 3]
    assert other_parts(SLOW[::-1], "1/4") == other_parts(SLOW, "1/4")


def test_groups_reach_the_workers(request: pytest.FixtureRequest) -> None:
    """Without the group in its id, every test would be sent to any worker, and servers would start on each."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@test_conftest.py")


@pytest.mark.parametrize("part", ["4/4", "1", "a/4", "-1/4", "0/0"])
def test_a_part_that_is_none_is_refused(part: str) -> None:
    with pytest.raises(pytest.UsageError, match="expected K/N"):
        other_parts(SLOW, part)
