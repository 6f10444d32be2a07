# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Selectors at their edges: nothing to choose, wrong arrays, draws rounded up, and choices from few remaining units."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from lib.selectors.badge import kmeans_plus_plus
from lib.selectors.class_stratified import ALL, image_limits, merge_streams, pick_streams
from lib.selectors.greedy import BoxQueue
from lib.selectors.peaks import ranked_slices, slice_peaks
from lib.selectors.random_regions import Hint, Space, draw_uniform, hints_from_labels, parse_hints, starting_budget
from lib.selectors.strided import strided_blocks
from lib.selectors.submodular import flqmi
from lib.selectors.typiclust import typiclust
from lib.selectors.usim import class_weights, kneedle, usim


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- badge -----------------------------------------------------------------------------------------------------------


def test_no_centre_is_chosen_of_nothing_wanted() -> None:
    chosen = kmeans_plus_plus(np.ones((3, 2)), 0, rng())
    assert chosen.shape == (0,)
    assert chosen.dtype == np.intp


def test_a_draw_that_is_rounded_up_to_the_sum_takes_the_last_row_with_weight() -> None:
    whole = SimpleNamespace(random=lambda: 1.0)
    assert kmeans_plus_plus([[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]], 2, whole).tolist() == [0, 1]


# --- streams of classes ----------------------------------------------------------------------------------------------


def test_limits_of_an_image_by_hand() -> None:
    assert image_limits(20, 0.75, [1, 2]) == {1: 5, 2: 5, ALL: 5}
    assert image_limits(1, 0.75, [1, 2]) == {1: 1, 2: 1, ALL: 1}


def test_streams_of_one_image_share_its_room() -> None:
    grid = np.array([3.0, 9.0, 8.0, 1.0, 7.0], np.float32).reshape(5, 1, 1)
    grids = {ALL: grid, 1: grid.copy()}
    orders: set[int] = set()
    for seed in range(8):
        found = pick_streams(grids, (2, 1, 1), (1, 1, 1), [], {ALL: 1, 1: 1}, np.random.default_rng(seed))
        # The first stream gets the best box, the other one the best that does not overlap it.
        first, second = ((ALL, 1), (1, ALL))[found[1][0][1] == 9.0]
        assert found[first] == [((1, 0, 0), 9.0)]
        assert found[second] == [((4, 0, 0), 7.0)]
        orders.add(first)
        assert float(grid[1, 0, 0]) == 9.0
    assert orders == {ALL, 1}


def test_streams_leave_taken_boxes_alone() -> None:
    grid = np.array([3.0, 9.0, 8.0, 1.0, 7.0], np.float32).reshape(5, 1, 1)
    found = pick_streams({ALL: grid}, (2, 1, 1), (1, 1, 1), [((2, 0, 0), (1, 1, 1))], {ALL: 9}, rng())
    assert found == {ALL: [((4, 0, 0), 7.0), ((0, 0, 0), 3.0)]}


# --- greedy boxes ----------------------------------------------------------------------------------------------------


def test_boxes_that_are_blocked_later_are_not_free() -> None:
    grid = np.array([5.0, 4.0, 3.0, 2.0], np.float32).reshape(4, 1, 1)
    free = BoxQueue(grid, (1, 1, 1), (2, 1, 1), [])
    assert free.pop() == ((0, 0, 0), 5.0)
    free.block([((2, 0, 0), (1, 1, 1)), ((3, 0, 0), (1, 1, 1))])
    assert free.pop() == ((4, 0, 0), 3.0)


# --- peaks, blocks, clusters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[[1.0, 2.0]], [1.0, np.nan, 0.0], 3.0])
def test_peaks_need_one_number_a_slice(scores: object) -> None:
    with pytest.raises(ValueError, match="one number a slice"):
        slice_peaks(scores)


def test_peaks_need_a_distance() -> None:
    with pytest.raises(ValueError, match="one slice or more, found 0"):
        slice_peaks([0.0, 1.0, 0.0], 0)
    assert slice_peaks([0.0, 1.0, 0.0, 2.0, 0.0], 1).tolist() == [3, 1]


def test_blocks_need_a_slice() -> None:
    with pytest.raises(ValueError, match="one slice or more, found 0"):
        strided_blocks({"a": [True]}, 0, 1, rng())


def test_typicality_of_pairs_is_their_order() -> None:
    rows = np.array([[0.0], [10.0], [10.1]])
    chosen = typiclust(rows, None, 2, rng())
    assert sorted(chosen.tolist()) in ([0, 1], [0, 2])


# --- submodular selection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", [[1.0, 2.0], [[1.0, np.inf]]])
def test_similarities_are_a_finite_matrix(similarity: object) -> None:
    with pytest.raises(ValueError, match="finite matrix of candidates and queries"):
        flqmi(similarity, 1)


