# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
import warnings

import numpy as np
import pytest

from lib.dicom.segmentations import (
    WRITER,
    read_segmentation,
    referenced_series,
    segment_values,
    tracking_uid,
    write_segmentation,
)
from lib.partial_labels import LabelError
from lib.regions import Region
from tests.lib.dicom.objects import AFFINE, CLASSES, SHAPE, segmentation, series

CORNER = Region("case", (0, 0, 0), (2, 2, 2))


def label() -> np.ndarray:
    label_xyz = np.zeros(SHAPE, np.uint8)
    label_xyz[0, 1, 2] = 1
    label_xyz[4, 3, 0] = 2
    label_xyz[1:3, 0, 1] = 2
    return label_xyz


def read(item, uid, regions=(CORNER,)):
    return read_segmentation(item, uid, SHAPE, AFFINE, CLASSES, regions)


def test_segments_are_known_by_label_whatever_their_number_or_case():
    slices = series()
    uid = slices[0].SeriesInstanceUID
    swapped = np.array([0, 2, 1], np.uint8)[label()]
    label_xyz, info = read(segmentation(slices, swapped, ["POSTERIOR", "anterior"]), uid)
    np.testing.assert_array_equal(label_xyz, label())
    assert info == [{"name": "Anterior", "idx": 1}, {"name": "Posterior", "idx": 2}]


def test_renamed_segments_are_known_by_tracking_and_the_label_comes_first():
    slices = series()
    uid = slices[0].SeriesInstanceUID
    item = segmentation(slices, label(), ["Segment 1", "Segment 2"])
    assert segment_values(item, uid, CLASSES) == {}
    item.SegmentSequence[0].TrackingID = "posterior"
    item.SegmentSequence[1].TrackingUID = tracking_uid(uid, "Anterior")
    assert segment_values(item, uid, CLASSES) == {1: 2, 2: 1}
    item.SegmentSequence[0].SegmentLabel = "Anterior"
    assert segment_values(item, uid, CLASSES) == {1: 1, 2: 1}
    assert segment_values(item, "1.2.3", CLASSES) == {1: 1}


def test_frame_has_a_value_of_its_own():
    slices = series()
    frame = np.zeros(SHAPE, np.uint8)
    frame[2, 2, 2] = 1
    label_xyz, info = read(segmentation(slices, frame, ["query_region"]), slices[0].SeriesInstanceUID)
    assert label_xyz[2, 2, 2] == 3
    assert info[-1] == {"name": "query_region", "idx": 3}


def test_strangers_count_only_inside_of_the_region():
    slices = series()
    uid = slices[0].SeriesInstanceUID
    stranger = np.zeros(SHAPE, np.uint8)
    stranger[4, 3, 2] = 1
    label_xyz, _ = read(segmentation(slices, stranger, ["Tumour"]), uid)
    assert not label_xyz.any()
    stranger[1, 1, 1] = 1
    with pytest.raises(LabelError, match=r"'Tumour' \(1 voxels\).*Anterior, Posterior"):
        read(segmentation(slices, stranger, ["Tumour"]), uid)


def test_frames_along_other_axes_and_directions_land_on_their_voxels():
    slices = series()
    item = segmentation(slices, label(), ["Anterior", "Posterior"])
    # The same plane, read from its far corner: both in-plane directions are turned round.
    frames = item.pixel_array
    item.PixelData = np.packbits(frames[:, ::-1, ::-1].ravel(), bitorder="little").tobytes()
    item.PixelData += b"\0" * (len(item.PixelData) % 2)
    orientation = item.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    first = [float(v) for v in orientation.ImageOrientationPatient]
    orientation.ImageOrientationPatient = [-v for v in first]
    for group in item.PerFrameFunctionalGroupsSequence:
        place = group.PlanePositionSequence[0]
        far = np.array([float(v) for v in place.ImagePositionPatient])
        far += 4 * 2.0 * np.array(first[:3]) + 3 * 1.5 * np.array(first[3:])
        place.ImagePositionPatient = [float(v) for v in far]
    label_xyz, _ = read(item, slices[0].SeriesInstanceUID)
    np.testing.assert_array_equal(label_xyz, label())


