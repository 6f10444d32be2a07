# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Segments of a `.seg.nrrd`: the names, values and layers that 3D Slicer writes into its header.

Segments that may overlap are in several layers of one file. A label map has one class per voxel, so:

- Segments that show where to work (`background`, `query_region`) give way to all others.
- Segments of one name are one class.
- Where two other segments hold the same voxel, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lib.frames import FRAME_SEGMENT
from lib.partial_labels import MAX_CLASS, UNLABELLED
from lib.storage.volume_headers import ImageError, read_nrrd_header

_KEY = re.compile(r"Segment(\d+)_(ID|Name|LabelValue|Layer)")
_REPRESENTATION = ("Segmentation_SourceRepresentation", "Segmentation_MasterRepresentation")
_GIVE_WAY = frozenset({"background", FRAME_SEGMENT})


class Segment(NamedTuple):
    """One segment: its name, its value in its layer, and the layer from 0."""

    name: str
    value: int
    layer: int


def read_segments(path: Path, layers: int) -> list[Segment]:
    """Segments that the header of an NRRD file names, in its order; none in any other file.

    Value and layer are optional. Files without them have a layer of ones per segment.

    Raises:
        ImageError: fields that cannot be used, or fractions instead of segments.
    """
    if path.suffix.lower() != ".nrrd":
        return []
    fields = _key_values(read_nrrd_header(path))
    found: dict[int, dict[str, str]] = {}
    for key, value in fields.items():
        match = _KEY.fullmatch(key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value
    if found and any("fractional" in fields.get(name, "").lower() for name in _REPRESENTATION):
        raise ImageError(f"{path.name}: its segments are fractions; export them as a binary label map")
    try:
        segments = [_segment(found[number], place) for place, number in enumerate(sorted(found))]
    except (KeyError, ValueError) as error:
        raise ImageError(
            f"{path.name}: its header describes a segment without a usable {error}; export it again"
        ) from None
    if layers == 1 and all("Layer" not in field for field in found.values()):
        segments = [segment._replace(layer=0) for segment in segments]
    _check(path.name, segments, layers)
    return segments


def one_layer(
    voxels: NDArray[Any], segments: Sequence[Segment], name: str
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Label map of the segments, and their names and values in it as a client's `label_info`.

    A file of one layer keeps its values; several layers are numbered 1, 2, ... in the order of the segments.

    Args:
        voxels: (X, Y, Z) or (X, Y, Z, layers).
        segments: of the file, at least one.
        name: of the file.

    Raises:
        ImageError: segments that overlap, or a value that belongs to no segment.
    """
    layers = voxels[..., None] if voxels.ndim == 3 else voxels
    if layers.shape[-1] == 1 and all(segment.value <= MAX_CLASS for segment in segments):
        values = {segment.value: segment.value for segment in segments} | {UNLABELLED: UNLABELLED}
    else:
        values = {}
    numbers = [segment.value if values else place for place, segment in enumerate(segments, start=1)]
    label_xyz = np.zeros(layers.shape[:3], np.uint8, order="F")
    owner = np.zeros(label_xyz.shape, np.uint8, order="F")
    for layer in range(layers.shape[-1]):
        known = {0, *(segment.value for segment in segments if segment.layer == layer), *values}
        odd = sorted(set(np.unique(layers[..., layer]).tolist()) - known)
        if odd:
            raise ImageError(
                f"{name}: layer {layer} holds the value {odd[0]:g}, which no segment of its header has; export it again"
            )
    if values:
        label_xyz[layers[..., 0] == UNLABELLED] = UNLABELLED
    for place, segment in sorted(enumerate(segments, start=1), key=lambda one: one[1].name.lower() not in _GIVE_WAY):
        inside = layers[..., segment.layer] == segment.value
        if segment.value == 0 or not inside.any():
            continue
        _check_overlap(name, segments, place, owner[inside])
        label_xyz[inside] = numbers[place - 1]
        owner[inside] = place
    return label_xyz, [{"name": s.name, "idx": n} for s, n in zip(segments, numbers, strict=True)]


def _segment(fields: dict[str, str], place: int) -> Segment:
    name = fields.get("Name") or fields["ID"]
    return Segment(name, int(fields.get("LabelValue", 1)), int(fields.get("Layer", place)))


def _check(name: str, segments: Sequence[Segment], layers: int) -> None:
    if len(segments) > MAX_CLASS:
        raise ImageError(f"{name}: {len(segments)} segments, expected at most {MAX_CLASS}; export fewer")
    taken: dict[tuple[int, int], str] = {}
    for segment in segments:
        if not 0 <= segment.layer < layers or segment.value < 0:
            raise ImageError(
                f"{name}: segment {segment.name} has value {segment.value} in layer {segment.layer} of a file with "
                f"{layers} layers; export it again"
            )
        other = taken.setdefault((segment.layer, segment.value), segment.name)
        if other.lower() != segment.name.lower():
            raise ImageError(
                f"{name}: segments {other} and {segment.name} share the value {segment.value} in layer "
                f"{segment.layer}, so their voxels cannot be distinguished; export it again"
            )


def _check_overlap(name: str, segments: Sequence[Segment], place: int, owners: NDArray[np.uint8]) -> None:
    mine = segments[place - 1].name.lower()
    for other in np.unique(owners[owners > 0]).tolist():
        theirs = segments[other - 1].name
        if theirs.lower() not in {mine, *_GIVE_WAY}:
            count = int(np.count_nonzero(owners == other))
            raise ImageError(
                f"{name}: segments {theirs} and {segments[place - 1].name} overlap in {count} voxels, expected one "
                "segment per voxel; remove the overlapping segments' common voxels and submit again"
            )


def _key_values(header: str) -> dict[str, str]:
    pairs = (line.partition(":=") for line in header.splitlines()[1:] if ":=" in line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}
