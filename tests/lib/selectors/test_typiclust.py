# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest

from lib.selectors import typiclust as module
from lib.selectors.typiclust import typiclust


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def most_typical(rows: np.ndarray, neighbours: int) -> int:
    """Row with the smallest mean distance to its nearest ones, itself left out; the definition, one row at a time."""
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    distances = np.sort(np.linalg.norm(standard[:, None] - standard[None], axis=2), axis=1)
    return int(distances[:, 1 : neighbours + 1].mean(axis=1).argmin())


def test_clusters_are_visited_by_size_and_again_once_each_had_its_turn() -> None:
    # Two places, so two clusters for any requested number: three rows here, two there.
    places = np.array([[5.0], [0.0], [0.0], [5.0], [0.0]])
    assert typiclust(places, None, 5, rng()).tolist() == [1, 0, 2, 3, 4]


def test_a_cluster_without_labelled_rows_comes_before_a_larger_one() -> None:
    places = np.array([[5.0], [0.0], [0.0], [5.0], [0.0]])
    # One labelled row at 0: 5 has none, then both have one and the larger is next.
    assert typiclust(places, np.array([[0.0]]), 4, rng()).tolist() == [0, 1, 3, 2]
    # Three of them: both rows at 5 are taken before.
    assert typiclust(places, np.zeros((3, 1)), 4, rng()).tolist() == [0, 3, 1, 2]


def test_no_labelled_rows_are_none() -> None:
    rows = rng().normal(size=(30, 3))
    assert typiclust(rows, np.empty((0, 3)), 4, rng()).tolist() == typiclust(rows, None, 4, rng()).tolist()


@pytest.mark.parametrize("neighbours", [1, 3, 7])
def test_typical_is_who_has_its_neighbours_close(neighbours) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 2))
    assert len({most_typical(rows, n) for n in (1, 3, 7)}) == 3
    assert typiclust(rows, None, 1, rng(), neighbours).tolist() == [most_typical(rows, neighbours)]


def test_twenty_neighbours_count_unless_told_otherwise() -> None:
    rows = np.random.default_rng(9).normal(size=(60, 2))
    assert most_typical(rows, 20) not in (most_typical(rows, 19), most_typical(rows, 21))
    assert typiclust(rows, None, 1, rng()).tolist() == [most_typical(rows, 20)]


def test_a_small_cluster_counts_all_of_its_rows() -> None:
    # The middle of three, and of four the one that is nearest to all others.
    assert typiclust(np.array([[0.0], [1.0], [3.0]]), None, 1, rng()).tolist() == [1]
    assert typiclust(np.array([[9.0], [0.0], [1.0], [3.0]]), None, 1, rng()).tolist() == [2]


def test_features_count_alike_whatever_their_scale() -> None:
    # Two groups a thousandth apart, noise a million times larger, and a constant column.
    groups = np.repeat([0.0, 0.001], 20)
    rows = np.stack([groups, groups, 1000 * rng().uniform(-1, 1, 40), np.full(40, 7.0)], axis=1)
    for group, noise in [(0, -900.0), (0, 900.0), (1, -900.0), (1, 900.0)]:
        labelled = np.array([[group / 1000, group / 1000, noise, 7.0]])
        assert [i // 20 for i in typiclust(rows, labelled, 1, rng())] == [1 - group]


def test_more_rows_than_there_are_are_all() -> None:
    assert sorted(typiclust(rng().normal(size=(4, 2)), None, 9, rng()).tolist()) == [0, 1, 2, 3]


def test_clusters_are_as_many_as_labelled_rows_and_asked_ones_together() -> None:
    # Four groups, one row of two of them labelled: the two others are chosen.
    rows = np.repeat([0.0, 10.0, 20.0, 30.0], [9, 8, 4, 3])[:, None] + np.random.default_rng(5).normal(0, 0.1, (24, 1))
    chosen = typiclust(rows, np.array([[0.0], [10.0]]), 2, rng())
    assert [17 <= i < 21 for i in chosen] == [True, False]
    assert [21 <= i < 24 for i in chosen] == [False, True]


def test_there_is_a_largest_number_of_clusters(monkeypatch) -> None:
    assert module.MAX_CLUSTERS == 500
    monkeypatch.setattr(module, "MAX_CLUSTERS", 1)
    rows = np.array([[0.0], [1.0], [3.0], [100.0]])
    # One cluster: by typicality alone, though the last row stands apart.
    assert typiclust(rows, None, 2, rng(), 1).tolist() == [0, 1]
