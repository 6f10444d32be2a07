# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Volumes of a dataset: voxels by nibabel, and the grid that ITK finds in a header, as 3D Slicer and the server do."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from eval.errors import RefereeError

TOLERANCE_MM = 1e-3
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_VOXELS_AT = 352


class VolumeFile(NamedTuple):
    """Values (X, Y, Z), the affine to RAS millimetres, and further affines that the header states."""

    values_xyz: NDArray[np.float32]
    affine: NDArray[np.float64]
    stated: tuple[NDArray[np.float64], ...]

    def shares_grid(self, other: VolumeFile) -> bool:
        """Return whether both have one shape, and an affine that both headers state.

        Readers take different affines of a header that states several, so a label that shares any of them was drawn on
        these voxels.
        """
        pairs = ((a, b) for a in (self.affine, *self.stated) for b in (other.affine, *other.stated))
        same = any(np.allclose(a, b, atol=TOLERANCE_MM) for a, b in pairs)
        return same and self.values_xyz.shape == other.values_xyz.shape


def read_volume(path: Path, placed: bool = True) -> VolumeFile:
    """Read one NIfTI file; a label needs no place (`placed`) that its image has not.

    Raises:
        RefereeError: missing, corrupt or truncated file, another number of axes than three, or axes that are not at
            right angles.
    """
    try:
        volume: Any = nib.load(path)
        values_xyz = np.asarray(volume.dataobj, dtype=np.float32)
    except Exception as error:  # nibabel, gzip and zlib each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefereeError(f"{path} cannot be read as NIfTI ({reason}); replace the file or remove the case") from error
    while values_xyz.ndim > 3 and values_xyz.shape[-1] == 1:
        values_xyz = values_xyz[..., 0]
    if values_xyz.ndim != 3:
        raise RefereeError(f"{path} has shape {values_xyz.shape}; a scan with three axes and one channel is needed")
    forms = [volume.affine, *(form(coded=True)[0] for form in (volume.get_qform, volume.get_sform))]
    stated = tuple(form for form in forms if form is not None)
    try:
        affine = _affine(path, volume.header)
    except RefereeError:
        if placed:
            raise
        affine = stated[0]
    return VolumeFile(values_xyz, affine, stated)


def read_affine(path: Path) -> NDArray[np.float64]:
    """Affine to RAS millimetres of one NIfTI file, from its header.

    Raises:
        RefereeError: as `read_volume`.
    """
    try:
        header: Any = nib.load(path).header
    except Exception as error:
        raise RefereeError(f"{path} cannot be read as NIfTI ({error}); replace the file or remove the case") from error
    return _affine(path, header)


def check_openable(path: Path) -> None:
    """Refuse an image that 3D Slicer cannot open, which a server leaves out of its pool.

    Raises:
        RefereeError: NIfTI-2.
    """
    if isinstance(nib.load(path), nib.Nifti2Image):
        raise RefereeError(f"{path} is NIfTI-2, which 3D Slicer cannot open; save it as NIfTI-1")


def _affine(path: Path, header: Any) -> NDArray[np.float64]:
    """Affine that ITK finds in a header; it gets a copy without voxels, as NIfTI-1."""
    first = nib.Nifti1Header(endianness=header.endianness)
    try:
        for name in set(first.keys()) & set(header.keys()) - {"sizeof_hdr", "magic", "vox_offset"}:
            first[name] = header[name]
        first["vox_offset"] = _VOXELS_AT
        with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
            copy = Path(folder) / "header.nii"
            copy.write_bytes(first.binaryblock.ljust(_VOXELS_AT, b"\0"))
            reader = _itk().ImageFileReader()
            reader.SetFileName(str(copy))
            reader.ReadImageInformation()
        axes = reader.GetDimension()
        direction = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3]
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = direction @ np.diag(reader.GetSpacing()[:3]), reader.GetOrigin()[:3]
    except Exception as error:
        reason = " ".join(str(error).split())[-200:]
        raise RefereeError(
            f"{path}: ITK, and so 3D Slicer, cannot place it ({reason}); resample it to axes at right angles"
        ) from error
    return _RAS_FROM_LPS @ affine


@functools.cache
def _itk() -> Any:
    import SimpleITK

    itk: Any = SimpleITK
    # Its warnings contain the name of a temporary file; the relevant ones are errors here.
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return itk
