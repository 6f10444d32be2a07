# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Reading and writing volumes on their own grid, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from lib.regions import Box, Triple
from lib.storage.atomic_files import atomic_path
from lib.storage.placement import Placement, place
from lib.storage.readers import open_volume
from lib.storage.segments import one_layer, read_segments
from lib.storage.volume_headers import ImageError

# Remainder of a whole number after the slope of a header, which has 24 bits: 255 x 2^-24, rounded up.
ROUNDING = 2e-5
SLAB_VOXELS = 2**22
# Scans compress to between a half and a tenth. Larger and better compressed files are made to exhaust memory.
LARGE_BYTES, MOST_PACKED = 2**28, 100
_FLAT = 1e-12
# File names a volume may have; where one id has several, the first of these counts.
EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha")
# As 3D Slicer saves segments; of labels of one id it counts last.
SEGMENTATION = ".seg.nrrd"
LABEL_EXTENSIONS = (*EXTENSIONS, SEGMENTATION)


class Grid(NamedTuple):
    """Shape, affine and name of an image, and further affines that its header states."""

    shape: Triple
    affine: NDArray[np.float64]
    name: str
    stated: tuple[NDArray[np.float64], ...] = ()


@dataclass(frozen=True)
class Volume:
    """Voxels (X, Y, Z) in the stored axis order, the 4 x 4 affine to RAS millimetres, and the file they came from.

    `stated` are further affines that the header states (`lib.storage.readers`). Of a label map, `label_info` are the
    names and values that its file states, and `moved` is whether its voxels were put into the axes of its image.
    """

    array_xyz: NDArray[Any]
    affine: NDArray[np.float64]
    path: str
    stated: tuple[NDArray[np.float64], ...] = ()
    label_info: list[dict[str, Any]] | None = None
    moved: bool = False

    @property
    def shape(self) -> Triple:
        x, y, z = self.array_xyz.shape
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres per voxel along each stored axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def load_image(path: str | Path) -> Volume:
    """An image as float32.

    Raises:
        ImageError: unreadable, not three-dimensional, or holding NaN or infinite values.
    """
    source = _Source.of(path)
    array_xyz, bad = np.empty(source.shape, np.float32, order="F"), 0
    for start, slab_xyz in source.slabs():
        kept = array_xyz[..., start : start + slab_xyz.shape[2]]
        with np.errstate(over="ignore"):
            kept[...] = slab_xyz
        bad += int(kept.size - np.count_nonzero(np.isfinite(kept)))
    _refuse_bad(path, bad)
    return Volume(array_xyz, source.affine, str(path), source.stated)


def load_crop(path: str | Path, box: Box) -> NDArray[np.float32]:
    """Voxels of a box (start, size) of an image, as `load_image` has them; of a NIfTI no others are converted.

    Raises:
        ImageError: unreadable, not three-dimensional, or NaN or infinite values in the box.
    """
    source = _Source.of(path)
    try:
        cut = tuple(slice(a, a + d) for a, d in zip(*box, strict=True))
        rest = (0,) * (len(source.voxels.shape) - 3)
        found = np.asarray(source.voxels[(*cut, *rest)], dtype=np.float32)
    except Exception as error:
        raise source.damaged(error) from error
    _refuse_bad(path, int(found.size - np.count_nonzero(np.isfinite(found))))
    return found


def check_image(path: str | Path, uploaded: bool = False) -> None:
    """Read an image as `load_image` does, but keep none of it: memory use does not grow with the file.

    Args:
        uploaded: whether it comes from an untrusted client; then files that compress unlike a scan are refused as well.

    Raises:
        ImageError: as `load_image`, or a file that unpacks to far more than a scan of its size would.
    """
    source, packed = _Source.of(path), Path(path).stat().st_size
    if uploaded and source.declared > max(LARGE_BYTES, MOST_PACKED * packed):
        raise ImageError(
            f"{Path(path).name}: {packed:,} bytes that unpack to {source.declared / 2**20:,.0f} MiB are not a scan; "
            "upload a scan, or put the file into the studies folder"
        )
    bad = 0
    for _, slab_xyz in source.slabs():
        with np.errstate(over="ignore"):
            bad += int(slab_xyz.size - np.count_nonzero(np.isfinite(slab_xyz.astype(np.float32))))
    _refuse_bad(path, bad)


