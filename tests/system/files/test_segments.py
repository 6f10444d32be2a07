# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Segmentations of 3D Slicer: their own names, values, layers and positions are used."""

from __future__ import annotations

import numpy as np
import pytest

from lib.partial_labels import UNLABELLED
from lib.storage.placement import place
from lib.storage.segments import read_segments
from lib.storage.volumes import Grid, ImageError, load_label
from tests.system.files.conftest import AFFINE, INFO, save, scan, seg_nrrd, stored, truth

SWAPPED = [{"name": "b", "idx": 1}, {"name": "a", "idx": 2}]
TRUTH = truth(scan())
A, B = (TRUTH == 1).astype(np.uint8), (TRUTH == 2).astype(np.uint8)
OTHER = np.array([0, 2, 1, 0], np.uint8)[TRUTH]
FRAME = np.zeros_like(TRUTH)
FRAME[2:9, 2:9, 2:9] = 1
FRAME[3:8, 3:8, 3:8] = 0
GRID = Grid(TRUTH.shape, AFFINE, "case")

FILES = {
    "one layer": (TRUTH, [("a", 1, 0), ("b", 2, 0)]),
    "renumbered": (OTHER, [("a", 2, 0), ("b", 1, 0)]),
    "moved in the list": (TRUTH, [("b", 2, 0), ("a", 1, 0)]),
    "far apart": (np.array([0, 7, 250], np.uint8)[TRUTH], [("a", 7, 0), ("b", 250, 0)]),
    "above a byte": (np.array([0, 300, 1000], np.uint16)[TRUTH], [("a", 300, 0), ("b", 1000, 0)]),
    "two layers": (np.stack([A, B]), [("a", 1, 0), ("b", 1, 1)]),
    "two layers, turned": (np.stack([A, B]), [("b", 1, 1), ("a", 1, 0)]),
    "layers without numbers": (np.stack([A, B]), [("a", None, None), ("b", None, None)]),
    "frame above": (np.stack([TRUTH, FRAME]), [("a", 1, 0), ("b", 2, 0), ("query_region", 1, 1)]),
    "frame below": (np.stack([FRAME, TRUTH]), [("query_region", 1, 0), ("a", 1, 1), ("b", 2, 1)]),
    "background drawn": (np.stack([TRUTH, 1 - A]), [("a", 1, 0), ("b", 2, 0), ("background", 1, 1)]),
    "other case": (TRUTH, [("A", 1, 0), ("B", 2, 0)]),
    "empty segments": (TRUTH, [("a", 1, 0), ("b", 2, 0), ("Segment_3", 3, 0)]),
    "two of one name": (np.stack([A, B, A]), [("a", 1, 0), ("b", 1, 1), ("a", 1, 2)]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, serve):
    folder = tmp_path_factory.mktemp("segments") / "studies"
    save(folder / "case.nii.gz", scan())
    client = serve(folder)
    # `FRAME` is the frame of this region.
    asked = client.ask("precomputed", batch=1, regions=[{"image": "case", "start": [3, 3, 3], "size": [5, 5, 5]}])
    assert asked.status_code == 200, asked.text
    return client


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize(
    "info", [INFO, SWAPPED, None, [{"name": "Segment_1", "idx": 1}]], ids=["", "other", "none", "odd"]
)
def test_the_names_of_the_file_decide(world, tmp_path, case, info):
    path = seg_nrrd(tmp_path / "sent.seg.nrrd", *FILES[case])
    reply = world.submit("case", path, info, whole=True)
    assert reply.status_code == 200, reply.text
    np.testing.assert_array_equal(stored(world.studies, "case"), TRUTH)


def test_names_that_are_no_classes_are_refused_whatever_is_sent_beside_them(world, tmp_path):
    path = seg_nrrd(tmp_path / "sent.seg.nrrd", TRUTH, [("Segment_1", 1, 0), ("b", 2, 0)])
    reply = world.submit("case", path, INFO, whole=True)
    assert reply.status_code == 400
    assert "segments 1 (Segment_1) are not classes of this project" in reply.text


REFUSED = {
    "overlap": (np.stack([A, np.maximum(A, B)]), [("a", 1, 0), ("b", 1, 1)], f"a and b overlap in {A.sum()} voxels"),
    "shared": (TRUTH, [("a", 1, 0), ("b", 1, 0)], "a and b share the value 1 in layer 0"),
    "no layer": (TRUTH, [("a", 1, 0), ("b", 1, 1)], "segment b has value 1 in layer 1 of a file with 1 layers"),
    "no segment": (np.stack([TRUTH, B]), [("a", 1, 0), ("b", 1, 1)], "layer 0 holds the value 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_refused_in_a_sentence(world, tmp_path, case):
    layers, segments, said = REFUSED[case]
    before = world.info()["queries"]
    reply = world.submit("case", seg_nrrd(tmp_path / "sent.seg.nrrd", layers, segments), INFO, whole=True)
    assert reply.status_code == 400
    assert said in reply.text
    assert world.info()["queries"] == before


def test_a_rebuild_from_the_raw_files_gives_the_same(tmp_path, serve):
    folder = tmp_path / "studies"
    save(folder / "case.nii.gz", scan())
    client = serve(folder)
    cut = (slice(3, 20), slice(2, 18), slice(1, 14))
    begin = AFFINE.copy()
    begin[:3, 3] = (AFFINE @ [3, 2, 1, 1])[:3]
    flip = begin @ np.array([[-1, 0, 0, 16], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    small = np.stack([A[cut], B[cut]]).transpose(0, 1, 3, 2)[:, ::-1]
    path = seg_nrrd(tmp_path / "sent.seg.nrrd", small, [("b", 1, 1), ("a", 1, 0)], flip)
    reply = client.submit("case", path, INFO, whole=True)
    assert reply.status_code == 200, reply.text
    expected = np.zeros_like(TRUTH)
    expected[cut] = TRUTH[cut]
    np.testing.assert_array_equal(stored(folder, "case"), expected)
    number = reply.json()["answer"]
    for change in ("withdraw", "restore"):
        made = client.http.post(f"/patchwise/answers/{number}/{change}", json={"client_id": "ann"})
        assert made.status_code == 200, made.text
    assert made.json()["active"]
    np.testing.assert_array_equal(stored(folder, "case"), expected)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("cut", [None, (3, 2, 1), (-2, 4, -1)])
def test_parts_flips_and_permutations_of_the_grid_are_placed(tmp_path, axes, flips, cut):
    """`cut`: voxels cut off at the beginning of each axis; negative ones are added."""
    start = np.array(cut or (0, 0, 0))
    whole = TRUTH.copy()
    whole[:4], whole[:, :5], whole[:, :, :2] = 0, 0, 0
    part = np.pad(whole, [(max(-s, 0), max(-s, 0)) for s in start])[tuple(slice(max(s, 0), None) for s in start)]
    turned = part.transpose(axes)
    step = np.eye(4)[[*axes, 3]].T
    for axis, flip in enumerate(flips):
        if flip:
            turned = np.flip(turned, axis)
            step[:3, 3] += step[:3, axis] * (turned.shape[axis] - 1)
            step[:3, axis] *= -1
    step[:3, 3] += start
    affine = AFFINE @ step
    path = seg_nrrd(tmp_path / "s.seg.nrrd", np.ascontiguousarray(turned), [("a", 1, 0), ("b", 2, 0)], affine)
    label = load_label(path, GRID)
    np.testing.assert_array_equal(label.array_xyz, whole)
    np.testing.assert_allclose(label.affine, AFFINE)
    if cut is None:
        np.testing.assert_array_equal(load_label(save(tmp_path / "s.nii.gz", turned, affine), GRID).array_xyz, whole)
    else:
        with pytest.raises(ImageError, match="has shape"):
            load_label(save(tmp_path / "s.nii.gz", turned, affine), GRID)


def test_voxels_outside_of_the_image_are_not_dropped_silently(tmp_path):
    affine = AFFINE.copy()
    affine[:3, 3] = (AFFINE @ [12, 0, 0, 1])[:3]
    path = seg_nrrd(tmp_path / "s.seg.nrrd", TRUTH, [("a", 1, 0), ("b", 2, 0)], affine)
    with pytest.raises(ImageError, match=f"{np.count_nonzero(TRUTH[12:])} voxels of its segments lie outside of case"):
        load_label(path, GRID)


def test_half_a_voxel_and_a_turn_of_some_degrees_are_other_grids():
    half = AFFINE.copy()
    half[0, 3] += 0.5
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.05), -np.sin(0.05)], [np.sin(0.05), np.cos(0.05)]]
    assert place([half], TRUTH.shape, [AFFINE]) is None
    assert place([turn @ AFFINE], TRUTH.shape, [AFFINE]) is None
    assert place([np.diag([2, 1, 1, 1]) @ AFFINE], TRUTH.shape, [AFFINE]) is None
    assert place([turn @ AFFINE, AFFINE], TRUTH.shape, [half, AFFINE]).is_plain(TRUTH.shape)


def test_unlabelled_voxels_of_one_layer_stay_unlabelled(tmp_path):
    layer = TRUTH.copy()
    layer[0] = UNLABELLED
    label = load_label(seg_nrrd(tmp_path / "s.seg.nrrd", layer, [("a", 1, 0), ("b", 2, 0)]), GRID)
    np.testing.assert_array_equal(label.array_xyz, layer)
    assert label.label_info == INFO


def test_fractions_are_refused(tmp_path):
    more = {"Segmentation_SourceRepresentation": "Fractional labelmap"}
    path = seg_nrrd(tmp_path / "s.seg.nrrd", TRUTH, [("a", 1, 0), ("b", 2, 0)], **more)
    with pytest.raises(ImageError, match=r"s.seg.nrrd: its segments are fractions"):
        read_segments(path, 1)
