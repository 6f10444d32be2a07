# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The oracle: hints at the right place, answers with truth in regions only, lossless transfer of label maps."""

from collections import Counter

import numpy as np

from eval.protocol.annotator_profiles import Oracle, answers
from eval.protocol.oracle import child_rng, count_voxels, draw_hints, from_nifti, to_nifti

LABELS = {"background": 0, "head": 1, "tail": 2}
FOREGROUND = {"head": 1, "tail": 2}


def scene():
    label = np.zeros((9, 8, 7), dtype=np.uint8)
    label[0:5, 2:7, 1:6] = 1  # touches the image's border at x = 0
    label[6:8, 2:4, 2:4] = 2
    return label


def test_hints_lie_in_their_class_and_area():
    label = scene()
    hints = draw_hints(label, LABELS, "scan", 8, child_rng(1, 0, "hints", "scan"))
    inner = {(x, y, z) for x in range(1, 4) for y in range(3, 6) for z in range(2, 5)}
    for hint in hints:
        voxel = tuple(hint["voxel"])
        assert label[voxel] == LABELS[hint["class"]]
        assert hint["image"] == "scan"
        if hint["class"] == "head" and hint["area"] == "border":
            assert voxel not in inner
        if hint["class"] == "background" and hint["area"] == "border":
            edge = any(c in (0, n - 1) for c, n in zip(voxel, label.shape, strict=True))
            neighbours = [np.abs(np.argwhere(label > 0) - voxel).sum(axis=1).min()]
            assert edge or neighbours == [1]
    counts = Counter((h["class"], h["area"]) for h in hints)
    assert counts == {(c, a): 8 for c in LABELS for a in ("inside", "border")}


def test_hints_are_distinct_and_fewer_where_a_class_is_small():
    label = np.zeros((4, 4, 4), dtype=np.uint8)
    label[1, 1, 1:3] = 1
    hints = draw_hints(label, {"head": 1, "tail": 2}, "scan", 8, np.random.default_rng(0))
    assert sorted(h["voxel"] for h in hints if h["area"] == "inside") == [[1, 1, 1], [1, 1, 2]]
    assert len(hints) == 4


def test_draws_depend_on_seed_and_purpose_only():
    one, same, other = (child_rng(*key).random(4) for key in [(3, 1, "hints"), (3, 1, "hints"), (3, 2, "hints")])
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_answer_and_counts_by_hand():
    label = scene()
    regions = [
        {"image": "a", "start": [0, 0, 0], "size": [2, 3, 2]},
        {"image": "a", "start": [6, 2, 2], "size": [3, 3, 3]},
    ]
    sent = answers(label, regions, Oracle(), 1, foreground=FOREGROUND, spacing=(1, 1, 1))
    assert int((sent == 1).sum()) == 2  # x 0..1, y 2, z 1
    assert int((sent == 2).sum()) == 8
    assert count_voxels(label, regions[0], LABELS) == {"background": 10, "head": 2, "tail": 0}
    assert count_voxels(label, regions[1], LABELS) == {"background": 19, "head": 0, "tail": 8}


def test_label_maps_survive_the_wire_and_repeat_bit_for_bit():
    affine = np.array([[0, -1.5, 0, 3], [1, 0, 0, -4], [0, 0, 2, 5], [0, 0, 0, 1]], dtype=float)
    content = to_nifti(scene(), affine)
    label, got = from_nifti(content)
    np.testing.assert_array_equal(label, scene())
    np.testing.assert_allclose(got, affine)
    assert content == to_nifti(scene(), affine)
