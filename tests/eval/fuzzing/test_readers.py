# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A short run of the cases of `python -m eval bench fuzz` on the readers of volumes and segmentations."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from eval.fuzzing.readers import SHAPE, fuzz_segmentations, fuzz_volumes, volumes
from lib.storage.volumes import Grid, ImageError, check_image, image_geometry, load_image, load_label


def test_damaged_volumes_are_read_or_refused_in_a_sentence():
    tally = fuzz_volumes(400, seed := 11)
    assert (tally.cases, tally.failures, seed) == (400, [], 11)
    assert tally.outcomes["read"] > 20
    assert tally.outcomes["refused in a sentence"] > 200


def test_damaged_segmentations_are_read_or_refused_in_a_sentence():
    tally = fuzz_segmentations(300, 12)
    assert (tally.cases, tally.failures) == (300, [])
    assert tally.outcomes["read"] > 50
    assert tally.outcomes["refused in a sentence"] > 30


def test_every_kind_of_volume_reads_as_it_was_written(tmp_path: Path):
    values_xyz = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    expected = dict.fromkeys(("label.nii.gz", "raw.nrrd", "gzip.nrrd", "bzip2.nrrd"), values_xyz % 3)
    expected["scaled.nii.gz"] = 2 * values_xyz + 1
    for name, content in volumes().items():
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        found = load_image(path)
        np.testing.assert_array_equal(found.array_xyz, expected.get(name, values_xyz))
        assert found.array_xyz.dtype == np.float32
        assert np.allclose(np.abs(found.affine), np.eye(4))
        check_image(path, uploaded=True)
        np.testing.assert_array_equal(load_label(path).array_xyz, expected.get(name, values_xyz))


def test_slabs_join_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One slice a slab, scaled values and a fourth axis of one; NaN in two slabs are counted together."""
    monkeypatch.setattr("lib.storage.volumes.SLAB_VOXELS", 1)
    values = np.random.default_rng(0).normal(size=(4, 3, 5, 1)).astype(np.float32)
    image = nib.Nifti1Image(values, np.diag([2.0, 3.0, 4.0, 1.0]))
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(load_image(tmp_path / "a.nii.gz").array_xyz, values[..., 0])
    values[0, 0, 1], values[1, 1, 4] = np.nan, np.inf
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "b.nii.gz")
    for read in (load_image, check_image):
        with pytest.raises(ImageError, match=r"b.nii.gz: 2 voxels are NaN or infinite"):
            read(tmp_path / "b.nii.gz")


def test_extensions_of_a_header_are_left_unread(tmp_path: Path):
    """Their size is anything: a negative one would have the whole rest of the file read into memory."""
    content = bytearray(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)).to_bytes())
    content[348:352], content[108:112] = b"\1\0\0\0", struct.pack("<f", 368)
    content[352:352] = struct.pack("<ii", -(2**30), 6) + bytes(8)
    path = tmp_path / "a.nii"
    path.write_bytes(content)
    assert image_geometry(path)[0] == SHAPE
    assert not load_label(path).array_xyz.any()


def test_a_label_of_another_grid_is_refused_before_its_voxels_are_read(tmp_path: Path):
    path = tmp_path / "a.nii.gz"
    header = nib.Nifti1Image(np.zeros((500, 500, 500), np.uint8), np.eye(4)).to_bytes()[:352]
    path.write_bytes(gzip.compress(header + bytes(2**20)) + bytes(2**20))
    with pytest.raises(ImageError, match=r"the label for case has shape \(500, 500, 500\), the image has \(5, 4, 3\)"):
        load_label(path, like=Grid(SHAPE, np.eye(4), "case"))