def test_submodular_selection_refuses_wrong_options_and_selects_nothing_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"zero or more, found -0\.5"):
        flqmi([[1.0]], 1, eta=-0.5)
    with pytest.raises(ValueError, match=r"one of .*lazy.*, found 'best'"):
        flqmi([[1.0]], 1, optimizer="best")
    indices, gains = flqmi([[1.0]], 0)
    assert (indices.shape, gains.shape, indices.dtype) == ((0,), (0,), np.intp)


@pytest.mark.parametrize("frequencies", [[0.5, -0.1], [np.nan, 1.0], [[0.5, 0.5]]])
def test_class_weights_need_frequencies(frequencies: object) -> None:
    with pytest.raises(ValueError, match="finite numbers, none negative"):
        class_weights(frequencies)


def test_class_weights_without_a_background_count_every_class() -> None:
    np.testing.assert_allclose(class_weights([0.5, 0.25], background=None), [1 / 3, 2 / 3])
    np.testing.assert_allclose(class_weights([0.5, 0.25]), [0, 1])


def test_usim_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match=r"kind .c. \(cosine\) or .f. \(Fisher\), found 'x'"):
        usim(np.ones((2, 2)), np.ones((2, 3)), [0.5, 0.5], 1, rng(), kind="x")
    with pytest.raises(ValueError, match=r"found \(2, 2\) and \(3, 3\)"):
        usim(np.ones((2, 2)), np.ones((3, 3)), [0.5, 0.5], 1, rng())


def test_gradients_without_information_are_compared_all_the_same() -> None:
    choice = usim(np.ones((4, 2)), np.zeros((4, 3)), [0.5, 0.5], 2, rng(), kind="f")
    assert len(set(choice.indices.tolist())) == 2


def test_a_line_has_no_knee() -> None:
    assert kneedle(np.linspace(1, 0, 9)) is None


# --- random regions --------------------------------------------------------------------------------------------------


def test_hints_have_areas_and_voxels() -> None:
    with pytest.raises(ValueError, match='must be "inside" or "border", found \'all\''):
        parse_hints([{"image": "a", "voxel": [1, 2, 3], "class": "c", "area": "all"}])
    with pytest.raises(ValueError, match=r"must be \[x, y, z\], found '1 2 3'"):
        parse_hints([{"image": "a", "voxel": "1 2 3", "class": "c"}])
    assert parse_hints([{"image": "a", "voxel": (1, 2, 3), "class": "c"}]) == {
        "a": [Hint("a", (1, 2, 3), "c", "inside")]
    }


def test_the_last_free_place_is_found_without_luck() -> None:
    space = Space((3, 1, 1), (1, 1, 1), [((0, 0, 0), (1, 1, 1)), ((2, 0, 0), (1, 1, 1))])
    assert draw_uniform(space, rng(), trials=0) == ((1, 0, 0), (1, 1, 1))
    space.taken.append(((1, 0, 0), (1, 1, 1)))
    assert draw_uniform(space, rng(), trials=0) is None


def test_a_hint_whose_middle_is_taken_is_held_from_the_side() -> None:
    hint = Hint("a", (2, 0, 0), "rare", "border")
    space = Space((6, 1, 1), (3, 1, 1), [((0, 0, 0), (2, 1, 1))])
    (draw,) = starting_budget({"a": space}, 1, rng(), {"a": [hint]})
    assert (draw.image, draw.start, draw.size, draw.area, draw.label) == ("a", (2, 0, 0), (3, 1, 1), "border", "rare")


def test_a_class_without_room_is_left_to_the_rest_of_the_budget() -> None:
    hint = Hint("a", (0, 0, 0), "rare", "inside")
    space = Space((5, 1, 1), (2, 1, 1), [((0, 0, 0), (1, 1, 1))])
    draws = starting_budget({"a": space}, 2, rng(), {"a": [hint]})
    assert all(draw.label != "rare" for draw in draws)
    assert {draw.start[0] for draw in draws} <= {1, 2, 3}