def shifted(item):
    place = item.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    place.ImagePositionPatient = [float(v) + 0.5 for v in place.ImagePositionPatient]


def coarser(item):
    item.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [3.0, 4.0]


def turned(item):
    turn = item.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    turn.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]


def fractional(item):
    item.SegmentationType = "FRACTIONAL"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (shifted, "does not lie on the voxels"),
        (coarser, "of another spacing"),
        (turned, "turned"),
        (fractional, "FRACTIONAL; store it as BINARY"),
    ],
)
def test_what_does_not_lie_on_the_grid_is_refused(spoil, sentence):
    slices = series()
    item = segmentation(slices, label(), ["Anterior", "Posterior"])
    spoil(item)
    with pytest.raises(LabelError, match=sentence):
        read(item, slices[0].SeriesInstanceUID)


def test_written_segmentation_holds_classes_only_and_reads_back():
    slices = series()
    uid = slices[0].SeriesInstanceUID
    partial = label()
    partial[3:, :, 1:] = 255
    item = write_segmentation(partial, CLASSES, slices[::-1], 4)
    assert [s.SegmentLabel for s in item.SegmentSequence] == ["Anterior", "Posterior"]
    assert item.SegmentSequence[1].TrackingUID == tracking_uid(uid, "Posterior")
    assert item.ManufacturerModelName == WRITER
    assert referenced_series(item) == [uid]
    assert item.SOPInstanceUID != write_segmentation(partial, CLASSES, slices, 4).SOPInstanceUID
    label_xyz, _ = read(item, uid)
    np.testing.assert_array_equal(label_xyz, np.where(partial == 255, 0, partial))


def test_empty_label_makes_an_empty_segmentation():
    slices = series()
    item = write_segmentation(np.full(SHAPE, 255, np.uint8), CLASSES, slices, 1)
    label_xyz, _ = read(item, slices[0].SeriesInstanceUID)
    assert not label_xyz.any()


def test_label_of_another_shape_is_refused():
    with pytest.raises(LabelError, match=r"\(1, 1, 1\)"):
        write_segmentation(np.zeros((1, 1, 1), np.uint8), CLASSES, series(), 1)


def test_patient_facts_that_no_segmentation_may_hold_are_left_out():
    slices = series()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in slices:
            item.PatientBirthDate, item.PatientSex, item.StudyTime = "spring 1950", "female", "noon"
    item = write_segmentation(label(), CLASSES, slices, 1)
    assert not item.PatientBirthDate
    assert not item.PatientSex
    assert not item.StudyTime
    assert item.PatientID == "case_1"


def test_headers_may_lack_what_may_be_empty():
    slices = series()
    for item in slices:
        del item.PatientBirthDate, item.AccessionNumber, item.ReferringPhysicianName
    assert write_segmentation(label(), CLASSES, slices, 1).AccessionNumber == ""


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"Rows": 30000, "Columns": 30000}, "3 frames of 30000 x 30000 for 2 segments, its series has the shape"),
        ({"NumberOfFrames": 2_000_000}, "2000000 frames of"),
        ({"SharedFunctionalGroupsSequence": None}, "is damaged"),
        ({"PerFrameFunctionalGroupsSequence": []}, "is damaged"),
        ({"PixelData": b"\1"}, r"is damaged \(ValueError.*store it again"),
    ],
)
def test_damaged_segmentations_are_refused_in_one_sentence(damage, sentence):
    slices = series()
    item = segmentation(slices, label(), ["Anterior", "Posterior"])
    for keyword, value in damage.items():
        setattr(item, keyword, value)
    with pytest.raises(LabelError, match=sentence) as refused:
        read(item, slices[0].SeriesInstanceUID)
    assert "\n" not in str(refused.value)


def test_a_segmentation_that_names_no_series_belongs_to_none():
    item = segmentation(series(), label(), ["Anterior", "Posterior"])
    del item.ReferencedSeriesSequence[0].SeriesInstanceUID
    assert referenced_series(item) == [""]
    del item.ReferencedSeriesSequence
    assert referenced_series(item) == []
