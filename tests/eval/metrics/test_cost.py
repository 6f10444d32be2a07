# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Costs of regions by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics.cost import COSTS, border_length, foreground_slices, region_costs


def square():
    label = np.zeros((5, 4, 3), dtype=np.uint8)
    label[1:3, 1:3, 1] = 1  # a square of 2 x 2 voxels in one slice
    return label


def test_border_is_the_outline_in_millimetres():
    assert border_length(square(), (1.0, 1.0, 3.0)) == 8.0
    assert border_length(square(), (2.0, 1.0, 3.0)) == 2 * 2 * 2.0 + 2 * 2 * 1.0
    two = square()
    two[2, 1:3, 1] = 2  # one more line between the classes
    assert border_length(two, (1.0, 1.0, 1.0)) == 10.0
    assert border_length(np.ones((3, 3, 3), dtype=np.uint8), (1, 1, 1)) == 0.0


def test_a_whole_volume_counts_a_third_of_its_slices():
    label = np.zeros((4, 4, 9), dtype=np.uint8)
    label[0, 0, 2:8] = 1
    assert foreground_slices(label) == 6
    assert foreground_slices(label, whole=True) == 2
    assert foreground_slices(label, axis=0) == 1


def test_costs_by_hand():
    factors = {"region": 1.0, "slice": 0.5, "mm": 0.1}
    costs = region_costs(square(), (1.0, 1.0, 1.0), minutes=factors)
    assert costs == pytest.approx(
        {
            "regions": 1,
            "voxels": 60,
            "foreground_voxels": 4,
            "foreground_slices": 1,
            "border_mm": 8,
            "minutes": 1 + 0.5 + 0.8,
        }
    )
    assert tuple(costs) == COSTS
    sagittal = region_costs(np.ones((1, 4, 3), dtype=np.uint8), (1, 1, 1), unit="slice")
    assert sagittal["foreground_slices"] == 1


@given(st.integers(0, 10**6))
def test_a_mirrored_region_costs_the_same(seed):
    label = np.random.default_rng(seed).integers(0, 3, (4, 5, 3)).astype(np.uint8)
    assert region_costs(label[::-1, :, ::-1], (1, 2, 3)) == region_costs(label, (1, 2, 3))
