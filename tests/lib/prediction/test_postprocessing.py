# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest

import lib.prediction.postprocessing
from lib.prediction.postprocessing import label_map


def probs(shape, *blocks):
    """Background at 1 - p, and classes 1 to 3 with probability p in their blocks: (class, block, p, second class)."""
    found = np.zeros((4, *shape))
    found[0] = 1
    for class_, block, p, second in blocks:
        found[(slice(None), *block)] = 0
        found[(class_, *block)] = p
        found[(second, *block)] += 1 - p
    return found


SURE = (slice(0, 3), slice(0, 3), slice(0, 3))
DOUBTED = (slice(5, 7), slice(5, 7), slice(5, 7))


def test_without_a_bar_it_is_the_most_probable_class():
    given = np.random.default_rng(0).dirichlet([1, 1, 1], (5, 6, 7)).transpose(3, 0, 1, 2)
    assert np.array_equal(label_map(given), given.argmax(0))
    assert label_map(given).dtype == np.uint8


def test_an_unsure_component_goes_to_the_next_class_and_a_sure_one_stays():
    given = probs((8, 8, 8), (1, SURE, 0.9, 0), (1, DOUBTED, 0.7, 2))
    expected = np.zeros((8, 8, 8))
    expected[SURE] = 1
    # Class 2 is next, with 0.3: unsure as well, so background remains.
    assert np.array_equal(label_map(given, 0.8), expected)
    expected[DOUBTED] = 1
    assert np.array_equal(label_map(given, 0.6), expected)


def test_the_mean_of_a_component_counts_and_corners_connect():
    corner = (slice(3, 4), slice(3, 4), slice(3, 4))  # touches the sure block at a corner: 27 * 0.9 and 1 * 0.5
    given = probs((8, 8, 8), (1, SURE, 0.9, 0), (1, corner, 0.51, 0))
    assert np.count_nonzero(label_map(given, 0.88)) == 28
    assert np.count_nonzero(label_map(given, 0.89)) == 0


def test_what_is_given_away_joins_a_sure_neighbour():
    beside = (slice(3, 4), slice(0, 3), slice(0, 3))
    given = probs((8, 8, 8), (2, SURE, 0.95, 0), (1, beside, 0.6, 2))
    expected = np.zeros((8, 8, 8))
    expected[SURE] = 2
    expected[beside] = 2  # 27 voxels of 0.95 and 9 of 0.4: mean 0.8125
    assert np.array_equal(label_map(given, 0.8), expected)


def test_two_classes_cannot_hand_voxels_to_and_fro():
    given = probs((8, 8, 8), (1, DOUBTED, 0.5, 2))
    given[3][DOUBTED] = 0.1
    assert np.array_equal(label_map(given, 0.9), np.zeros((8, 8, 8)))


def test_a_component_smaller_than_its_class_ever_is_goes_to_the_next_class():
    given = probs((8, 8, 8), (1, SURE, 0.9, 0), (1, DOUBTED, 0.9, 2), (3, (slice(7, 8),) * 3, 0.9, 0))
    kept = np.zeros((8, 8, 8))
    kept[SURE] = 1
    kept[7, 7, 7] = 3
    # The block of 8 voxels is less than 9, and class 3 may be of any size.
    taken = kept.copy()
    taken[DOUBTED] = 2
    assert np.array_equal(label_map(given, smallest={1: 9}), taken)
    assert np.array_equal(label_map(given, smallest={1: 9, 2: 9}), kept)
    kept[DOUBTED] = 1
    assert np.array_equal(label_map(given, smallest={1: 8}), kept)


def test_both_bars_hold_at_once():
    given = probs((8, 8, 8), (1, SURE, 0.7, 0), (1, DOUBTED, 0.9, 0))
    assert np.count_nonzero(label_map(given, 0.8, {1: 9})) == 0
    assert np.count_nonzero(label_map(given, 0.8, {1: 8})) == 8
    assert np.count_nonzero(label_map(given, 0.6, {1: 9})) == 27


def test_a_class_of_one_piece_keeps_its_largest_and_the_rest_goes_to_the_next_class():
    given = probs((8, 8, 8), (1, SURE, 0.9, 0), (1, DOUBTED, 0.9, 2))
    expected = np.zeros((8, 8, 8))
    expected[SURE] = 1
    expected[DOUBTED] = 2
    assert np.array_equal(label_map(given, single=[1]), expected)
    expected[DOUBTED] = 0
    assert np.array_equal(label_map(given, single=[0]), expected)
    assert np.array_equal(label_map(given, single=[0, 1]), expected)
    assert np.array_equal(label_map(given, single=[2]), given.argmax(0))


def test_what_joins_a_class_of_one_piece_is_looked_at_again():
    given = probs(
        (8, 8, 8), (1, SURE, 0.9, 0), (2, (slice(0, 3), slice(0, 3), slice(5, 7)), 0.9, 0), (1, DOUBTED, 0.9, 2)
    )
    # The doubted block of 8 goes to class 2, which has 18 voxels elsewhere, and from there to background.
    found = label_map(given, single=[1, 2])
    assert np.count_nonzero(found == 1) == 27
    assert np.count_nonzero(found == 2) == 18
    assert not found[DOUBTED].any()


def test_one_piece_and_a_bar_hold_at_once():
    given = probs((8, 8, 8), (1, SURE, 0.6, 0), (1, DOUBTED, 0.9, 0))
    # The larger block is unsure, so the smaller one is the largest left.
    found = label_map(given, 0.8, single=[1])
    assert np.count_nonzero(found) == 8
    assert found[DOUBTED].all()


@pytest.mark.parametrize("at_once", [1, 2 * 42, 3 * 42 + 1])
def test_how_many_voxels_are_in_memory_changes_nothing(monkeypatch, at_once):
    noise = np.random.default_rng(1).dirichlet([1, 1, 1, 1], (5, 6, 7)).transpose(3, 0, 1, 2)
    expected = label_map(noise, 0.55, {2: 3.0})
    assert np.count_nonzero(expected != noise.argmax(0)) > 0
    monkeypatch.setattr(lib.prediction.postprocessing, "_AT_ONCE", at_once)
    assert np.array_equal(label_map(noise, 0.55, {2: 3.0}), expected)
