# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Label maps with unlabelled voxels: make, remap, merge and check them. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.errors import PatchwiseError
from lib.regions import Region

UNLABELLED = 255
BACKGROUND = 0
MAX_CLASS = 254

LabelMap = NDArray[np.uint8]


class LabelError(PatchwiseError, ValueError):
    """An unusable submitted label map; the message names the class or value and the remedy."""


def unlabelled(shape: Sequence[int]) -> LabelMap:
    """A label map without annotation, in the memory order of NIfTI files."""
    return np.full(tuple(shape), UNLABELLED, dtype=np.uint8, order="F")


def values_in(label_xyz: LabelMap) -> list[int]:
    """The values that occur in a label map, sorted: `numpy.unique`, without sorting every voxel.

    Label maps are made of runs, so eight voxels are looked at together, and only words unlike the one before.
    """
    flat = label_xyz.ravel(order="K")
    whole = flat.size - flat.size % 8
    words = flat[:whole].view(np.uint64)
    seen = np.zeros(256, dtype=bool)
    seen[words[:1].view(np.uint8)] = True
    seen[words[1:][words[1:] != words[:-1]].view(np.uint8)] = True
    seen[flat[whole:]] = True
    result: list[int] = np.flatnonzero(seen).tolist()
    return result


def check_values(label_xyz: LabelMap, classes: Mapping[str, int], allow_unlabelled: bool = True) -> None:
    """Refuse values that are neither background, nor a class id, nor (if allowed) UNLABELLED.

    Raises:
        LabelError: naming the values and the known ones.
    """
    known = {BACKGROUND, *classes.values()} | ({UNLABELLED} if allow_unlabelled else set())
    unknown = sorted(set(values_in(label_xyz)) - known)
    if unknown:
        raise LabelError(
            f"label values {unknown} are not known; expected 0 for background"
            + "".join(f", {i} for {n}" for n, i in classes.items())
        )


def remap_by_name(
    label_xyz: LabelMap,
    label_info: Iterable[Mapping[str, Any]] | None,
    classes: Mapping[str, int],
    ignored: Collection[int] = (),
) -> LabelMap:
    """Values of a client's export turned into class ids by the names in `label_info`.

    A client numbers exported segments 1, 2, ... in the order of its scene, so only names identify a class. Each
    entry of `label_info` is `{"name": ..., "idx": ...}`: `idx` is the value in the file. Names compare without case. A
    segment with voxels whose name is not a class is refused, so that no voxel is dropped silently. Entries for helper
    segments (`background`, `query_region`) are read as background.

    `ignore` and `unlabelled` are UNLABELLED.

    Without `label_info` the values are taken as class ids, and those in `ignored` as UNLABELLED.

    Raises:
        LabelError: a segment with voxels whose name is not a class, two segments with one value, or a value without
            name.
    """
    if not label_info:
        others = [value for value in ignored if value not in classes.values()]
        if others:
            label_xyz = np.where(np.isin(label_xyz, others), np.uint8(UNLABELLED), label_xyz)
        check_values(label_xyz, classes)
        return label_xyz.copy(order="K")
    ids = {"ignore": UNLABELLED, "unlabelled": UNLABELLED}
    ids.update({name.lower(): value for name, value in classes.items()})
    ids.update({"background": BACKGROUND, "query_region": BACKGROUND})
    meaning = {BACKGROUND: BACKGROUND, UNLABELLED: UNLABELLED}
    names = _names_by_value(label_info)
    for value, name in names.items():
        if value != BACKGROUND and name.lower() in ids:
            meaning[value] = ids[name.lower()]
    present = values_in(label_xyz)
    missing = [v for v in present if v not in meaning]
    if missing:
        listed = ", ".join(f"{v} ({names.get(v, 'without a name')})" for v in missing)
        raise LabelError(
            f"segments {listed} are not classes of this project; known classes are {', '.join(classes)}: "
            "rename or remove the segments and submit again"
        )
    if all(meaning[v] == v for v in present):
        return label_xyz.copy(order="K")
    table = np.zeros(256, dtype=np.uint8)
    table[list(meaning)] = list(meaning.values())
    return table[label_xyz]


def check_label_info(label_info: Any) -> None:
    """Refuse a value that is not a list of objects, as clients may send anything.

    Raises:
        LabelError: with the type that was found.
    """
    if label_info is None or (isinstance(label_info, list) and all(isinstance(entry, dict) for entry in label_info)):
        return
    raise LabelError(f'label_info must be a list like [{{"name": "liver", "idx": 1}}], found {label_info!r:.80}')