def load_label(path: str | Path, like: Grid | None = None) -> Volume:
    """A label map as uint8.

    Axes that are flipped or permuted are put into those of the image. Segments of 3D Slicer become one label map
    (`lib.storage.segments`), and their file may hold a part of the image or more than it.

    Args:
        like: grid of the image it belongs to; then it is compared before voxels of a NIfTI are read, so that reading
            takes no more memory than the image's voxels.

    Raises:
        ImageError: unreadable, not three-dimensional, on another grid than its image, or holding values that are not
            whole numbers from 0 to 255.
    """
    source = _Source.of(path, placed=False, layers=True)
    segments = read_segments(Path(path), source.components)
    grid = Grid(*like) if like is not None else None
    placement = _placement(source, grid, bool(segments)) if grid else None
    info: list[dict[str, Any]] | None = None
    if segments:
        array_xyz, info = one_layer(np.asarray(source.voxels).reshape(*source.shape, -1), segments, Path(path).name)
    elif source.components > 1:
        raise source.many_values()
    else:
        array_xyz = _whole_numbers(source)
    if grid is None or placement is None or placement.is_plain(grid.shape):
        return Volume(array_xyz, source.affine, str(path), source.stated, info)
    array_xyz, lost = placement.put(array_xyz, grid.shape)
    if lost:
        raise ImageError(
            f"{Path(path).name}: {lost} voxels of its segments lie outside of {grid.name}; remove them and submit again"
        )
    return Volume(array_xyz, grid.affine, str(path), grid.stated, info, moved=True)


def _whole_numbers(source: _Source) -> NDArray[np.uint8]:
    array_xyz = np.empty(source.shape, np.uint8, order="F")
    for start, slab_xyz in source.slabs():
        if slab_xyz.dtype != np.uint8:
            values = np.unique(slab_xyz)
            near = np.round(values)
            if not np.all(np.isfinite(values)) or np.any(
                (near < 0) | (near > 255) | (np.abs(values - near) > ROUNDING)
            ):
                shown = ", ".join(f"{v:.9g}" for v in values[:8])
                raise ImageError(
                    f"{Path(source.path).name}: label values must be whole numbers from 0 to 255, found {shown}"
                )
            slab_xyz = np.round(slab_xyz)
        array_xyz[..., start : start + slab_xyz.shape[2]] = slab_xyz
    return array_xyz


def image_geometry(path: str | Path) -> tuple[Triple, NDArray[np.float64]]:
    """Shape and affine from the header alone, without reading voxels.

    Raises:
        ImageError: unreadable or not three-dimensional.
    """
    source = _Source.of(path)
    return source.shape, source.affine


def image_grid(path: str | Path, name: str) -> Grid:
    """Grid of an image, for the labels of it, from the header alone.

    Raises:
        ImageError: as `image_geometry`.
    """
    source = _Source.of(path)
    return Grid(source.shape, source.affine, name, source.stated)


def check_label_file(path: str | Path, like: Grid) -> None:
    """Refuse a file, by its header alone, that is not a label map of an image of this shape, affine and name.

    Raises:
        ImageError: unreadable, or on another grid.
    """
    source = _Source.of(path, placed=False, layers=True)
    _placement(source, Grid(*like), bool(read_segments(Path(path), source.components)))


