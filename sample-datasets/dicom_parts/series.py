# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A volume as a series of single-frame CT or MR images, and back, on exactly the same grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import DSfloat

from dicom_parts.names import repeatable_uid

# RAS millimetres (NIfTI) to LPS millimetres (DICOM) and back.
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
STORAGE = {"CT": CTImageStorage, "MR": MRImageStorage}
_SHEAR, _UNEVEN_MM = 1e-4, 1e-2
_VERSION = "patchwise sample-datasets"


class DicomError(ValueError):
    """Input that cannot be converted; the message names the problem and the remedy."""


@dataclass(frozen=True)
class Grid:
    """Voxel grid of a series: affine of (column, row, slice) to RAS mm, and its size in that order."""

    affine: NDArray[np.float64]
    size: tuple[int, int, int]


def write_series(
    values_xyz: NDArray[Any], affine: NDArray[np.float64], case: str, modality: str, key: str
) -> list[FileDataset]:
    """One dataset per slice: x runs along the columns, y along the rows, z over the slices.

    Orientation, position, spacing and values equal the affine and the array exactly. Whole numbers are stored unchanged
    (with an intercept or common factor if necessary); fractions are stored in 65,535 steps.

    Raises:
        DicomError: a sheared affine, values that are NaN or infinite, another modality than CT or MR.
    """
    if modality not in STORAGE:
        raise DicomError(f"{case}: modality {modality} cannot be written; choose CT or MR")
    if values_xyz.ndim != 3:
        raise DicomError(f"{case} has shape {values_xyz.shape}; an image with three axes is needed")
    if not np.isfinite(values_xyz).all():
        raise DicomError(f"{case} holds values that are NaN or infinite; repair the image")
    lps = FLIP @ affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / steps
    if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR:
        raise DicomError(
            f"{case} has an affine with sheared axes, which DICOM slices cannot express; resample it first"
        )
    stored_xyz, slope, intercept = _stored(values_xyz, modality)
    common = _common(case, modality, key)
    if (slope, intercept) != (1.0, 0.0) or modality == "CT":
        common.RescaleIntercept, common.RescaleSlope = _ds(intercept), _ds(slope)
        common.RescaleType = "HU" if modality == "CT" else "US"
    common.PixelSpacing = [_ds(steps[1]), _ds(steps[0])]
    common.SliceThickness = common.SpacingBetweenSlices = _ds(steps[2])
    common.ImageOrientationPatient = [_ds(v) for v in (*axes[:, 0], *axes[:, 1])]
    common.Columns, common.Rows = stored_xyz.shape[:2]
    low, high = float(values_xyz.min()), float(values_xyz.max())
    common.WindowCenter, common.WindowWidth = _ds(round((low + high) / 2, 3)), _ds(max(1.0, round(high - low, 3)))
    if modality == "CT":
        common.WindowCenter, common.WindowWidth = _ds(40.0), _ds(400.0)
    return [_slice(common, stored_xyz[:, :, k], lps, k, key) for k in range(stored_xyz.shape[2])]


def read_series(slices: Sequence[Dataset]) -> tuple[NDArray[Any], Grid, list[Dataset]]:
    """Values (X, Y, Z), their grid, and the slices in its order.

    The order is that of the instance numbers where the slices lie evenly in it, else that of their positions.

    Raises:
        DicomError: slices of several sizes or orientations, missing or doubled slices, colour images.
    """
    ordered, grid = series_grid(slices)
    if any(int(s.get("SamplesPerPixel", 1)) != 1 for s in ordered):
        raise DicomError(f"{_of(ordered[0])} holds colour images; only grey ones can be a scan")
    stacked = np.stack([_rescaled(s) for s in ordered], axis=-1)
    return _narrow(stacked.transpose(1, 0, 2)), grid, ordered


def series_grid(slices: Sequence[Dataset]) -> tuple[list[Dataset], Grid]:
    """The slices in order and the grid they lie on; see `read_series`."""
    first = slices[0]
    facts = {(int(s.Rows), int(s.Columns), tuple(np.round([float(v) for v in s.PixelSpacing], 5))) for s in slices}
    turns = np.array([[float(v) for v in s.ImageOrientationPatient] for s in slices])
    if len(facts) > 1 or np.ptp(turns, axis=0).max() > _SHEAR:
        raise DicomError(f"{_of(first)} mixes slices of several sizes, spacings or orientations; split it")
    row, column = turns[0, :3], turns[0, 3:]
    normal = np.cross(row, column)
    places = np.array([[float(v) for v in s.ImagePositionPatient] for s in slices])
    ordered = _even_order(slices, places @ normal)
    places = places[ordered]
    down, across = (float(v) for v in first.PixelSpacing)
    if len(slices) > 1:
        step = (places[-1] - places[0]) / (len(slices) - 1)
        gap = np.abs(np.diff(places, axis=0) - step).max()
        if gap > _UNEVEN_MM or np.linalg.norm(step) < _UNEVEN_MM:
            raise DicomError(
                f"{_of(first)} has slices that are missing, doubled or uneven (by {gap:.2f} mm); complete it"
            )
    else:
        step = normal * float(first.get("SpacingBetweenSlices", None) or first.get("SliceThickness", None) or 1.0)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([row * across, column * down, step], axis=1)
    lps[:3, 3] = places[0]
    return [slices[i] for i in ordered], Grid(FLIP @ lps, (int(first.Columns), int(first.Rows), len(slices)))


