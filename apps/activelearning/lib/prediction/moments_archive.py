# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cached moments of a large image: slabs in one archive, and maps that are made of one slab after the other."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from lib.prediction.tiled import Slab
from lib.uncertainty import Array, Moments

_INDEX = "slabs.npy"
_LEVEL = 1


def save_slabs(slabs: Iterable[Slab], loss_xyz: Array | None, stream: BinaryIO) -> None:
    """Writes slabs as they come: sums of probabilities and spread in half precision, entropies in single precision.

    A mean is off by at most 2^-11 of itself, so an entropy of it by less than a thousandth of itself; what differs
    between members (BALD) stays exact in the entropies.
    """
    boxes = []
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as archive:
        for number, slab in enumerate(slabs):
            boxes.append(slab.box)
            for name, values in slab.moments.to_arrays().items():
                kept = values.astype(np.float16) if name in ("sum", "spread") else values
                _write(archive, f"{number}.{name}.npy", kept)
        if loss_xyz is not None:
            _write(archive, "learning_loss.npy", loss_xyz)
        _write(archive, _INDEX, np.array(boxes))


def has_slabs(path: Path) -> bool:
    """Whether moments were cached in slabs."""
    with zipfile.ZipFile(path) as archive:
        return _INDEX in archive.namelist()


class SlabbedMoments(Moments):
    """Moments that stay on disk: a map is computed slab by slab, so that only one slab of every class is in memory.

    Args:
        path: an archive of `save_slabs`.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            boxes_nab = _read(archive, _INDEX)
            classes = _shape(archive, "0.sum.npy")[0]
            count = int(_read(archive, "0.count.npy"))
            loss = _read(archive, "learning_loss.npy") if "learning_loss.npy" in archive.namelist() else None
        super().__init__((classes, *boxes_nab[:, :, 1].max(axis=0)))
        self._boxes = [tuple(slice(int(a), int(b)) for a, b in box) for box in boxes_nab]
        self.count, self.loss = count, loss

    def whole(self, read: Callable[[Moments], NDArray[Any]]) -> NDArray[Any]:
        """The map (X, Y, Z) whose slabs `read` makes of moments."""
        out: NDArray[Any] | None = None
        for box, slab in self._slabs(self._boxes):
            part = read(slab)
            out = np.empty(self.shape[1:], part.dtype) if out is None else out
            out[box] = part
        assert out is not None, "an archive has at least one slab"
        return out

    def mean_of(self, c: int) -> Array:
        return self.whole(lambda slab: slab.mean_of(c))

    def predicted(self) -> NDArray[np.intp]:
        # One byte a voxel: eight would be more than a gigabyte.
        found: NDArray[Any] = self.whole(lambda slab: slab.predicted().astype(np.uint8))
        return found

    def predicted_fractions(self, box: tuple[slice, slice, slice]) -> NDArray[np.float64]:
        counts = np.zeros(self.shape[0])
        wanted = [slice(*cut.indices(n)) for cut, n in zip(box, self.shape[1:], strict=True)]
        for kept, slab in self._slabs([kept for kept in self._boxes if all(map(_touch, kept, wanted))]):
            pairs = zip(kept, wanted, strict=True)
            inside = tuple(slice(max(0, w.start - k.start), min(w.stop, k.stop) - k.start) for k, w in pairs)
            counts += np.bincount(slab.predicted()[inside].ravel(), minlength=self.shape[0])
        return np.asarray(counts / max(counts.sum(), 1))

    def _slabs(self, boxes: Iterable[tuple[slice, ...]]) -> Iterator[tuple[tuple[slice, ...], Moments]]:
        with zipfile.ZipFile(self.path) as archive:
            for box in boxes:
                number = self._boxes.index(box)
                names = ("sum", "spread", "entropy", "count")
                arrays = {name: _read(archive, f"{number}.{name}.npy") for name in names}
                yield box, Moments.from_arrays(arrays)


def _touch(one: slice, two: slice) -> bool:
    return bool(one.start < two.stop and two.start < one.stop)


def _write(archive: zipfile.ZipFile, name: str, values: NDArray[Any]) -> None:
    with archive.open(name, "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(name) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = cast(Any, read)(stream)[0]
    return shape