def _placement(label: _Source, grid: Grid, parts: bool) -> Placement:
    """Place of a label map on the grid of its image.

    A header may state several affines, of which readers take different ones. A label that shares one of them with its
    image lies on the same voxels.

    Args:
        parts: whether the label may hold a part of the image, or more than it.

    Raises:
        ImageError: shapes differ, or affines differ by more than a thousandth of a millimetre.
    """
    name, shape = Path(label.path).name, grid.shape
    found = place((label.affine, *label.stated), label.shape, (grid.affine, *grid.stated))
    if found is not None and (parts or found.covers(shape)):
        return found
    if label.shape != shape:
        raise ImageError(
            f"{name}: the label for {grid.name} has shape {label.shape}, the image has {shape}; "
            "export the label on the grid of the image"
        )
    raise ImageError(
        f"{name}: the affine of the label for {grid.name} differs from the image's by up to "
        f"{np.abs(label.affine - grid.affine).max():.4g} mm; export the label on the grid of the image"
    )


def save_label(path: Path, array_xyz: NDArray[np.uint8], affine: NDArray[np.float64]) -> None:
    """Write a label map as NIfTI (uint8), atomically."""
    with atomic_path(path) as temporary:
        image = nib.Nifti1Image(array_xyz, affine)
        image.header.set_data_dtype(np.uint8)
        nib.save(image, temporary)


@dataclass(frozen=True)
class _Source:
    """An opened volume: its grid, the bytes of voxels its header declares, and the voxels, slab by slab."""

    path: str
    shape: Triple
    affine: NDArray[np.float64]
    stated: tuple[NDArray[np.float64], ...]
    declared: int
    voxels: Any
    components: int

    @classmethod
    def of(cls, path: str | Path, placed: bool = True, layers: bool = False) -> _Source:
        voxels, affine, stated, declared, components = open_volume(path, placed)
        shape = _three(voxels.shape[: len(voxels.shape) - (components > 1)], path)
        if not np.all(np.isfinite(affine)) or abs(np.linalg.det(affine[:3, :3])) < _FLAT:
            raise ImageError(f"{Path(path).name}: its header gives the voxels no size or place; repair the affine")
        source = cls(str(path), shape, affine, stated, declared, voxels, components)
        if components > 1 and not layers:
            raise source.many_values()
        return source

    def many_values(self) -> ImageError:
        """The refusal of a file that holds several values per voxel."""
        return ImageError(
            f"{Path(self.path).name}: each voxel holds {self.components} values, expected one; store one channel per "
            "file, and segments that overlap with their names in a .seg.nrrd"
        )

    def slabs(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Index of the first slice and the values of some slices, one slab after the other.

        Raises:
            ImageError: the voxels cannot be read.
        """
        depth = max(1, SLAB_VOXELS // (self.shape[0] * self.shape[1]))
        rest = (0,) * (len(self.voxels.shape) - 3)
        for start in range(0, self.shape[2], depth):
            try:
                slab_xyz = np.asanyarray(self.voxels[(slice(None), slice(None), slice(start, start + depth), *rest)])
            except Exception as error:
                raise self.damaged(error) from error
            yield start, slab_xyz

    def damaged(self, error: Exception) -> ImageError:
        """The refusal of a file whose voxels cannot be read."""
        return ImageError(
            f"{Path(self.path).name}: the file ends early or is damaged ({type(error).__name__}); replace the file"
        )


def _refuse_bad(path: str | Path, bad: int) -> None:
    if bad:
        raise ImageError(
            f"{Path(path).name}: {bad} voxels are NaN or infinite; repair the image or take it out of the pool"
        )


def _three(shape: tuple[int, ...], path: str | Path) -> Triple:
    kept = tuple(int(n) for n in shape)
    while len(kept) > 3 and kept[-1] == 1:
        kept = kept[:-1]
    if len(kept) != 3 or min(kept) < 1:
        raise ImageError(f"{Path(path).name}: expected a volume of three axes, found shape {tuple(shape)}")
    return kept[0], kept[1], kept[2]
