# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest

from lib.agreement import class_agreement, summarise
from lib.partial_labels import UNLABELLED


def test_dice_of_each_class_where_both_labelled():
    mine = np.array([[[1, 1, 1, 0, 2, UNLABELLED]]], np.uint8)
    other = np.array([[[1, 1, 0, 0, 1, 2]]], np.uint8)
    found = class_agreement(mine, other, {"one": 1, "two": 2, "three": 3})
    # one: A has 3, B has 3 voxels, 2 shared; two: A has 1, B has none where A labelled; three: in neither.
    assert found["one"] == (pytest.approx(4 / 6), 3, 3)
    assert found["two"] == (0.0, 1, 0)
    assert found["three"] == (None, 0, 0)


def test_the_mean_leaves_out_regions_without_the_class():
    pairs = [{"classes": {"one": {"dice": d}}} for d in (0.5, None, 1.0)]
    assert summarise(pairs, ["one", "two"]) == {
        "one": {"mean_dice": 0.75, "regions": 2},
        "two": {"mean_dice": None, "regions": 0},
    }
