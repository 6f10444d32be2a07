# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The server places frames and takes labels on the grid that 3D Slicer shows."""

from __future__ import annotations

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from tests.system.files.conftest import AFFINE, INFO, ras, save, scan, stored, truth

TURNED = np.eye(4)
TURNED[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
SPACES = ("LPS", "LAS", "RAS", "left-anterior-superior")


def nifti(folder, name, qform, sform):
    image = nib.Nifti1Image(scan(), AFFINE)
    image.set_qform(*qform)
    image.set_sform(*sform)
    nib.save(image, folder / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def world(tmp_path_factory, serve):
    folder = tmp_path_factory.mktemp("grids") / "studies"
    folder.mkdir()
    nifti(folder, "codes", (None, 0), (None, 0))
    nifti(folder, "registered", (AFFINE, 1), (TURNED @ AFFINE, 2))
    nifti(folder, "scaled", (AFFINE, 1), (np.diag([1.1, 1, 1, 1]) @ AFFINE, 2))
    for space in SPACES:
        fields = {"space": space, "space directions": np.diag([1, 1.5, 2]), "space origin": [10.0, 20, -30]}
        nrrd.write(str(folder / f"{space}.nrrd"), scan(), fields)
    nrrd.write(str(folder / "spacings.nrrd"), scan(), {"spacings": [1, 1.5, 2.0]})
    image = sitk.GetImageFromArray(scan().T)
    image.SetSpacing((1, 1.5, 2))
    sitk.WriteImage(image, str(folder / "meta.mha"), True)
    return serve(folder)


@pytest.mark.parametrize("name", ["codes", "registered", "scaled", *SPACES, "spacings", "meta"])
def test_frames_and_labels_lie_where_the_client_sees_the_image(world, tmp_path, name):
    world.ask(batch=50, n_per_image=1, size=[8, 8, 8], request_id="all")
    image = sitk.ReadImage(str(next(world.studies.glob(f"{name}.*"))))
    assert np.abs(ras(world.infer("query_region", name, tmp_path)) - ras(image)).max() < 1e-5
    label = sitk.GetImageFromArray(np.ascontiguousarray(truth(scan()).T))
    label.CopyInformation(image)
    sitk.WriteImage(label, str(tmp_path / "l.nii.gz"))
    reply = world.submit(name, tmp_path / "l.nii.gz", INFO, whole=True)
    assert reply.status_code == 200, reply.text
    np.testing.assert_array_equal(stored(world.studies, name), truth(scan()))
    kept = sitk.ReadImage(str(world.studies / "labels" / "final" / f"{name}.nii.gz"))
    assert np.abs(ras(kept) - ras(image)).max() < 1e-4


def test_a_moved_label_is_refused_with_the_name_that_was_sent(world, tmp_path):
    path = save(tmp_path / "moved.nii.gz", truth(scan()), TURNED @ AFFINE)
    reply = world.submit("LPS", path, INFO, whole=True)
    assert reply.status_code == 400
    assert "the affine of the label for LPS differs from the image's by up to" in reply.text
