# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A label map as a DICOM segmentation with coded, trackable segments, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from dicom_parts.names import repeatable_uid, structure_codes
from dicom_parts.series import DicomError, Grid

UNLABELLED = 255
_ID = "class id "
_OFF_GRID_MM = 0.1


def write_segmentation(
    label_xyz: NDArray[np.uint8], classes: Mapping[str, int], slices: Sequence[Dataset], key: str
) -> Dataset:
    """A binary segmentation over the series of `slices`: one segment per class, in the order of their ids.

    Raises:
        DicomError: voxels that are unlabelled (255) or of a class without a name, another shape than the series.
    """
    case = str(slices[0].PatientID)
    named = {name: value for name, value in classes.items() if value != 0}
    unlabelled = int(np.count_nonzero(label_xyz == UNLABELLED))
    if unlabelled:
        raise DicomError(
            f"{case} holds {unlabelled} unlabelled voxels ({UNLABELLED}); as background they would lie: "
            "annotate the whole volume or leave its label out"
        )
    unknown = sorted(set(np.unique(label_xyz).tolist()) - {0, *named.values()})
    if unknown:
        raise DicomError(f"{case} holds label value {unknown[0]}; dataset.json names only {sorted(named.values())}")
    size = (int(slices[0].Columns), int(slices[0].Rows), len(slices))
    if label_xyz.shape != size:
        raise DicomError(f"{case}: the label has shape {label_xyz.shape} but its series has {size}; use one grid")
    ranked = sorted(named.items(), key=lambda item: item[1])
    lookup = np.zeros(256, np.uint8)
    for number, (_, value) in enumerate(ranked, start=1):
        lookup[value] = number
    frames_zyx = np.ascontiguousarray(lookup[label_xyz].transpose(2, 1, 0))
    segmentation = hd.seg.Segmentation(
        source_images=list(slices),
        pixel_array=frames_zyx,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_described(n, name, value, key) for n, (name, value) in enumerate(ranked, start=1)],
        series_instance_uid=repeatable_uid(key, "segmentation series"),
        series_number=100,
        sop_instance_uid=repeatable_uid(key, "segmentation"),
        instance_number=1,
        manufacturer="Patchwise",
        manufacturer_model_name="patchwise sample-datasets",
        software_versions="1",
        device_serial_number="1",
        content_label="SEGMENTATION",
        content_description="Labels of a sample dataset",
        # All frames of an empty map would be left out, and then nothing would be left.
        omit_empty_frames=bool(frames_zyx.any()),
    )
    for item in segmentation.SegmentSequence:
        item.SegmentDescription = f"{_ID}{ranked[int(item.SegmentNumber) - 1][1]}"
    _repeatable(segmentation, key)
    return segmentation


def read_segmentation(segmentation: Dataset, grid: Grid) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Label map (X, Y, Z) on the grid of the segmented series, and class names with their ids.

    Frames are placed by their position; where segments overlap, the later one counts.

    Raises:
        DicomError: a fractional segmentation, frames that lie off the grid of the series.
    """
    case = str(segmentation.get("PatientID", "?"))
    if segmentation.SegmentationType != "BINARY":
        raise DicomError(
            f"the segmentation of {case} is {segmentation.SegmentationType}; only BINARY can be a label map"
        )
    classes = {str(s.SegmentLabel): _class_id(s) for s in segmentation.SegmentSequence}
    ids = {int(s.SegmentNumber): _class_id(s) for s in segmentation.SegmentSequence}
    label_xyz = np.zeros(grid.size, np.uint8)
    frames = segmentation.pixel_array
    frames = frames[None] if frames.ndim == 2 else frames
    to_voxel = np.linalg.inv(grid.affine)
    spacing = np.linalg.norm(grid.affine[:3, :3], axis=0)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for frame_yx, facts in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        place = _group(facts, shared, "PlanePositionSequence").ImagePositionPatient
        turn = [float(v) for v in _group(facts, shared, "PlaneOrientationSequence").ImageOrientationPatient]
        x, y, z = (float(v) for v in place)
        voxel = to_voxel @ [-x, -y, z, 1]
        k = round(float(voxel[2]))
        off = float(np.abs((voxel[:3] - [0, 0, k]) * spacing).max())
        axes = np.array([turn[:3], turn[3:]]) * [-1, -1, 1]
        askew = np.abs(axes.T - grid.affine[:3, :2] / spacing[:2]).max() > 1e-3
        if off > _OFF_GRID_MM or askew or not 0 <= k < grid.size[2] or frame_yx.T.shape != grid.size[:2]:
            raise DicomError(f"the segmentation of {case} has a frame off the grid of its series; resample it first")
        number = int(_group(facts, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        label_xyz[:, :, k][frame_yx.T > 0] = ids[number]
    return label_xyz, classes


def _repeatable(segmentation: Dataset, key: str) -> None:
    """Replace the time of the conversion and a random UID: the same input shall give the same file."""
    for kind, value in (("Date", "20000101"), ("Time", "120000")):
        for what in ("Content", "Series", "InstanceCreation"):
            if what + kind in segmentation:
                setattr(segmentation, what + kind, value)
    organization = repeatable_uid(key, "dimensions")
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization


def _described(number: int, name: str, value: int, key: str) -> hd.seg.SegmentDescription:
    category, kind, side = structure_codes(name)
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        tracking_uid=repeatable_uid(key, "segment", str(value)),
        tracking_id=f"{name[:55]} {value}",
    )
    if side is not None:
        described.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [_coded(side)]
    return described


def _coded(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _class_id(segment: Dataset) -> int:
    """The id written into the description, else the segment's own number."""
    text = str(segment.get("SegmentDescription", ""))
    tail = text.removeprefix(_ID)
    return int(tail) if text.startswith(_ID) and tail.isdigit() else int(segment.SegmentNumber)


def _group(facts: Dataset, shared: Dataset, name: str) -> Dataset:
    """A functional group of a frame, from its own list or from the one that all frames share."""
    holder = facts if name in facts else shared
    item: Dataset = holder[name].value[0]
    return item
