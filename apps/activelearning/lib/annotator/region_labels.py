# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Labels of single regions as files: answers for the ledger, and drafts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from lib.annotator.region_views import RegionView
from lib.partial_labels import UNLABELLED, LabelError
from lib.pseudo_labels import fill_between
from lib.storage.atomic_files import write_atomic

# ITK's physical axes are left and posterior, those of an affine right and anterior.
_LPS = np.array([-1.0, -1.0, 1.0])
ENDING = ".seg.nrrd"


def unpacked(body: bytes, view: RegionView, classes: Mapping[str, int]) -> NDArray[np.uint8]:
    """Label of a region in the axes of its view, from a gzip stream of one byte per voxel, the first axis fastest.

    Raises:
        LabelError: another number of voxels than the region has, no gzip stream, or a value that is not a class.
    """
    size = view.region[1]
    expected = int(np.prod(size))
    stream = zlib.decompressobj(wbits=31)
    try:
        # One more than expected, so that a stream that unpacks to any size is refused for the memory of this one.
        voxels = stream.decompress(body, expected + 1)
    except zlib.error:
        raise LabelError("the label of the region is not a gzip stream; load the page again") from None
    if len(voxels) != expected or not stream.eof:
        many = "more" if len(voxels) > expected or not stream.eof else f"{len(voxels)}"
        raise LabelError(
            f"the label has {many} voxels and the region {' x '.join(map(str, size))}, {expected} in all; "
            "load the page again"
        )
    label = np.frombuffer(voxels, dtype=np.uint8)
    unknown = sorted(set(np.unique(label).tolist()) - {0, *classes.values()})
    if unknown:
        listed = ", ".join(f"{value} {name}" for name, value in classes.items())
        raise LabelError(f"the label holds the value {unknown[0]}, which is no class; classes are {listed}")
    return label.reshape(size, order="F")


def packed(upright_xyz: NDArray[np.uint8]) -> bytes:
    """The inverse of `unpacked`."""
    stream = zlib.compressobj(wbits=31)
    return stream.compress(upright_xyz.tobytes(order="F")) + stream.flush()


def filled_between(label_xyz: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    """A label in which empty slices along `axis` between two drawn ones are interpolated (`lib.pseudo_labels`).

    A block whose outer slices share a class without an overlap stays empty.
    """
    planes = np.moveaxis(label_xyz.copy(), axis, 0)
    planes[~planes.any(axis=(1, 2))] = UNLABELLED
    found = fill_between(np.moveaxis(planes, 0, axis), label_xyz.shape[axis] + 1, axis)
    return np.where(found == UNLABELLED, 0, found).astype(np.uint8)


def write_answer(path: Path, upright_xyz: NDArray[np.uint8], view: RegionView, classes: Mapping[str, int]) -> None:
    """Write the label of a region as a segmentation that names its classes and lies where the region does.

    The file holds the voxels of the region alone, in the axes of the stored image, so that its size and the time to
    write it do not grow with the image.
    """
    stored_xyz = view.stored(upright_xyz)
    start = view.affine @ [*view.box[0], 1]
    spacing = np.linalg.norm(view.affine[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(stored_xyz.transpose(2, 1, 0)))
    image.SetOrigin((_LPS * start[:3]).tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((_LPS[:, None] * view.affine[:3, :3] / spacing).ravel().tolist())
    for place, (name, value) in enumerate(classes.items()):
        image.SetMetaData(f"Segment{place}_ID", f"Segment_{place}")
        image.SetMetaData(f"Segment{place}_Name", name)
        image.SetMetaData(f"Segment{place}_LabelValue", str(value))
        image.SetMetaData(f"Segment{place}_Layer", "0")
    SimpleITK.WriteImage(image, str(path), useCompression=True)


Start = Literal["nothing", "prediction"]
# First byte of the file of a draft.
_STARTS: dict[Start, bytes] = {"nothing": b"n", "prediction": b"p"}


class Draft(NamedTuple):
    """An unfinished label as it was sent, and the start of the drawing."""

    body: bytes
    start: Start


class Drafts:
    """Unfinished labels of regions, one for each query and client, kept until the answer is stored.

    Args:
        folder: of the drafts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, query_id: int, client: str, draft: Draft) -> None:
        """Store a draft in place of an earlier one."""
        write_atomic(self._path(query_id, client), lambda stream: stream.write(_STARTS[draft.start] + draft.body))

    def get(self, query_id: int, client: str) -> Draft | None:
        """The draft; None without one."""
        try:
            kept = self._path(query_id, client).read_bytes()
        except FileNotFoundError:
            return None
        for start, mark in _STARTS.items():
            if kept.startswith(mark):
                return Draft(kept[1:], start)
        # Drafts of earlier versions are the stream alone.
        return Draft(kept, "nothing")

    def drop(self, query_id: int, client: str) -> None:
        """Remove the draft, if there is one."""
        self._path(query_id, client).unlink(missing_ok=True)

    def _path(self, query_id: int, client: str) -> Path:
        # Ids may hold any character, and file systems may take two of them for one.
        return self.folder / f"{query_id}_{client.encode().hex()[:180]}.gz"
