# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""DICOM: valid by the attribute tables of the standard, exact there and back."""

import json
import warnings

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from highdicom._iods import IOD_MODULE_MAP, SOP_CLASS_UID_IOD_KEY_MAP
from highdicom._modules import MODULE_ATTRIBUTE_MAP

CLASSES = {"background": 0, "left kidney": 1, "kidney tumour": 2, "myocardium": 7}


def affine(turn=(0.0, 0.0, 0.0), spacing=(1.1, 0.9, 5.0), flip=(1, 1, 1), origin=(-31.25, 12.345678, 99.9)):
    a, b, c = np.deg2rad(turn)
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    out = np.eye(4)
    out[:3, :3] = rz @ ry @ rx @ np.diag(np.multiply(spacing, flip))
    out[:3, 3] = origin
    return out


@pytest.fixture
def case(tmp_path):
    """Write an image and a label of an odd shape as NIfTI; return the paths."""
    rng = np.random.default_rng(5)
    label_xyz = rng.choice(np.array([0, 0, 0, 1, 2, 7], np.uint8), size=(9, 7, 5))
    label_xyz[:, :, 3] = 0  # an empty slice: its frames are left out of the file

    def make(matrix, values_xyz=None, label_xyz=label_xyz):
        values_xyz = rng.integers(-1024, 3000, (9, 7, 5)).astype(np.int16) if values_xyz is None else values_xyz
        for kind, array in (("imagesTr", values_xyz), ("labelsTr", label_xyz)):
            (tmp_path / kind).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, matrix), tmp_path / kind / "scan_7.nii.gz")
        return tmp_path / "imagesTr" / "scan_7.nii.gz", tmp_path / "labelsTr" / "scan_7.nii.gz"

    return make


