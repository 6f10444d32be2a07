# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""DICOM objects small enough to compute by hand: oblique MR series and segmentations of them."""

from __future__ import annotations

import copy

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

# Rows run along (0.6, 0.8, 0), columns down (0, 0, -1): their cross product is (-0.8, 0.6, 0).
ROW, COLUMN, NORMAL = np.array([0.6, 0.8, 0]), np.array([0, 0, -1.0]), np.array([-0.8, 0.6, 0])
FIRST = np.array([10.0, -20.0, 30.0])
ACROSS, DOWN, STEP = 2.0, 1.5, 3.0
SHAPE = (5, 4, 3)
# The same in RAS: x and y change their signs.
AFFINE = np.array([[-1.2, 0, 2.4, -10], [-1.6, 0, -1.8, 20], [0, -1.5, 0, 30], [0, 0, 0, 1]])
CLASSES = {"Anterior": 1, "Posterior": 2}


def values() -> np.ndarray:
    """Stored values (X, Y, Z), all different."""
    return np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)


def series(patient: str = "case_1", study: str | None = None, slope: float = 2, intercept: float = -7) -> list[Dataset]:
    """The slices in the order of z; value = slope * stored + intercept."""
    stored_xyz = values()
    common = Dataset()
    common.SOPClassUID = MRImageStorage
    common.PatientID = common.PatientName = patient
    common.PatientBirthDate = common.PatientSex = common.AccessionNumber = common.StudyID = ""
    common.StudyDate, common.StudyTime, common.ReferringPhysicianName = "20000101", "120000", ""
    common.StudyInstanceUID, common.SeriesInstanceUID = study or generate_uid(), generate_uid()
    common.FrameOfReferenceUID, common.PositionReferenceIndicator = generate_uid(), ""
    common.Modality, common.Manufacturer, common.SeriesNumber = "MR", "", 1
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.Columns, common.Rows = SHAPE[:2]
    common.BitsAllocated = common.BitsStored = 16
    common.HighBit, common.PixelRepresentation = 15, 0
    common.RescaleSlope, common.RescaleIntercept = slope, intercept
    common.PixelSpacing = [DOWN, ACROSS]
    common.SliceThickness = STEP
    common.ImageOrientationPatient = [*ROW, *COLUMN]
    slices = []
    for k in range(SHAPE[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        item = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
        item.update(copy.deepcopy(common))
        item.is_little_endian, item.is_implicit_VR = True, False
        item.SOPInstanceUID, item.InstanceNumber = meta.MediaStorageSOPInstanceUID, k + 1
        item.ImagePositionPatient = [float(v) for v in FIRST + k * STEP * NORMAL]
        item.PixelData = np.ascontiguousarray(stored_xyz[:, :, k].T).tobytes()
        slices.append(item)
    return slices


def segmentation(slices: list[Dataset], label_xyz: np.ndarray, names: list[str], **changes: object) -> Dataset:
    """Segmentation of an annotator's program: segment n is value n of `label_xyz`."""
    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=Code("123037004", "SCT", "Anatomical Structure"),
            segmented_property_type=Code("91723000", "SCT", "Anatomical structure"),
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(names, start=1)
    ]
    item = hd.seg.Segmentation(
        source_images=slices,
        pixel_array=np.ascontiguousarray(label_xyz.transpose(2, 1, 0)).astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Somebody",
        manufacturer_model_name="Viewer",
        software_versions="1",
        device_serial_number="1",
        omit_empty_frames=bool(label_xyz.any()),
    )
    for keyword, value in changes.items():
        setattr(item, keyword, value)
    return item
