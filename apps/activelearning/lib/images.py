# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Reading and writing volumes on their own grid, with errors that name the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from lib.files import atomic_path
from lib.regions import Triple

AFFINE_TOLERANCE_MM = 1e-3
# File names a volume may have; where one id has several, the first of these counts.
EXTENSIONS = (".nii.gz", ".nii", ".nrrd")


class ImageError(ValueError):
    """A volume that cannot be used; the message names the file, what was found and what to do."""


@dataclass(frozen=True)
class Volume:
    """Voxels (X, Y, Z) in the stored axis order, the 4 x 4 affine to RAS millimetres, and the file they came from."""

    array_xyz: NDArray[Any]
    affine: NDArray[np.float64]
    path: str

    @property
    def shape(self) -> Triple:
        x, y, z = self.array_xyz.shape
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres a voxel along each stored axis."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def load_image(path: str | Path) -> Volume:
    """An image as float32.

    Raises:
        ImageError: unreadable, not three-dimensional, or holding NaN or infinite values.
    """
    volume = _load(path)
    array_xyz = volume.array_xyz.astype(np.float32)
    bad = int(array_xyz.size - np.count_nonzero(np.isfinite(array_xyz)))
    if bad:
        raise ImageError(
            f"{Path(path).name}: {bad} voxels are NaN or infinite; repair the image or take it out of the pool"
        )
    return Volume(array_xyz, volume.affine, str(path))


def load_label(path: str | Path) -> Volume:
    """A label map as uint8.

    Raises:
        ImageError: unreadable, not three-dimensional, or holding values that are not whole numbers from 0 to 255.
    """
    volume = _load(path)
    if volume.array_xyz.dtype == np.uint8:
        return volume
    values = np.unique(volume.array_xyz)
    if not np.all(np.isfinite(values)) or values.min() < 0 or values.max() > 255 or np.any(values != np.round(values)):
        shown = ", ".join(f"{v:g}" for v in values[:8])
        raise ImageError(f"{Path(path).name}: label values must be whole numbers from 0 to 255, found {shown}")
    return Volume(volume.array_xyz.astype(np.uint8), volume.affine, str(path))


def image_geometry(path: str | Path) -> tuple[Triple, NDArray[np.float64]]:
    """Shape and affine from the header alone, without reading voxels.

    Raises:
        ImageError: unreadable or not three-dimensional.
    """
    if not _is_nifti(path):
        volume = _load(path)
        return volume.shape, volume.affine
    image = _open(path)
    return _three(image.shape, path), np.asarray(image.affine, dtype=np.float64)


def check_same_grid(label: Volume, shape: Triple, affine: NDArray[np.float64], image: str) -> None:
    """Refuses a label map that does not lie on the grid of its image.

    Raises:
        ImageError: shapes differ, or affines differ by more than a thousandth of a millimetre.
    """
    name = Path(label.path).name
    if label.shape != shape:
        raise ImageError(
            f"{name}: the label for {image} has shape {label.shape}, the image has {shape}; "
            "export the label on the grid of the image"
        )
    if not np.allclose(label.affine, affine, atol=AFFINE_TOLERANCE_MM):
        raise ImageError(
            f"{name}: the affine of the label for {image} differs from the image's by up to "
            f"{np.abs(label.affine - affine).max():.4g} mm; export the label on the grid of the image"
        )


def save_label(path: Path, array_xyz: NDArray[np.uint8], affine: NDArray[np.float64]) -> None:
    """Writes a label map as NIfTI (uint8), whole or not at all."""
    with atomic_path(path) as temporary:
        image = nib.Nifti1Image(array_xyz, affine)
        image.header.set_data_dtype(np.uint8)
        nib.save(image, temporary)


def _is_nifti(path: str | Path) -> bool:
    return str(path).lower().endswith((".nii", ".nii.gz"))


def _open(path: str | Path) -> Any:
    try:
        return nib.load(str(path))
    except FileNotFoundError:
        raise ImageError(f"{Path(path).name}: no such file; restore it or refresh the studies folder") from None
    except Exception as error:
        raise ImageError(f"{Path(path).name}: not readable as NIfTI ({error}); replace the file") from error


def _load(path: str | Path) -> Volume:
    if not _is_nifti(path):
        return _load_with_monai(path)
    image = _open(path)
    _three(image.shape, path)
    try:
        array = np.asanyarray(image.dataobj)
    except Exception as error:
        raise ImageError(
            f"{Path(path).name}: the file ends early or is damaged ({type(error).__name__}); replace the file"
        ) from error
    return Volume(array.reshape(_three(image.shape, path)), np.asarray(image.affine, dtype=np.float64), str(path))


def _load_with_monai(path: str | Path) -> Volume:
    from monai.transforms import LoadImage

    try:
        image = LoadImage(image_only=True, ensure_channel_first=False)(str(path))
        array, affine = np.asarray(image), np.asarray(image.affine, dtype=np.float64)
    except Exception as error:
        raise ImageError(f"{Path(path).name}: not readable as an image ({error}); replace the file") from error
    return Volume(array.reshape(_three(array.shape, path)), affine, str(path))


def _three(shape: tuple[int, ...], path: str | Path) -> Triple:
    kept = tuple(int(n) for n in shape)
    while len(kept) > 3 and kept[-1] == 1:
        kept = kept[:-1]
    if len(kept) != 3 or min(kept) < 1:
        raise ImageError(f"{Path(path).name}: expected a volume of three axes, found shape {tuple(shape)}")
    return kept[0], kept[1], kept[2]
