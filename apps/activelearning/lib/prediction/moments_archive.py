# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Moments of large scans on disk: an archive of slabs, read one slab at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from lib.prediction.tiled import Slab
from lib.uncertainty import Array, Moments, predicted_loss

_INDEX = "slabs.npy"
_LEVEL = 1

_Box = tuple[slice, slice, slice]


def save_slabs(slabs: Iterable[Slab], loss_xyz: Array | None, stream: BinaryIO) -> None:
    """Write slabs as they are computed, each class separately.

    Sums of probabilities and spread are kept in half precision: a mean is off by at most 2^-11 of itself. Both
    entropies are kept in single precision, so that their difference (BALD) equals the one in memory.
    """
    boxes = []
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as archive:
        for number, slab in enumerate(slabs):
            boxes.append(slab.box)
            moments = slab.moments
            for c in range(moments.shape[0]):
                _write(archive, f"{number}.sum.{c}.npy", moments.total_cxyz[c].astype(np.float16))
                _write(archive, f"{number}.spread.{c}.npy", moments.spread_cxyz[c].astype(np.float16))
            _write(archive, f"{number}.entropy.npy", moments.entropy_xyz)
            _write(archive, f"{number}.predictive.npy", moments.predictive_entropy())
            _write(archive, f"{number}.members.npy", np.array([moments.shape[0], moments.count]))
        if loss_xyz is not None:
            _write(archive, "learning_loss.npy", loss_xyz)
        _write(archive, _INDEX, np.array(boxes))


def has_slabs(path: Path) -> bool:
    """Return whether moments were cached in slabs."""
    with zipfile.ZipFile(path) as archive:
        return _INDEX in archive.namelist()


class ArchivedMoments:
    """Moments that stay on disk (`lib.uncertainty.PosteriorMoments`): a map is computed slab by slab.

    Memory holds at most one slab of every class, and one whole map for values that are read per class.

    Args:
        path: an archive of `save_slabs`.

    Raises:
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            boxes_nab = _read(archive, _INDEX)
            classes, count = (int(n) for n in _read(archive, "0.members.npy"))
            self._loss = _read(archive, "learning_loss.npy") if "learning_loss.npy" in archive.namelist() else None
        x, y, z = (int(n) for n in boxes_nab[:, :, 1].max(axis=0))
        self.shape: tuple[int, int, int, int] = (classes, x, y, z)
        self.count = count
        self._boxes: list[_Box] = [cast(_Box, tuple(slice(int(a), int(b)) for a, b in box)) for box in boxes_nab]

    def voxelwise(self, read: Callable[[Moments], NDArray[Any]]) -> NDArray[Any]:
        """The map (X, Y, Z) whose slabs `read` makes of moments in memory."""
        return self._assembled(lambda archive, number: read(self._slab(archive, number)))

    def mean_of(self, c: int) -> Array:
        """Mean probability of class `c` (X, Y, Z)."""
        return self._assembled(lambda archive, number: self._kept(archive, number, "sum", c) / np.float32(self.count))

    def variance_of(self, c: int, ddof: int = 1) -> Array:
        """Variance of class `c` over members (X, Y, Z); 0 where there are too few members for `ddof`."""
        share = np.float32(max(self.count - ddof, 1))
        return self._assembled(lambda archive, number: self._kept(archive, number, "spread", c) / share)

    def learning_loss(self) -> Array:
        """Loss (X, Y, Z) that the members' heads predict.

        Raises:
            ValueError: the members were trained without such a head.
        """
        return predicted_loss(self._loss)

    def predicted(self) -> NDArray[np.uint8]:
        """Most probable class (X, Y, Z); the lowest class among equals."""
        return self.voxelwise(Moments.predicted)

    def predicted_fractions(self, box: tuple[slice, slice, slice]) -> NDArray[np.float64]:
        """Share of the voxels of `box` for which each class is the most probable one, (C,)."""
        counts = np.zeros(self.shape[0])
        wanted = [slice(*cut.indices(n)) for cut, n in zip(box, self.shape[1:], strict=True)]
        with zipfile.ZipFile(self.path) as archive:
            for number, kept in enumerate(self._boxes):
                if all(map(_touch, kept, wanted)):
                    pairs = zip(kept, wanted, strict=True)
                    inside = tuple(slice(max(0, w.start - k.start), min(w.stop, k.stop) - k.start) for k, w in pairs)
                    winners = self._slab(archive, number).predicted()[inside]
                    counts += np.bincount(winners.ravel(), minlength=self.shape[0])
        return np.asarray(counts / max(counts.sum(), 1))

    def _assembled(self, read: Callable[[zipfile.ZipFile, int], NDArray[Any]]) -> NDArray[Any]:
        out: NDArray[Any] | None = None
        with zipfile.ZipFile(self.path) as archive:
            for number, box in enumerate(self._boxes):
                part = read(archive, number)
                out = np.empty(self.shape[1:], part.dtype) if out is None else out
                out[box] = part
        assert out is not None, "an archive has at least one slab"
        return out

    def _slab(self, archive: zipfile.ZipFile, number: int) -> ArchivedSlab:
        total, spread = (
            np.stack([self._kept(archive, number, name, c) for c in range(self.shape[0])]) for name in ("sum", "spread")
        )
        entropy, predictive = (_read(archive, f"{number}.{name}.npy") for name in ("entropy", "predictive"))
        return ArchivedSlab(total, spread, entropy, self.count, None, predictive)

    @staticmethod
    def _kept(archive: zipfile.ZipFile, number: int, name: str, c: int) -> Array:
        return _read(archive, f"{number}.{name}.{c}.npy").astype(np.float32)


@dataclass(frozen=True, eq=False)
class ArchivedSlab(Moments):
    """Moments of a slab in memory, with the predictive entropy that was computed before rounding."""

    predictive_xyz: Array | None = None

    def predictive_entropy(self) -> Array:
        """Entropy of the mean (X, Y, Z), in nats, as it was before the sums were rounded."""
        assert self.predictive_xyz is not None, "an archive holds it"
        return self.predictive_xyz.copy()


def _touch(one: slice, two: slice) -> bool:
    return bool(one.start < two.stop and two.start < one.stop)


def _write(archive: zipfile.ZipFile, name: str, values: NDArray[Any]) -> None:
    with archive.open(name, "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, np.ascontiguousarray(values), allow_pickle=False)


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(name) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