def test_a_class_that_another_region_holds_already_needs_none_of_its_own() -> None:
    hints = {"a": [Hint("a", (0, 0, 0), "one", "inside"), Hint("a", (1, 0, 0), "two", "inside")]}
    draws = starting_budget({"a": Space((2, 1, 1), (2, 1, 1))}, 3, rng(), hints)
    assert [(draw.start, draw.size) for draw in draws] == [((0, 0, 0), (2, 1, 1))]


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "taken", "order", "tiers"),
    [
        ([0, 1, 2, 9, 2, 1, 0, 3, 5, 4], [], [3, 8, 0, 9, 7, 2, 4, 1, 5, 6], [0, 0, 1] + [2] * 7),
        ([0, 1, 2, 9, 2, 1, 0, 3, 5, 4], [8], [3, 0, 9, 7, 2, 4, 1, 5, 6], [0, 1] + [2] * 7),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [], [0, 3, 6, 9, 1, 2, 4, 5, 7, 8], [1] * 4 + [2] * 6),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [], [9, 6, 3, 0, 8, 7, 5, 4, 2, 1], [1] * 4 + [2] * 6),
        ([1] * 5, [2], [0, 1, 3, 4], [2] * 4),
    ],
)
def test_slices_in_the_order_to_ask_for_them(scores: list, taken: list, order: list, tiers: list) -> None:
    used = np.isin(np.arange(len(scores)), taken)
    found, tier = ranked_slices(scores, used, 3)
    assert found.tolist() == order
    assert tier.tolist() == tiers
    assert (found.dtype, tier.dtype) == (np.intp, np.intp)


def test_what_a_stream_lacks_comes_from_all_and_then_from_the_best_of_the_others() -> None:
    streams = {
        ALL: [(4.0, "b"), (5.0, "a")],
        1: [(3.0, "c")],
        2: [(8.0, "e"), (9.0, "d"), (7.0, "f")],
        3: [(8.5, "h"), (9.5, "g")],
    }
    chosen, lacking = merge_streams(streams, {ALL: 1, 1: 3, 2: 1, 3: 1})
    assert chosen == [(ALL, "a"), (1, "c"), (2, "d"), (3, "g"), (ALL, "b"), (3, "h")]
    assert lacking == {1: 2}
    assert merge_streams({2: [(1.0, "x"), (2.0, "y")]}, {ALL: 1, 2: 1, 7: 1}) == ([(2, "y"), (2, "x")], {ALL: 1, 7: 1})
    assert merge_streams({ALL: [(1.0, "x")]}, {ALL: 1}) == ([(ALL, "x")], {})


def test_weights_of_classes_by_hand() -> None:
    np.testing.assert_allclose(class_weights([0.5, 0.25, 0.125, 0]), [0, 0.2, 0.4, 0.4])
    np.testing.assert_allclose(class_weights([1.0, 0, 0]), [0, 0.5, 0.5])
    np.testing.assert_allclose(class_weights([1.0]), [1.0])


def test_a_knee_by_hand_needs_a_fall_behind_it() -> None:
    curve = [10, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert kneedle(curve, 1.0) == 1
    assert kneedle(curve) is None
    assert kneedle([3.0]) is None
    assert kneedle([2.0, 2.0, 2.0]) is None


def test_boxes_around_a_hint_are_all_those_that_hold_it_and_are_free() -> None:
    shape, size, hint = (4, 5, 6), (2, 3, 2), (1, 2, 3)
    blocked = ((0, 1, 2), (1, 1, 1))
    expected = {
        start
        for start in itertools.product(*(range(s - k + 1) for s, k in zip(shape, size, strict=True)))
        if all(a <= v < a + k for a, v, k in zip(start, hint, size, strict=True))
        and not all(a <= v < a + k for a, v, k in zip(start, blocked[0], size, strict=True))
    }
    found = set()
    for seed in range(150):
        spaces = {"a": Space(shape, size, [blocked])}
        hints = {"a": [Hint("a", hint, "rare", "border")]}
        draw = starting_budget(spaces, 1, np.random.default_rng(seed), hints)[0]
        assert (draw.image, draw.size, draw.area, draw.label) == ("a", size, "border", "rare")
        found.add(draw.start)
    assert found == expected


def test_hints_of_a_label_map_by_hand() -> None:
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1, 1:3, 2] = 7
    names = {7: "c", 0: "background"}
    found = hints_from_labels(labels, "a", names, rng())
    assert found[-4:] == [
        Hint("a", (1, 1, 2), "c", "inside"),
        Hint("a", (1, 2, 2), "c", "inside"),
        Hint("a", (1, 1, 2), "c", "border"),
        Hint("a", (1, 2, 2), "c", "border"),
    ]
    assert [hint.area for hint in found if hint.label == "background"].count("inside") == 58
    few = hints_from_labels(labels, "a", names, rng(), per_class=10)
    inside = [hint.voxel for hint in few if (hint.label, hint.area) == ("background", "inside")]
    assert len(set(inside)) == len(inside) == 10
    assert inside == sorted(inside)
    assert not any(labels[voxel] for voxel in inside)
    assert len([hint for hint in few if hint.label == "c"]) == 4


def test_a_scan_that_is_as_thick_as_a_block_holds_one() -> None:
    blocks = strided_blocks({"a": np.ones(3, bool), "b": np.ones(2, bool)}, 3, 2, rng())
    assert [(block.scan, block.bottom, sorted(block.annotated)) for block in blocks] == [("a", 0, [0, 2])]
