# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The merged label maps on disk: one file an image, known by its digest, written by one thread or process at a time."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from lib.partial_labels import LabelMap
from lib.regions import Triple
from lib.storage.atomic_files import write_atomic
from lib.storage.volumes import LABEL_EXTENSIONS

# A label map is long runs of few values: harder compression costs twice the time and saves little of a small file.
_GZIP_LEVEL = 1
_GZIP_WINDOW = 31  # zlib's name for its largest window inside of a gzip file
# Bytes of a NIfTI-1 header, and the offset of the voxels; the four bytes between them announce extensions, here none.
_HEADER_BYTES, _DATA_OFFSET = 348, 352
_POLL_SECONDS = 0.005
_LOCKS = 64


class MergedLabels:
    """Label maps `<folder>/<image>.nii.gz`.

    Args:
        folder: where clients and trainings read them (tag `final`).
        locks: folder for empty lock files.
    """

    def __init__(self, folder: Path, locks: Path) -> None:
        self.folder = folder
        self.locks = locks

    @contextmanager
    def locked(self, image: str) -> Iterator[None]:
        """Lock of an image across threads and processes, so that no change of its label is based on an outdated one."""
        self.locks.mkdir(parents=True, exist_ok=True)
        # A few files for all images; that two of them now and then share one costs a short wait.
        name = f"{zlib.crc32(image.encode()) % _LOCKS}.lock"
        with FileLock(self.locks / name, poll_interval=_POLL_SECONDS):
            yield

    def path(self, image: str) -> Path:
        """File of an image's label; it may not be there."""
        return self.folder / f"{image}.nii.gz"

    def read(self, image: str, shape: Triple, sha256: str) -> LabelMap | None:
        """The label if its file is the one of this digest and shape, else None."""
        try:
            content = self.path(image).read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest() != sha256:
            return None
        raw = gzip.decompress(content)
        header = nib.Nifti1Header(raw[:_HEADER_BYTES])
        if header.get_data_shape() != shape:
            return None
        return np.frombuffer(raw, np.uint8, offset=_DATA_OFFSET).reshape(shape, order="F")

    def write(self, image: str, label_xyz: LabelMap, affine: NDArray[np.float64]) -> str:
        """Replace the label atomically; return the digest of its file."""
        nifti = nib.Nifti1Image(label_xyz, affine)
        nifti.header.set_data_dtype(np.uint8)
        nifti.header["vox_offset"] = _DATA_OFFSET
        nifti.header.set_slope_inter(1, 0)
        # In pieces, so that the voxels are not copied; without a time in its header, the same label is the same file.
        packer = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW)
        head = nifti.header.binaryblock.ljust(_DATA_OFFSET, b"\0")
        voxels = label_xyz.ravel(order="F").data
        content = packer.compress(head) + packer.compress(voxels) + packer.flush()
        write_atomic(self.path(image), lambda stream: stream.write(content))
        return hashlib.sha256(content).hexdigest()

    def remove(self, image: str) -> None:
        """Remove the label in every format."""
        for extension in LABEL_EXTENSIONS:
            (self.folder / f"{image}{extension}").unlink(missing_ok=True)
