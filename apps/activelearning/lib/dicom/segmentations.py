# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""DICOM segmentations and label maps: one turned into the other. Datasets and arrays in, arrays and datasets out."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, SegmentationStorage, generate_uid
from pydicom.valuerep import DA, TM

from lib.dicom.log_redaction import redacted
from lib.dicom.series import FLIP, series_grid
from lib.frames import FRAME_SEGMENT
from lib.partial_labels import BACKGROUND, UNLABELLED, LabelError, LabelMap
from lib.regions import Region, Triple

WRITER = "Patchwise label server"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "patchwise/segments")
_OFF_GRID_MM = 0.1
_OFF_STEP = 1e-2


def tracking_uid(series: str, name: str) -> UID:
    """Tracking UID of a class of a series, the same in every segmentation (PS3.3 C.8.20.2)."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, f'{series}/{name}').int}")


def referenced_series(segmentation: Dataset) -> list[str]:
    """UIDs of the series that a segmentation refers to."""
    items = segmentation.get("ReferencedSeriesSequence")
    return [str(item.get("SeriesInstanceUID", "")) for item in items] if isinstance(items, Sequence) else []


def written_by_dcmjs(segmentation: Dataset) -> bool:
    """Return whether a segmentation was written by OHIF's library."""
    meta = getattr(segmentation, "file_meta", None) or Dataset()
    names = [str(segmentation.get(keyword, "")) for keyword in ("Manufacturer", "ManufacturerModelName")]
    return str(meta.get("ImplementationVersionName", "")).startswith("dcmjs") or names == ["Unspecified"] * 2


def segment_values(segmentation: Dataset, series: str, classes: Mapping[str, int]) -> dict[int, int]:
    """Segment number -> class id; the frame's segment gets the value after the last class, unknown segments none.

    A segment is identified by its label, without regard to case, else by its tracking id, or by the tracking UID that
    this app assigned.
    """
    ids = {name.lower(): value for name, value in classes.items()}
    ids[FRAME_SEGMENT] = max(classes.values()) + 1
    by_uid = {tracking_uid(series, name): value for name, value in classes.items()}
    found = {}
    for segment in segmentation.get("SegmentSequence", []):
        names = (str(segment.get(keyword, "")).strip().lower() for keyword in ("SegmentLabel", "TrackingID"))
        value = next((ids[name] for name in names if name in ids), by_uid.get(segment.get("TrackingUID")))
        if value is not None:
            found[int(segment.SegmentNumber)] = value
    return found


def read_segmentation(
    segmentation: Dataset,
    series: str,
    shape: Triple,
    affine: NDArray[np.float64],
    classes: Mapping[str, int],
    regions: Sequence[Region],
) -> tuple[LabelMap, list[dict[str, Any]]]:
    """A label map (X, Y, Z) on the grid of the series, and its `label_info`, as in submissions of clients.

    Frames may lie along any axes of the grid, in either direction; where segments overlap, the later frame counts.
    Segments that are not a class only matter inside of `regions`.

    Args:
        affine: 4 x 4, from voxels of the series to millimetres in RAS.

    Raises:
        LabelError: the segmentation is damaged, not binary, does not lie on the grid, or has an unknown segment inside
            of a region.
    """
    try:
        return _read(segmentation, series, shape, affine, classes, regions)
    except LabelError:
        raise
    except Exception as error:
        # Any attribute of a stored object may be missing, of another type, or out of range.
        raise LabelError(f"the segmentation is damaged ({redacted(error)}); store it again") from error


def _read(
    segmentation: Dataset,
    series: str,
    shape: Triple,
    affine: NDArray[np.float64],
    classes: Mapping[str, int],
    regions: Sequence[Region],
) -> tuple[LabelMap, list[dict[str, Any]]]:
    kind = str(segmentation.get("SegmentationType", "missing"))
    if segmentation.get("SOPClassUID") != SegmentationStorage or kind != "BINARY":
        raise LabelError(f"the segmentation is of type {kind}; store it as BINARY")
    values = segment_values(segmentation, series, classes)
    _check_sizes(segmentation, shape)
    label_xyz = np.zeros(shape, np.uint8)
    strange: dict[int, int] = {}
    for number, voxels in _placed_frames(segmentation, shape, affine):
        x, y, z = voxels.T
        if number in values:
            label_xyz[x, y, z] = values[number]
            continue
        for region in regions:
            inside = np.all((voxels >= region.start) & (voxels < region.stop), axis=1)
            strange[number] = strange.get(number, 0) + int(np.count_nonzero(inside))
    if any(strange.values()):
        labels = {int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in segmentation.SegmentSequence}
        listed = ", ".join(
            f"{labels.get(number, number)!r} ({count} voxels)" for number, count in strange.items() if count
        )
        raise LabelError(
            f"segments {listed} inside of the region are not classes of this project; known classes are "
            f"{', '.join(classes)}: rename or remove the segments and store it again"
        )
    info = [{"name": name, "idx": value} for name, value in classes.items()]
    frame = max(classes.values()) + 1
    return label_xyz, info + ([{"name": FRAME_SEGMENT, "idx": frame}] if frame in values.values() else [])