def _even_order(slices: Sequence[Dataset], along: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices by instance number where positions then rise or fall throughout, else by position."""
    by_number = np.argsort([int(s.get("InstanceNumber", None) or 0) for s in slices], kind="stable")
    gaps = np.diff(along[by_number])
    even = len(gaps) > 0 and (np.all(gaps > 0) or np.all(gaps < 0))
    return np.asarray(by_number if even else np.argsort(along, kind="stable"), np.int64)


def _stored(values_xyz: NDArray[Any], modality: str) -> tuple[NDArray[np.uint16], float, float]:
    """Unsigned 16-bit values with slope and intercept such that value = slope * stored + intercept."""
    low, high = float(values_xyz.min()), float(values_xyz.max())
    if np.array_equal(values_xyz, np.round(values_xyz)):
        whole = values_xyz.astype(np.int64)
        intercept = min(-1024, int(low)) if modality == "CT" else min(0, int(low))
        factor = 1
        if high - intercept > 65_535:
            intercept = min(0, int(low))
            factor = int(np.gcd.reduce(whole.ravel() - intercept))
        if factor and (high - intercept) / factor <= 65_535:
            return ((whole - intercept) // factor).astype(np.uint16), float(factor), float(intercept)
    # A slope that a decimal string of 16 characters holds exactly enough.
    slope = float(_ds((high - low) / 65_535 or 1.0))
    return np.clip(np.round((values_xyz - low) / slope), 0, 65_535).astype(np.uint16), slope, float(_ds(low))


def _common(case: str, modality: str, key: str) -> Dataset:
    """Attributes shared by all slices of a series: patient, study, series, frame of reference, equipment."""
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    data.SOPClassUID = STORAGE[modality]
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] if modality == "CT" else ["ORIGINAL", "PRIMARY", "OTHER"]
    data.StudyDate = data.SeriesDate = data.ContentDate = data.AcquisitionDate = "20000101"
    data.StudyTime = data.SeriesTime = data.ContentTime = data.AcquisitionTime = "120000"
    data.PatientName, data.PatientID = f"{case}^Sample", case
    data.PatientBirthDate = data.PatientSex = ""
    data.AccessionNumber = data.ReferringPhysicianName = ""
    data.StudyInstanceUID, data.StudyID = repeatable_uid(key, "study"), "1"
    data.SeriesInstanceUID, data.SeriesNumber = repeatable_uid(key, "series"), 1
    data.StudyDescription, data.SeriesDescription = "Sample dataset", case[:64]
    data.Modality, data.PatientPosition = modality, "HFS"
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = repeatable_uid(key, "frame"), ""
    data.Manufacturer, data.ManufacturerModelName = "Patchwise", _VERSION
    data.DeviceSerialNumber, data.SoftwareVersions = "1", "1"
    data.AcquisitionNumber = 1
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    if modality == "CT":
        data.KVP = None  # required, may be empty: nothing was irradiated
    else:
        data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "RM", "NONE", ""
        data.MRAcquisitionType = "3D"
        data.RepetitionTime = data.EchoTime = data.EchoTrainLength = None
    return data


def _slice(common: Dataset, stored_xy: NDArray[np.uint16], lps: NDArray[np.float64], k: int, key: str) -> FileDataset:
    instance = repeatable_uid(key, "instance", str(k))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = common.SOPClassUID, instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    data.update(common)
    data.is_little_endian, data.is_implicit_VR = True, False
    data.SOPInstanceUID, data.InstanceNumber = instance, k + 1
    data.ImagePositionPatient = [_ds(v) for v in (lps @ [0, 0, k, 1])[:3]]
    data.PixelData = np.ascontiguousarray(stored_xy.T).astype("<u2").tobytes()
    return data


def _rescaled(image: Dataset) -> NDArray[np.float64]:
    slope, intercept = float(image.get("RescaleSlope", 1)), float(image.get("RescaleIntercept", 0))
    return np.asarray(image.pixel_array * slope + intercept, np.float64)


def _narrow(values_xyz: NDArray[np.float64]) -> NDArray[Any]:
    """int16 or int32 where all values are whole, float32 otherwise."""
    if np.array_equal(values_xyz, np.round(values_xyz)):
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= values_xyz.min() and values_xyz.max() <= np.iinfo(kind).max:
                return values_xyz.astype(kind)
    return values_xyz.astype(np.float32)


def _ds(value: float) -> DSfloat:
    """A decimal string of at most 16 characters; -0 is 0."""
    return DSfloat(float(value) + 0.0, auto_format=True)


def _of(image: Dataset) -> str:
    return f"series {image.get('SeriesInstanceUID', '?')} of patient {image.get('PatientID', '?')}"
