# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The grid that this app and the referee find in a file is ITK's, by which 3D Slicer places it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from eval.errors import RefereeError
from eval.protocol.volumes import read_affine, read_volume
from lib.storage.readers import why_unopenable
from lib.storage.volumes import (
    ImageError,
    check_image,
    image_geometry,
    image_grid,
    load_image,
    load_label,
)

AFFINE = np.array([[-1, 0, 0, 10], [0, -1.5, 0, 20], [0, 0, 2, -30], [0, 0, 0, 1.0]])
SHAPE = (7, 6, 5)
VALUES = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def turned(angle: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


def sheared(cosine: float) -> np.ndarray:
    shear = np.eye(4)
    shear[0, 1] = cosine
    return shear


def of_itk(path: Path) -> np.ndarray:
    """Affine to RAS of a file in ITK."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


def nifti(path: Path, qform=None, sform=None, codes=(1, 1), unit="mm", values=VALUES, pixdim=None) -> Path:
    image = nib.Nifti1Image(values, None)
    image.header.set_xyzt_units(unit)
    for set_form, form, code in ((image.set_qform, qform, codes[0]), (image.set_sform, sform, codes[1])):
        set_form(form, code if form is not None else 0)
    if pixdim:
        image.header["pixdim"][1:4] = pixdim
    nib.save(image, path)
    return path


NIFTIS = {
    "codes 0": {},
    "codes 0 with sizes": {"pixdim": (0.7, 0.8, 3)},
    "qform alone": {"qform": AFFINE},
    "qform of an oblique scan": {"qform": turned(0.7) @ AFFINE},
    "sform alone": {"sform": AFFINE, "pixdim": (1, 1.5, 2)},
    "sform of another scale": {"sform": AFFINE, "pixdim": (3, 3, 3)},
    "registered": {"qform": AFFINE, "sform": turned(0.2) @ AFFINE, "codes": (1, 2)},
    "registered to a template": {"qform": AFFINE, "sform": turned(0.2) @ AFFINE, "codes": (1, 4)},
    "mirrored": {"qform": AFFINE, "sform": np.diag([-1, 1, 1, 1]) @ AFFINE},
    "scaled by a registration": {"qform": AFFINE, "sform": np.diag([1.2, 1, 1, 1]) @ AFFINE},
    "sheared by a registration": {"qform": AFFINE, "sform": sheared(0.3) @ AFFINE},
    "hardly sheared": {"qform": AFFINE, "sform": sheared(1e-5) @ AFFINE},
    "micrometres": {"qform": AFFINE, "sform": AFFINE, "unit": "micron"},
    "metres": {"qform": AFFINE, "sform": AFFINE, "unit": "meter"},
    "no unit": {"qform": AFFINE, "sform": AFFINE, "unit": "unknown"},
    "one slice": {"qform": turned(0.3) @ AFFINE, "sform": turned(0.3) @ AFFINE, "values": VALUES[..., :1]},
    "one time point": {"qform": AFFINE, "sform": AFFINE, "values": VALUES[..., None]},
}


@pytest.mark.parametrize("case", NIFTIS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti(tmp_path, case, ending):
    path = nifti(tmp_path / f"a{ending}", **NIFTIS[case])
    found = load_image(path)
    np.testing.assert_allclose(found.affine, of_itk(path), atol=1e-9)
    np.testing.assert_allclose(found.spacing, sitk.ReadImage(str(path)).GetSpacing(), rtol=1e-6)
    np.testing.assert_array_equal(found.array_xyz, NIFTIS[case].get("values", VALUES).reshape(found.shape))
    np.testing.assert_array_equal(read_affine(path), found.affine)
    np.testing.assert_array_equal(read_volume(path).affine, found.affine)
    # A label that 3D Slicer draws over it lies on the same grid.
    image = sitk.ReadImage(str(path))
    label = sitk.GetImageFromArray(np.zeros(image.GetSize()[::-1], np.uint8))
    label.CopyInformation(image)
    for name in ("l.nii.gz", "l.nrrd", "l.mha"):
        sitk.WriteImage(label, str(tmp_path / name))
        load_label(tmp_path / name, like=image_grid(path, "a"))
    assert read_volume(path).shares_grid(read_volume(tmp_path / "l.nii.gz"))


@pytest.mark.parametrize(
    "case", ["codes 0", "registered", "mirrored", "scaled by a registration", "sheared by a registration"]
)
def test_a_label_made_with_nibabel_has_the_voxels_of_its_image(tmp_path, case):
    path = nifti(tmp_path / "a.nii", **NIFTIS[case])
    nib.save(nib.Nifti1Image((VALUES % 3).astype(np.uint8), nib.load(path).affine), tmp_path / "l.nii.gz")
    assert np.array_equal(load_label(tmp_path / "l.nii.gz", like=image_grid(path, "a")).array_xyz, VALUES % 3)
    assert read_volume(path).shares_grid(read_volume(tmp_path / "l.nii.gz", placed=False))
    moved = nib.load(path).affine.copy()
    moved[0, 3] += 1
    nib.save(nib.Nifti1Image((VALUES % 3).astype(np.uint8), moved), tmp_path / "moved.nii.gz")
    with pytest.raises(ImageError, match=r"moved.nii.gz: the affine of the label for a differs"):
        load_label(tmp_path / "moved.nii.gz", like=image_grid(path, "a"))


def test_a_nifti_that_itk_cannot_place_is_refused_with_the_remedy(tmp_path):
    path = nifti(tmp_path / "sheared.nii.gz", sform=sheared(0.3) @ AFFINE, pixdim=(1, 1.5, 2))
    for read in (load_image, image_geometry, check_image):
        with pytest.raises(ImageError, match=r"^sheared.nii.gz: neither its qform nor its sform .* resample"):
            read(path)
    with pytest.raises(RefereeError, match=r"sheared.nii.gz: ITK, and so 3D Slicer, cannot place it"):
        read_volume(path)


def test_what_3d_slicer_cannot_open_is_named(tmp_path):
    nib.save(nib.Nifti2Image(VALUES, AFFINE), tmp_path / "two.nii.gz")
    nrrd.write(str(tmp_path / "b.nrrd"), VALUES, {"space": "LPS", "encoding": "bzip2", **FIELDS})
    nifti(tmp_path / "one.nii.gz", AFFINE, AFFINE)
    assert "save the image as NIfTI-1" in str(why_unopenable(tmp_path / "two.nii.gz"))
    assert "gzip" in str(why_unopenable(tmp_path / "b.nrrd"))
    assert why_unopenable(tmp_path / "one.nii.gz") is None
    np.testing.assert_allclose(load_label(tmp_path / "two.nii.gz").affine, AFFINE)


FIELDS = {"space directions": np.diag([1, 1.5, 2]), "space origin": [10.0, 20, -30]}
NRRDS = {
    **{
        space: {"space": space, **FIELDS}
        for space in (
            *("LPS", "LAS", "RAS", "left-posterior-superior", "left-anterior-superior", "right-anterior-superior"),
            *("scanner-xyz", "3D-right-handed"),
        )
    },
    "spacings": {"spacings": [1, 1.5, 2.0]},
    "spacings and minima": {"spacings": [1, 1.5, 2.0], "axis mins": [5, 6, 7]},
    "no geometry": {},
    "no origin": {"space": "RAS", "space directions": np.diag([1, 1.5, 2])},
    "a dimension for a space": {"space dimension": 3, **FIELDS},
    "oblique": {"space": "LPS", "space directions": (turned(0.4)[:3, :3] @ np.diag([1, 1.5, 2])).T},
    "flipped axes": {"space": "RAS", "space directions": np.diag([-1, -1.5, 2]), "space origin": [1, 2, 3]},
    "permuted axes": {"space": "LPS", "space directions": np.diag([1, 1.5, 2])[[2, 0, 1]], "space origin": [1, 2, 3]},
    "comments and units": {"space": "LPS", **FIELDS, "space units": ["mm"] * 3, "kinds": ["domain"] * 3, "note": "x"},
}


@pytest.mark.parametrize("case", NRRDS)
@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2"])
def test_nrrd(tmp_path, case, encoding):
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), VALUES, {"encoding": "gzip", **NRRDS[case]})
    expected = of_itk(path)
    nrrd.write(str(path), VALUES, {**NRRDS[case], "encoding": encoding})
    found = load_image(path)
    np.testing.assert_allclose(found.affine, expected, atol=1e-12)
    np.testing.assert_array_equal(found.array_xyz, VALUES)
    assert load_label(path, like=image_grid(path, "a")).array_xyz.dtype == np.uint8


def test_right_anterior_superior_is_what_the_format_says(tmp_path):
    """One of the spellings by hand, so that no reader is its own witness."""
    for space, sign in (("RAS", (1, 1, 1)), ("LAS", (-1, 1, 1)), ("LPS", (-1, -1, 1))):
        nrrd.write(str(tmp_path / "a.nrrd"), VALUES, {"space": space, **FIELDS})
        expected = np.diag([*np.multiply(sign, (1, 1.5, 2)), 1.0])
        expected[:3, 3] = np.multiply(sign, (10, 20, -30))
        np.testing.assert_allclose(image_geometry(tmp_path / "a.nrrd")[1], expected)


def test_a_list_of_one_is_a_volume_and_a_list_of_two_is_none(tmp_path):
    listed = {
        "space": "LPS",
        "kinds": ["list", *["domain"] * 3],
        "space directions": np.vstack([[np.nan] * 3, np.diag([1, 1.5, 2])]),
    }
    nrrd.write(str(tmp_path / "one.nrrd"), VALUES[None], listed)
    nrrd.write(str(tmp_path / "two.nrrd"), np.stack([VALUES] * 2), listed)
    np.testing.assert_array_equal(load_image(tmp_path / "one.nrrd").array_xyz, VALUES)
    for read in (load_image, load_label, image_geometry):
        with pytest.raises(ImageError, match=r"two.nrrd: each voxel holds 2 values, expected one"):
            read(tmp_path / "two.nrrd")


def test_a_sheared_nrrd_is_refused(tmp_path):
    nrrd.write(
        str(tmp_path / "a.nrrd"), VALUES, {"space": "LPS", "space directions": [[1, 0, 0], [0.3, 1, 0], [0, 0, 2]]}
    )
    with pytest.raises(ImageError, match=r"a.nrrd: its axes are not at right angles; resample"):
        image_geometry(tmp_path / "a.nrrd")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_meta_image(tmp_path, packed, dtype):
    image = sitk.GetImageFromArray(VALUES.T.astype(dtype))
    image.SetSpacing((1, 1.5, 2))
    image.SetOrigin((3, 4, 5))
    image.SetDirection(turned(0.3)[:3, :3].ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "a.mha"), packed)
    found = load_image(tmp_path / "a.mha")
    np.testing.assert_array_equal(found.array_xyz, VALUES.astype(dtype))
    np.testing.assert_allclose(found.affine, of_itk(tmp_path / "a.mha"), atol=1e-12)
    content = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(content[: len(content) - 40])
    with pytest.raises(ImageError, match=r"a.mha: the (file ends early|voxels are damaged)"):
        load_image(tmp_path / "a.mha")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"ElementDataFile = LOCAL", b"ElementDataFile = x.raw", "do not follow its header"),
        (b"BinaryData = True", b"BinaryData = False", "do not follow its header"),
        (b"NDims = 3", b"HeaderSize = -1\nNDims = 3", "do not follow its header"),
        (b"DimSize = 7 6 5", b"DimSize = 7 6 50000", "ends early"),
        (b"DimSize = 7 6 5", b"DimSize = 7 6 5000000000", "voxels, at most"),
        (b"DimSize = 7 6 5", b"DimSize = 7 -6 5", "found shape"),
        (b"MET_SHORT", b"MET_STRING", "not readable as MetaImage"),
    ],
)
def test_meta_image_headers_are_checked(tmp_path, old, new, said):
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(VALUES.T), str(path))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ImageError, match=f"a.mha: .*{said}"):
        load_image(path)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        (
            "odd.nrrd",
            b"NRRD0005\ntype: float\ndimension: 3\nsizes: 2 2 2\nspace: left-posterior-inferior\nencoding: raw\n\n"
            + bytes(32),
            'couldn\'t parse space "left-posterior-inferior"',
        ),
        (
            "odd.mha",
            b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_FOO\nElementDataFile = LOCAL\n"
            + bytes(32),
            "'MET_FOO'",
        ),
    ],
)
def test_a_refusal_holds_the_cause_and_no_place_in_the_source_of_itk(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError) as refused:
        load_image(tmp_path / name)
    message = str(refused.value)
    assert message.startswith(f"{name}: ")
    assert "::ERROR" not in message
    assert "/" not in message
    assert cause in message
