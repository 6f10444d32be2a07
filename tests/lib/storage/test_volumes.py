# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from lib.storage.volume_headers import ImageError
from lib.storage.volumes import load_crop, load_image

BOX = (3, 0, 5), (4, 7, 2)


def written(folder: Path, ending: str) -> Path:
    path = folder / f"scan{ending}"
    values = np.random.default_rng(0).integers(-500, 900, (9, 8, 10)).astype(np.int16)
    if ending == ".nrrd":
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values.transpose(2, 1, 0)), str(path))
        return path
    image = nib.Nifti1Image(values, np.diag([1, 2, 3, 1]))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
def test_a_crop_is_a_part_of_the_image(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, ending)
    found = load_crop(path, BOX)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, load_image(path).array_xyz[3:7, 0:7, 5:7])


def test_only_the_voxels_of_the_crop_are_checked(tmp_path: Path) -> None:
    values = np.zeros((9, 8, 10), np.float32)
    values[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "scan.nii")
    assert not load_crop(tmp_path / "scan.nii", BOX).any()
    with pytest.raises(ImageError, match=r"scan.nii: 1 voxels are NaN or infinite"):
        load_crop(tmp_path / "scan.nii", ((0, 0, 0), (2, 2, 2)))


def test_a_file_that_ends_early_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, ".nii.gz")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ImageError, match=r"scan.nii.gz: the file ends early or is damaged"):
        load_crop(path, ((0, 0, 8), (9, 8, 2)))
