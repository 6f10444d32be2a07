# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from lib.annotator.region_labels import Draft, Drafts, filled_between, packed, unpacked, write_answer
from lib.annotator.region_views import view_of
from lib.partial_labels import LabelError
from lib.storage.volumes import image_grid, load_label
from tests.lib.annotator.test_region_views import TURNS, affine_of

CLASSES = {"left part": 1, "lesion": 2}
BOX = (3, 4, 5), (4, 5, 3)


def drawn(size, seed=0):
    return np.random.default_rng(seed).integers(0, 3, size).astype(np.uint8)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize("turn", TURNS)
def test_an_answer_lands_on_the_very_voxels_of_its_region(tmp_path, turn, tilt):
    affine = affine_of(turn, tilt=tilt)
    nib.save(nib.Nifti1Image(np.zeros((12, 13, 14), np.int16), affine), tmp_path / "scan.nii.gz")
    grid = image_grid(tmp_path / "scan.nii.gz", "scan")
    view = view_of(BOX, grid.shape, grid.affine)
    upright = drawn(view.region[1])
    write_answer(tmp_path / "answer.seg.nrrd", upright, view, CLASSES)
    label = load_label(tmp_path / "answer.seg.nrrd", like=grid)
    expected = np.zeros((12, 13, 14), np.uint8)
    expected[3:7, 4:9, 5:8] = view.stored(upright)
    np.testing.assert_array_equal(label.array_xyz, expected)
    assert {(e["name"], e["idx"]) for e in label.label_info} == {("left part", 1), ("lesion", 2)}


def test_an_empty_answer_is_an_answer(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((12, 13, 14), np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
    grid = image_grid(tmp_path / "scan.nii.gz", "scan")
    view = view_of(BOX, grid.shape, grid.affine)
    write_answer(tmp_path / "answer.seg.nrrd", np.zeros(view.region[1], np.uint8), view, CLASSES)
    assert not load_label(tmp_path / "answer.seg.nrrd", like=grid).array_xyz.any()


def test_labels_are_packed_with_their_first_axis_fastest():
    view = view_of(BOX, (12, 13, 14), np.eye(4))
    label = drawn((4, 5, 3))
    assert gzip.decompress(packed(label)) == label.transpose(2, 1, 0).tobytes()
    np.testing.assert_array_equal(unpacked(packed(label), view, CLASSES), label)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"no gzip", "is not a gzip stream; load the page again"),
        (gzip.compress(bytes(59)), "the label has 59 voxels and the region 4 x 5 x 3, 60 in all"),
        (gzip.compress(bytes(61)), "the label has more voxels and the region 4 x 5 x 3, 60 in all"),
        (gzip.compress(bytes(10**8)), "has more voxels"),
        (gzip.compress(bytes(60))[:-9], "has more voxels"),
        (
            gzip.compress(bytes([0] * 59 + [7])),
            "holds the value 7, which is no class; classes are 1 left part, 2 lesion",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_refused_in_a_sentence(body, sentence):
    view = view_of(BOX, (12, 13, 14), np.eye(4))
    with pytest.raises(LabelError, match=sentence):
        unpacked(body, view, CLASSES)


def test_empty_slices_between_drawn_ones_are_filled():
    label = np.zeros((9, 9, 8), np.uint8)
    label[2:7, 2:7, 1] = 1
    label[2:7, 2:7, 5] = 1
    found = filled_between(label, 2)
    assert (found[2:7, 2:7, 1:6] == 1).all()
    assert np.count_nonzero(found) == 5 * 25
    np.testing.assert_array_equal(filled_between(label.transpose(2, 0, 1), 0), found.transpose(2, 0, 1))
    np.testing.assert_array_equal(filled_between(found, 2), found)
    assert not filled_between(np.zeros((3, 3, 3), np.uint8), 1).any()


def test_drafts_belong_to_a_query_and_a_person(tmp_path):
    drafts = Drafts(tmp_path / "drafts")
    assert drafts.get(1, "ann") is None
    a, b, c, d = Draft(b"a", "nothing"), Draft(b"b", "prediction"), Draft(b"c", "nothing"), Draft(b"pn", "prediction")
    for query, client, draft in ((1, "ann", a), (1, "Ann", b), (2, "../ann", c), (1, "ann", d)):
        drafts.keep(query, client, draft)
    assert (drafts.get(1, "ann"), drafts.get(1, "Ann"), drafts.get(2, "../ann")) == (d, b, c)
    assert len(list((tmp_path / "drafts").iterdir())) == 3
    drafts.drop(1, "ann")
    drafts.drop(1, "ann")
    assert drafts.get(1, "ann") is None


def test_a_draft_of_an_earlier_version_began_with_nothing(tmp_path):
    drafts = Drafts(tmp_path)
    body = packed(drawn((2, 3, 4)))
    drafts.keep(1, "ann", Draft(body, "prediction"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(body)
    assert drafts.get(1, "ann") == Draft(body, "nothing")