def settle_values(label_xyz: LabelMap, label_info: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """`label_info` with the values that the segments have in the file.

    3D Slicer leaves some segments out of an export (`background`, scribbles): its `idx` counts them, the values in the
    file do not. Such a list rises and has gaps. If the values in the file match `idx`, the list is used unchanged; if
    they only match the positions in the list, it is renumbered by these.

    Raises:
        LabelError: both fit and give a voxel different names.
    """
    if label_info is None:
        return None
    listed = [dict(entry) for entry in label_info]
    names = {value: name for value, name in _names_by_value(listed).items() if value != BACKGROUND}
    places = dict(enumerate(names.values(), start=1))
    if list(names) != sorted(names) or list(names) == list(places) or len(names) < len(listed):
        return listed
    present = set(values_in(label_xyz)) - {BACKGROUND, UNLABELLED}
    if not present <= places.keys():
        return listed
    if not present <= names.keys():
        return [{**entry, "idx": place} for place, entry in enumerate(listed, start=1)]
    doubtful = [value for value in sorted(present) if names[value] != places[value]]
    if doubtful:
        value = doubtful[0]
        raise LabelError(
            f"the value {value} may mean {names[value]} (its idx) or {places[value]} (its place among the exported "
            "segments): delete the segment that was left out (background or scribbles) and submit again"
        )
    return listed


def _names_by_value(label_info: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in label_info:
        try:
            name, value = str(entry["name"]), int(entry["idx"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise LabelError(f"label_info entries need a name and a whole number idx, found {entry!r}") from None
        if not 0 <= value <= MAX_CLASS:
            raise LabelError(f"label_info gives {name} the value {value}; values go from 0 to {MAX_CLASS}")
        if names.get(value, name) != name:
            raise LabelError(f"label_info gives the value {value} to both {names[value]} and {name}")
        names[value] = name
    return names


def merge(current_xyz: LabelMap, answer_xyz: LabelMap, regions: Sequence[Region]) -> LabelMap:
    """`current` with the voxels of `regions` replaced by those of `answer`; nothing outside of them changes.

    UNLABELLED voxels of the answer do not change `current`: a client cannot remove a label by leaving it out.

    Raises:
        LabelError: shapes differ or a region does not lie inside.
    """
    if current_xyz.shape != answer_xyz.shape:
        raise LabelError(f"answer of shape {answer_xyz.shape} does not fit the label of shape {current_xyz.shape}")
    merged = current_xyz.copy(order="K")
    for region in regions:
        if not region.inside(current_xyz.shape):
            raise LabelError(f"region {region.start} + {region.size} leaves the image of shape {current_xyz.shape}")
        cut = answer_xyz[region.slices]
        merged[region.slices] = np.where(cut == UNLABELLED, merged[region.slices], cut)
    return merged


class ClasswiseLabels:
    """A merged label map with the set of excluded classes per voxel, for answers that annotate only some classes.

    An empty voxel of such an answer belongs to none of the annotated classes, but possibly to another one. It stays
    UNLABELLED, and bit i of `absent_xyz` excludes class i + 1. If all classes are excluded, it is background. The
    newest answer for a voxel and class takes precedence.

    Args:
        shape: shape of the image.
        classes: number of classes without background, 1 to 63.
    """

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        if not 1 <= classes <= 63:
            raise LabelError(f"annotated_classes works with up to 63 classes, found {classes}")
        self.label_xyz = unlabelled(shape)
        self.absent_xyz = np.zeros(tuple(shape), dtype=np.uint64)
        self.all = np.uint64(2**classes - 1)

    def add(self, answer_xyz: LabelMap, regions: Sequence[Region], drawn: Iterable[int] | None) -> None:
        """Merge an answer in which only the classes `drawn` were annotated; None for all classes.

        Raises:
            LabelError: a voxel of a class that was not drawn, or a reason of `merge`.
        """
        if drawn is None:
            self.label_xyz = merge(self.label_xyz, answer_xyz, regions)
            return
        looked_for = sorted(set(drawn))
        bits = np.uint64(sum(1 << (c - 1) for c in looked_for))
        other = sorted(set(values_in(answer_xyz)) - {BACKGROUND, UNLABELLED, *looked_for})
        if other:
            raise LabelError(
                f"label values {other} are of classes that annotated_classes does not name; add them there"
            )
        for region in regions:
            box = region.slices
            empty = answer_xyz[box] == BACKGROUND
            taken_back = empty & np.isin(self.label_xyz[box], looked_for)
            self.label_xyz[box][taken_back] = UNLABELLED
            self.absent_xyz[box][empty] |= bits
        self.label_xyz = merge(self.label_xyz, np.where(answer_xyz == BACKGROUND, UNLABELLED, answer_xyz), regions)

    def merged(self) -> LabelMap:
        """The label map: background where every class was ruled out, UNLABELLED where some are still possible."""
        return np.where((self.label_xyz == UNLABELLED) & (self.absent_xyz == self.all), BACKGROUND, self.label_xyz)

    def encoded(self, codes: dict[int, int]) -> LabelMap:
        """The label map with a separate value for each set of classes that a voxel may still have.

        Args:
            codes: bits of the excluded classes -> value; new ones get the next free value above the classes.
        """
        label = self.merged()
        partly = (label == UNLABELLED) & (self.absent_xyz != 0)
        for bits in np.unique(self.absent_xyz[partly]).tolist():
            code = codes.setdefault(int(bits), int(self.all).bit_length() + 1 + len(codes))
            if code >= UNLABELLED:
                raise LabelError(
                    f"classes were drawn in more than {len(codes) - 1} combinations; draw them all somewhere"
                )
            label[partly & (self.absent_xyz == np.uint64(bits))] = code
        return label


def possible_classes(codes: Mapping[int, int], classes: int) -> list[list[bool]]:
    """Row k: mask of background and the classes 1 ... `classes` that a voxel of the k-th code may have."""
    return [[True, *(not bits >> c & 1 for c in range(classes))] for bits in codes]


def labelled_voxels(label_xyz: LabelMap) -> int:
    """Number of voxels that carry an annotation (background included)."""
    return int(label_xyz.size - np.count_nonzero(label_xyz == UNLABELLED))


def class_voxels(label_xyz: LabelMap, classes: Mapping[str, int]) -> dict[str, int]:
    """Number of annotated voxels of every class, background first."""
    counts = np.bincount(label_xyz.ravel(), minlength=256)
    return {"background": int(counts[BACKGROUND])} | {name: int(counts[value]) for name, value in classes.items()}