def read(out):
    slices = [pydicom.dcmread(p) for p in sorted((out / "image").glob("*.dcm"), reverse=True)]
    return slices, pydicom.dcmread(out / "seg.dcm") if (out / "seg.dcm").exists() else None


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize(
    "matrix",
    [
        affine(),
        affine(flip=(-1, -1, 1)),
        affine(flip=(-1, 1, 1)),
        affine(flip=(1, 1, -1)),
        affine((12.0, -25.0, 40.0)),
        affine((100.0, 3.0, -170.0), (0.4, 0.4, 8.8), (1, -1, 1)),
        affine()[:, [2, 0, 1, 3]],
    ],
    ids=["RAS", "LPS", "LAS", "RAI", "oblique", "oblique left-handed", "sagittal"],
)
def test_there_and_back_is_the_identity(dicom, case, tmp_path, matrix, modality):
    image, label = case(matrix)
    dicom.to_dicom(image, label, CLASSES, modality, tmp_path / "out")
    again, label_again, classes = dicom.to_nifti(*read(tmp_path / "out"))
    assert np.array_equal(again.dataobj, nib.load(image).dataobj)
    assert np.array_equal(label_again.dataobj, nib.load(label).dataobj)
    assert again.affine == pytest.approx(matrix, abs=1e-4)
    assert label_again.affine == pytest.approx(matrix, abs=1e-4)
    assert classes == {name: value for name, value in CLASSES.items() if value}


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_required_attributes_of_every_module_are_there(dicom, case, tmp_path, modality):
    files = dicom.to_dicom(*case(affine()), CLASSES, modality, tmp_path / "out")
    assert len(files) == 6
    for path in files:
        data = pydicom.dcmread(path)
        modules = [m["key"] for m in IOD_MODULE_MAP[SOP_CLASS_UID_IOD_KEY_MAP[data.SOPClassUID]] if m["usage"] == "M"]
        assert len(modules) > 8
        for module in modules:
            for attribute in MODULE_ATTRIBUTE_MAP[module]:
                if attribute["path"] or attribute["type"] not in ("1", "2"):
                    continue
                assert attribute["keyword"] in data, (module, attribute["keyword"])
                if attribute["type"] == "1":
                    assert data[attribute["keyword"]].value not in (None, ""), (module, attribute["keyword"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a value that its representation does not allow
            for element in data.iterall():
                pydicom.dataelem.DataElement(element.tag, element.VR, element.value)
        assert data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID
        assert all(
            len(uid) <= 64 and pydicom.uid.UID(uid).is_valid for uid in (data.SOPInstanceUID, data.SeriesInstanceUID)
        )


def test_values_of_one_slice_by_hand(dicom, case, tmp_path):
    image, label = case(affine(spacing=(1.5, 2.0, 8.0), origin=(-30.0, 20.0, 10.0)))
    dicom.to_dicom(image, label, CLASSES, "CT", tmp_path / "out")
    slices, _ = read(tmp_path / "out")
    third = next(s for s in slices if s.InstanceNumber == 3)
    assert (third.Rows, third.Columns) == (7, 9)
    assert [float(v) for v in third.ImagePositionPatient] == [30.0, -20.0, 26.0]
    assert [float(v) for v in third.ImageOrientationPatient] == [-1, 0, 0, 0, -1, 0]
    assert [float(v) for v in third.PixelSpacing] == [2.0, 1.5]  # between rows, between columns
    assert float(third.SliceThickness) == 8.0
    values = np.asarray(nib.load(image).dataobj)
    assert third.pixel_array[4, 6] * third.RescaleSlope + third.RescaleIntercept == values[6, 4, 2]
    assert len({s.StudyInstanceUID for s in slices}) == len({s.SeriesInstanceUID for s in slices}) == 1
    assert len({s.SOPInstanceUID for s in slices}) == 5


def test_segments_are_coded_and_trackable(dicom, case, tmp_path):
    dicom.to_dicom(*case(affine()), CLASSES, "MR", tmp_path / "out")
    slices, found = read(tmp_path / "out")
    segmentation = hd.seg.segread(tmp_path / "out" / "seg.dcm")
    kidney, tumour, muscle = segmentation.SegmentSequence
    assert [s.SegmentLabel for s in (kidney, tumour, muscle)] == ["left kidney", "kidney tumour", "myocardium"]
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert tumour.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert muscle.SegmentedPropertyTypeCodeSequence[0].CodeValue == "74281007"
    assert len({s.TrackingUID for s in segmentation.SegmentSequence}) == 3
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert found.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert found.StudyInstanceUID == slices[0].StudyInstanceUID


def test_same_case_same_bytes_other_voxels_other_uids(dicom, case, tmp_path):
    paths = case(affine())
    one, two = (dicom.to_dicom(*paths, CLASSES, "MR", tmp_path / name, "set") for name in ("a", "b"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    image, _ = case(affine())  # the generator advances: other voxels
    (other, *_) = dicom.to_dicom(image, None, {}, "MR", tmp_path / "c", "set")
    assert pydicom.dcmread(other).SeriesInstanceUID != pydicom.dcmread(one[0]).SeriesInstanceUID


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        (np.arange(315).reshape(9, 7, 5) * 7919.0, True),  # a gain, as phantoms of the hippocampus have
        (np.linspace(-0.25, 1.5, 315).reshape(9, 7, 5), False),
        (np.full((9, 7, 5), 3.5), True),
        (np.full((9, 7, 5), -7.0), True),
    ],
    ids=["gain", "fractions", "constant", "negative constant"],
)
def test_uncommon_values(dicom, case, tmp_path, values, exact):
    image, _ = case(affine(), values.astype(np.float32))
    dicom.to_dicom(image, None, {}, "MR", tmp_path / "out")
    again, none, _ = dicom.to_nifti(*read(tmp_path / "out"))
    assert none is None
    step = 0 if exact else (values.max() - values.min()) / 65_535
    assert np.abs(np.asarray(again.dataobj) - values.astype(np.float32)).max() <= 0.51 * step + 1e-6


def test_an_empty_label_stays_empty(dicom, case, tmp_path):
    image, label = case(affine(), label_xyz=np.zeros((9, 7, 5), np.uint8))
    dicom.to_dicom(image, label, CLASSES, "MR", tmp_path / "out")
    _, again, _ = dicom.to_nifti(*read(tmp_path / "out"))
    assert again.shape == (9, 7, 5)
    assert not np.asarray(again.dataobj).any()


def test_what_cannot_be_expressed_is_refused_and_nothing_written(dicom, case, tmp_path):
    shear = affine()
    shear[0, 1] = 0.3
    wrong = np.zeros((9, 7, 5), np.uint8)
    partial, unknown = wrong.copy(), wrong.copy()
    partial[2, 2, 2], unknown[1, 1, 1] = 255, 3
    nan = np.zeros((9, 7, 5), np.float32)
    nan[0, 0, 0] = np.nan
    for arguments, words in (
        ((affine(), None, partial), "1 unlabelled voxels"),
        ((affine(), None, unknown), "label value 3"),
        ((affine(), None, wrong[:8]), "use one grid"),
        ((shear,), "sheared"),
        ((affine(), nan), "NaN"),
    ):
        image, label = case(*arguments)
        with pytest.raises(dicom.DicomError, match=words):
            dicom.to_dicom(image, label, CLASSES, "MR", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_incomplete_series_are_refused(dicom, case, tmp_path):
    dicom.to_dicom(*case(affine()), CLASSES, "MR", tmp_path / "out")
    slices, segmentation = read(tmp_path / "out")
    with pytest.raises(dicom.DicomError, match="missing, doubled or uneven"):
        dicom.to_nifti([s for s in slices if s.InstanceNumber != 3], segmentation)
    with pytest.raises(dicom.DicomError, match="missing, doubled or uneven"):
        dicom.to_nifti([*slices, slices[0]], segmentation)
    with pytest.raises(dicom.DicomError, match="off the grid"):
        dicom.to_nifti([s for s in slices if s.InstanceNumber != 1], segmentation)


def test_folder_there_and_back(dicom, phantoms, tmp_path, capsys):
    arguments = ["--preset", "kits", "--spacing", "8,8,12", "--cases", "2", "--pathology", "1"]
    assert phantoms.main([str(tmp_path / "nifti"), *arguments]) == 0
    assert dicom.main(["to-dicom", str(tmp_path / "nifti"), str(tmp_path / "dicom")]) == 0
    first = pydicom.dcmread(tmp_path / "dicom" / "kits_001" / "image" / "0001.dcm")
    assert (first.Modality, first.RescaleType, first.PatientID) == ("CT", "HU", "kits_001")
    (tmp_path / "dicom" / "README.txt").write_text("not DICOM")
    assert dicom.main(["to-nifti", str(tmp_path / "dicom"), str(tmp_path / "again")]) == 0
    for path in sorted((tmp_path / "nifti").glob("*Tr/*.nii.gz")):
        one, two = nib.load(path), nib.load(tmp_path / "again" / path.relative_to(tmp_path / "nifti"))
        assert np.array_equal(one.dataobj, two.dataobj)
        assert two.affine == pytest.approx(one.affine, abs=1e-4)
    labels = [json.loads((tmp_path / d / "dataset.json").read_text())["labels"] for d in ("nifti", "again")]
    assert labels[0] == labels[1]
    assert dicom.main(["to-nifti", str(tmp_path / "dicom"), str(tmp_path / "again")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert dicom.main(["to-dicom", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert "dataset.json cannot be read" in capsys.readouterr().err
