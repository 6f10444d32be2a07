# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Readers of volume files: the library per format for the grid and for the voxels.

| format | grid | voxels |
| --- | --- | --- |
| NIfTI | ITK, from the header alone | nibabel, in index order |
| NRRD, MetaImage (`.mha`) | ITK | ITK |

3D Slicer reads all of them with ITK. Readers disagree about a NIfTI whose qform, sform, scale or units contradict
each other. Frames and labels lie on the client's grid, so the grid is ITK's. nibabel reads the voxels of a NIfTI, since
it can read slabs and ignores the extensions of a header.
"""

from __future__ import annotations

import bz2
import functools
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from lib.storage.volume_headers import (
    ImageError,
    check_nifti,
    check_volume_file,
    is_nifti,
    one_line,
    packed_by_bzip2,
    split_nrrd,
)

# Cosine between two axes from which on a volume counts as sheared; ITK refuses less in a NIfTI (below 1e-4).
MOST_SHEAR = 1e-4
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_VOXELS_AT = 352
# Where an error was raised, as ITK, SimpleITK and nrrdio put it before the cause.
_PLACE = re.compile(r"^(?:\[nrrd\] \w+: |s?itk::ERROR: (?:\w+\(0x[0-9a-f]+\): )?)+")
_NIFTI2_HEADER_BYTES = 540


class Opened(NamedTuple):
    """Content of a volume file.

    Args:
        voxels: (X, Y, Z) in the stored axis order; more axes where the file has them.
        affine: 4 x 4, from voxels to RAS millimetres, as ITK reads it.
        stated: further affines that the header states. A label on any of them has the voxels of the image.
        declared: bytes of voxels that the header declares.
        components: values per voxel; where there are several they are the last axis.
    """

    voxels: Any
    affine: NDArray[np.float64]
    stated: tuple[NDArray[np.float64], ...]
    declared: int
    components: int = 1


def open_volume(path: str | Path, placed: bool = True) -> Opened:
    """Open a volume file; of a NIfTI no voxel is read yet.

    Args:
        placed: whether ITK must find a place for it. A label needs none that its image has not.

    Raises:
        ImageError: unreadable, or its axes are not at right angles.
    """
    return _open_nifti(Path(path), placed) if is_nifti(path) else _open_with_itk(Path(path))


def why_unopenable(path: str | Path) -> str | None:
    """Return the reason why 3D Slicer cannot open a volume that this app can read; None if it can."""
    name = Path(path).name
    if is_nifti(path) and check_nifti(Path(path))[0].sizeof_hdr == _NIFTI2_HEADER_BYTES:
        return f"{name}: 3D Slicer cannot open NIfTI-2 files; save the image as NIfTI-1 or NRRD"
    if packed_by_bzip2(Path(path)):
        return f"{name}: 3D Slicer cannot open NRRD files packed by bzip2; save the image with gzip encoding"
    return None


def _open_nifti(path: Path, placed: bool) -> Opened:
    header, declared = check_nifti(path)
    try:
        voxels = nib.arrayproxy.ArrayProxy(str(path), header, keep_file_open=True)
        forms = [header.get_best_affine(), *(form(coded=True)[0] for form in (header.get_qform, header.get_sform))]
    except Exception as error:
        raise ImageError(f"{path.name}: not readable as NIfTI ({one_line(error)}); replace the file") from error
    stated = tuple(form for form in forms if form is not None)
    try:
        affine = _nifti_affine(path, header)
    except ImageError:
        if placed:
            raise
        affine = stated[0]
    return Opened(voxels, affine, stated, declared)


def _nifti_affine(path: Path, header: Any) -> NDArray[np.float64]:
    """Affine that ITK finds in a NIfTI header.

    ITK reads a copy of the header only, without the extensions and the size of a hostile file. NIfTI-2 is converted to
    NIfTI-1, the only version that ITK supports.
    """
    first = nib.Nifti1Header(endianness=header.endianness)
    try:
        for name in {*first} & {*header} - {"sizeof_hdr", "magic", "vox_offset"}:
            first[name] = header[name]
        first["vox_offset"] = _VOXELS_AT
        with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
            copy = Path(folder) / "header.nii"
            copy.write_bytes(first.binaryblock.ljust(_VOXELS_AT, b"\0"))
            return _affine(_information(copy))
    except Exception as error:
        if "orthonormal" in str(error):
            raise ImageError(
                f"{path.name}: neither its qform nor its sform has axes at right angles, so 3D Slicer cannot place it; "
                "resample the volume to right angles and save it again"
            ) from error
        raise ImageError(
            f"{path.name}: its header gives the voxels no size or place ({_reason(error)}); repair the header"
        ) from error


def _open_with_itk(path: Path) -> Opened:
    declared = check_volume_file(path)
    try:
        with _as_itk_takes_it(path) as taken:
            reader = _information(taken)
            found = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
            if found > declared:
                raise ValueError(f"ITK finds {found} voxels in {declared} bytes")
            image = reader.Execute()
        voxels = _itk().GetArrayFromImage(image)
    except Exception as error:
        raise ImageError(f"{path.name}: not readable as an image ({_reason(error)}); replace the file") from error
    axes = image.GetDimension()
    voxels = np.moveaxis(voxels, range(axes), range(axes)[::-1])
    affine = _affine(reader)
    axes_xyz = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), np.finfo(float).tiny)
    if np.abs(axes_xyz.T @ axes_xyz - np.eye(3)).max() > MOST_SHEAR:
        raise ImageError(
            f"{path.name}: its axes are not at right angles; resample the volume to right angles and save it again"
        )
    return Opened(voxels, affine, (), declared, image.GetNumberOfComponentsPerPixel())


@contextmanager
def _as_itk_takes_it(path: Path) -> Iterator[Path]:
    """The file, or a copy with plain voxels: ITK's NRRD reader is built without bzip2."""
    if not packed_by_bzip2(path):
        yield path
        return
    header, packed = split_nrrd(path)
    plain = re.sub(rb"(?im)^encoding:.*$", b"encoding: raw", header)
    with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
        copy = Path(folder) / "plain.nrrd"
        copy.write_bytes(plain + bz2.decompress(packed))
        yield copy


def _information(path: Path) -> Any:
    """ITK's reader of a file, with the header read.

    Raises:
        RuntimeError: ITK cannot read it.
    """
    reader = _itk().ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _reason(error: Exception) -> str:
    """Return the last line of an error of ITK, where the cause stands, without source files, addresses and paths."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause = _PLACE.sub("", lines[-1]) if lines else ""
    return one_line(ValueError(re.sub(r"\S*/", "", cause))) if cause else type(error).__name__


def _affine(reader: Any) -> NDArray[np.float64]:
    """Affine to RAS of the first three axes; ITK works in LPS."""
    axes = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3]
    spacing, origin = reader.GetSpacing()[:3], reader.GetOrigin()[:3]
    affine = np.eye(4)
    affine[: len(origin), : len(spacing)] = direction @ np.diag(spacing)
    affine[: len(origin), 3] = origin
    return _RAS_FROM_LPS @ affine


@functools.cache
def _itk() -> Any:
    import SimpleITK

    itk: Any = SimpleITK
    # Its warnings contain the name of a temporary file; the relevant ones are errors here.
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return itk
