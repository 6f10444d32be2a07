# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.regions import boxes_overlap
from lib.selectors.greedy import best_boxes

ONE = (1, 1, 1)


def plain_best(grid, size, stride, taken, limit):
    """Sort every position, then test overlaps one by one."""
    found, blocked = [], list(taken)
    for flat in np.argsort(-grid, axis=None, kind="stable"):
        position = np.unravel_index(flat, grid.shape)
        start = tuple(int(i) * s for i, s in zip(position, stride, strict=True))
        if len(found) < limit and not any(boxes_overlap((start, size), b) for b in blocked):
            found.append((start, float(grid[position])))
            blocked.append((start, size))
    return found


def test_published_selection(reference: Path) -> None:
    golden = np.load(reference / "nnactive/selection.npz")
    size = tuple(int(v) for v in golden["patch_size"])
    taken = [
        (tuple(map(int, c)), tuple(map(int, s))) for c, s in zip(golden["ann_coords"], golden["ann_size"], strict=True)
    ]
    for name, limit in (("top5", 5), ("all", None)):
        found = best_boxes(golden["agg"], size, ONE, taken, limit)
        np.testing.assert_array_equal([start for start, _ in found], golden[f"{name}_coords"])
        np.testing.assert_array_equal([score for _, score in found], golden[f"{name}_score"])


def test_published_overlap_pairs(reference: Path) -> None:
    golden = np.load(reference / "nnactive/overlaps.npz")
    for row in golden["rows"]:
        a, b = (
            (tuple(map(int, row[0:3])), tuple(map(int, row[3:6]))),
            (tuple(map(int, row[6:9])), tuple(map(int, row[9:12]))),
        )
        assert boxes_overlap(a, b) == bool(row[12])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32),
    st.tuples(*[st.integers(1, 8)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.integers(0, 6),
    st.integers(1, 30),
    st.booleans(),
)
def test_same_picks_as_the_plain_way(seed, grid_shape, size, stride, n_taken, limit, tied) -> None:
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, 4, grid_shape).astype(np.float32) if tied else rng.random(grid_shape)
    taken = [
        (tuple(int(v) for v in rng.integers(0, 12, 3)), tuple(int(v) for v in rng.integers(1, 5, 3)))
        for _ in range(n_taken)
    ]
    found = best_boxes(grid, size, stride, taken, limit)
    assert found == plain_best(grid, size, stride, taken, limit)
    boxes = [(start, size) for start, _ in found]
    assert not any(boxes_overlap(a, b) for i, a in enumerate(boxes) for b in [*boxes[:i], *taken])


def test_ties_go_to_the_lowest_flat_index() -> None:
    found = best_boxes(np.ones((4, 1, 4)), (2, 1, 2), ONE)
    assert [start for start, _ in found] == [(0, 0, 0), (0, 0, 2), (2, 0, 0), (2, 0, 2)]


def test_not_a_number_is_never_chosen_and_minus_infinity_last() -> None:
    grid = np.array([np.nan, -np.inf, 3.0, np.nan, np.inf]).reshape(5, 1, 1)
    found = best_boxes(grid, ONE)
    assert found == [((4, 0, 0), np.inf), ((2, 0, 0), 3.0), ((1, 0, 0), -np.inf)]
    assert best_boxes(np.full((2, 2, 2), np.nan), ONE) == []
    assert best_boxes(np.zeros((0, 1, 1)), ONE) == []


def test_touching_boxes_are_allowed() -> None:
    assert best_boxes(np.ones((1, 1, 1)), (3, 3, 3), ONE, [((3, 0, 0), (2, 2, 2))]) == [((0, 0, 0), 1.0)]
    assert best_boxes(np.ones((1, 1, 1)), (3, 3, 3), ONE, [((2, 2, 2), (1, 1, 1))]) == []


def test_the_floor_ends_the_search_and_the_grid_is_left_alone() -> None:
    grid = np.array([3.0, 1.0, 2.0]).reshape(3, 1, 1)
    assert best_boxes(grid, ONE, floor=2.0) == [((0, 0, 0), 3.0)]
    np.testing.assert_array_equal(grid.ravel(), [3, 1, 2])


def test_saturated_background_is_never_first() -> None:
    """Logits 20 and 40 leave positions at exactly zero; published code ranks their NaN first."""
    from lib.selectors.noise import power
    from lib.uncertainty import Moments
    from lib.units import box_mean

    rng = np.random.default_rng(0)
    for logit in (20.0, 40.0):
        logits = np.zeros((5, 2, 24, 24, 24))
        logits[:, 0] = logit
        logits[:, :, 4:10, 4:10, 4:10] = rng.normal(0, 1, (5, 2, 6, 6, 6))
        e = np.exp(logits - logits.max(1, keepdims=True))
        moments = Moments.from_members((e / e.sum(1, keepdims=True)).astype(np.float32))
        for scores in (moments.mutual_information(), moments.predictive_entropy()):
            grid = box_mean(scores, (6, 6, 6))
            noisy = power(grid, 1.0, rng)
            assert not np.isnan(noisy).any()
            first, utility = best_boxes(power(grid, 20.0, rng), (6, 6, 6), limit=1)[0]
            assert np.isfinite(utility)
            assert boxes_overlap((first, (6, 6, 6)), ((4, 4, 4), (6, 6, 6)))
            everything = best_boxes(noisy, (6, 6, 6))
            assert len(everything) > 8  # zero scores can still be chosen, last
            assert [u for _, u in everything] == sorted((u for _, u in everything), reverse=True)