def _check_sizes(segmentation: Dataset, shape: Triple) -> None:
    """Refuse more or larger frames than its segments can have on the grid, before any pixel is unpacked."""
    rows, columns = int(segmentation.get("Rows", 0)), int(segmentation.get("Columns", 0))
    frames, segments = int(segmentation.get("NumberOfFrames", 1)), len(segmentation.get("SegmentSequence", []))
    if max(rows, columns) > max(shape) or frames > max(shape) * max(1, segments):
        raise LabelError(
            f"the segmentation has {frames} frames of {rows} x {columns} for {segments} segments, its series has the "
            f"shape {shape}; draw on the series itself, without resampling it"
        )


def _placed_frames(
    segmentation: Dataset, shape: Triple, affine: NDArray[np.float64]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Segment number and voxels (N, 3) of every frame, by its position and orientation."""
    to_voxel = np.linalg.inv(affine) @ FLIP
    frames = segmentation.pixel_array if "PixelData" in segmentation else np.zeros((0, 1, 1))
    frames = frames[None] if frames.ndim == 2 else frames
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    for frame_yx, own in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        number = int(_group(own, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        place = [float(v) for v in _group(own, shared, "PlanePositionSequence").ImagePositionPatient]
        turn = [float(v) for v in _group(own, shared, "PlaneOrientationSequence").ImageOrientationPatient]
        down, across = (float(v) for v in _group(own, shared, "PixelMeasuresSequence").PixelSpacing)
        exact = (to_voxel @ [*place, 1])[:3]
        # Steps between columns and between rows must be whole steps along axes of the grid.
        steps = np.stack([to_voxel[:3, :3] @ turn[:3] * across, to_voxel[:3, :3] @ turn[3:] * down])
        origin, whole = np.round(exact), np.round(steps)
        off_mm = np.abs((exact - origin) * np.linalg.norm(affine[:3, :3], axis=0)).max()
        rows, columns = np.nonzero(frame_yx)
        voxels = (origin + columns[:, None] * whole[0] + rows[:, None] * whole[1]).astype(np.int64)
        askew = np.abs(steps - whole).max() > _OFF_STEP or not np.array_equal(np.abs(whole).sum(axis=1), [1, 1])
        outside = np.any((voxels < 0) | (voxels >= shape))
        if off_mm > _OFF_GRID_MM or askew or outside:
            raise LabelError(
                f"a frame of segment {number} does not lie on the voxels of its series (off by {off_mm:.2f} mm"
                f"{', turned or of another spacing' if askew else ''}{', outside of it' if outside else ''}); "
                "draw on the series itself, without resampling it"
            )
        yield number, voxels


def write_segmentation(
    label_xyz: LabelMap, classes: Mapping[str, int], headers: Sequence[Dataset], number: int
) -> Dataset:
    """A binary DICOM segmentation of the annotated voxels: one segment per class, unlabelled voxels in none.

    Args:
        label_xyz: class ids, and UNLABELLED.
        headers: headers of the segmented series, in any order.
        number: number of the segmentation in its series.

    Raises:
        LabelError: the label has another shape than the series.
    """
    import highdicom

    grid = series_grid(headers)
    if label_xyz.shape != grid.shape:
        raise LabelError(f"the label has shape {label_xyz.shape}, its series has {grid.shape}; fetch the series again")
    slices = [_complete(headers[place]) for place in grid.order]
    series = str(slices[0].SeriesInstanceUID)
    ranked = sorted(classes.items(), key=lambda item: item[1])
    lookup = np.zeros(256, np.uint8)
    for place, (_, value) in enumerate(ranked, start=1):
        lookup[value] = place
    lookup[[BACKGROUND, UNLABELLED]] = 0
    frames_zyx = np.ascontiguousarray(lookup[label_xyz].transpose(2, 1, 0))
    segmentation = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=frames_zyx,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_described(place, name, series) for place, (name, _) in enumerate(ranked, start=1)],
        series_instance_uid=generate_uid(),
        series_number=min(9000 + number, 2**31 - 1),
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Patchwise",
        manufacturer_model_name=WRITER,
        software_versions="1",
        device_serial_number="1",
        content_label="SEGMENTATION",
        content_description="Only annotated regions; unmarked voxels may be unseen",
        series_description="Patchwise: annotated regions",
        # All frames of an empty map would be left out, and a segmentation needs a frame.
        omit_empty_frames=bool(frames_zyx.any()),
    )
    return segmentation


def _described(place: int, name: str, series: str) -> Any:
    import highdicom
    from pydicom.sr.coding import Code

    return highdicom.seg.SegmentDescription(
        segment_number=place,
        segment_label=name[:64],
        segmented_property_category=Code("123037004", "SCT", "Anatomical Structure"),
        segmented_property_type=Code("91723000", "SCT", "Anatomical structure"),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        tracking_uid=tracking_uid(series, name),
        tracking_id=name[:64],
    )


def _complete(header: Dataset) -> Dataset:
    """A header with the attributes that must be there but may be empty."""
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        if keyword not in header:
            setattr(header, keyword, "")
    for keyword in ("StudyDate", "StudyTime", "ReferringPhysicianName"):
        if keyword not in header:
            setattr(header, keyword, None)
    # Archives contain invalid dates, and words for the sex; a segmentation with them cannot be written.
    for keyword, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            kind(header.get(keyword) or "")
        except ValueError:
            setattr(header, keyword, None)
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = None
    return header


def _group(own: Dataset, shared: Dataset, name: str) -> Dataset:
    """A functional group of a frame, from its own list or the shared one."""
    holder = own if name in own else shared
    if name not in holder:
        raise LabelError(f"the segmentation lacks {name}, so its frames have no place; store it with positions")
    item: Dataset = holder[name].value[0]
    return item
