# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Result files of inference: the same voxels on the same grid, for any orientation of a scan."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from lib.adapters.infer_tasks import write_result

GRIDS = {
    "axial": np.diag([-0.5, -0.5, 3, 1]),
    "sagittal": np.array([[0, 0, -3, 7], [-0.5, 0, 0, 8], [0, 0.5, 0, 9], [0, 0, 0, 1]]),
    "coronal": np.array([[-0.5, 0, 0, 7], [0, 0, 3, 8], [0, 0.5, 0, 9], [0, 0, 0, 1]]),
    "oblique": np.array([[-1.2, 0, 2.4, -10], [-1.6, 0, -1.8, 20], [0, -1.5, 0, 30], [0, 0, 0, 1]]),
}


def label() -> np.ndarray:
    label_xyz = np.zeros((5, 6, 4), np.uint8)
    label_xyz[0, 1, 2], label_xyz[4, 5, 3] = 1, 2
    return label_xyz


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", None])
@pytest.mark.parametrize("grid", list(GRIDS))
def test_nifti_keeps_the_grid_of_the_image(grid: str, ending: str | None) -> None:
    request = {"image": "/studies/scan.nii.gz"} | ({"result_extension": ending} if ending else {})
    path = write_result(label(), GRIDS[grid], request)
    assert path.endswith(ending or ".nii.gz")
    found = nib.load(path)
    np.testing.assert_array_equal(np.asarray(found.dataobj), label())
    np.testing.assert_allclose(found.affine, GRIDS[grid], atol=1e-6)
    assert found.get_data_dtype() == np.uint8


@pytest.mark.parametrize("grid", list(GRIDS))
def test_nrrd_keeps_the_grid_of_the_image(grid: str) -> None:
    path = write_result(label(), GRIDS[grid], {"image": "/studies/scan.nii.gz", "result_extension": ".nrrd"})
    image = SimpleITK.ReadImage(path)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).transpose(), label())
    for voxel in ((0, 0, 0), (4, 1, 2)):
        # NRRD counts towards the patient's left and back, the affine to the right and front.
        expected = (GRIDS[grid] @ [*voxel, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(voxel), expected, atol=1e-5)
