# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Counts of random cases."""

from __future__ import annotations

import pytest
from hypothesis import assume
from hypothesis import strategies as st

from eval.fuzzing.tally import MANY, MOST_LATER_MIB, MOST_MIB, Tally, drive


def test_a_case_counts_once_it_has_ended():
    tally, ended = Tally("numbers"), []

    def one(number: int) -> None:
        assume(number % 2)
        ended.append(number)

    drive(tally, st.integers(0, 9), 60, 3, one)
    assert tally.cases == len(ended) == 60
    assert {number % 2 for number in ended} == {1}


def test_the_same_number_draws_the_same_cases():
    drawn: list[list[int]] = [[], [], []]
    for numbers, number in zip(drawn, (4, 4, 5), strict=True):
        drive(Tally("numbers"), st.integers(), 20, number, numbers.append)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("grown", "failed"), [(MOST_MIB, 0), (MOST_MIB + 1, 1)])
def test_growth_by_more_than_is_left_to_chance_fails(grown: float, failed: int):
    tally = Tally("memory", grown_mib=[0.0, grown, 0.0, 0.0])
    tally.check_memory()
    assert (tally.failed, tally.outcomes["memory"]) == (failed, failed)


@pytest.mark.parametrize(
    ("cases", "later", "failed"),
    [(MANY, MOST_LATER_MIB, 0), (MANY, MOST_LATER_MIB + 1, 1), (MANY - 2, MOST_LATER_MIB + 1, 0)],
)
def test_growth_that_goes_on_in_the_second_half_of_many_cases_fails(cases: int, later: float, failed: int):
    half = cases // 2
    tally = Tally("leak", grown_mib=[*[0.0] * (half - 1), 200.0, 200.0 + later, *[0.0] * (half - 1)])
    tally.check_memory()
    assert (tally.failed, tally.outcomes["memory that goes on growing"]) == (failed, failed)


def test_growth_is_written_by_tenths_of_the_cases():
    tally = Tally("tenths", grown_mib=[float(k) for k in range(20)])
    assert tally.to_json()["memory_of_tenths_mib"] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0, 19.0]
    assert tally.to_json()["memory_mib"] == 19.0
    assert Tally("nothing").to_json()["memory_of_tenths_mib"] == []


def test_failures_alike_are_counted_but_shown_once():
    tally = Tally("alike")
    for detail in ("a", "a", "b"):
        tally.fail("server error", {}, detail)
    assert tally.failed == 3
    assert [failure["detail"] for failure in tally.failures] == ["a", "b"]
