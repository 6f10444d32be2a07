# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The oracle: labels of a simulated annotator from ground truth, which stays in the referee."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, generate_binary_structure

AREAS = ("inside", "border")


def child_rng(seed: int, *purpose: object) -> np.random.Generator:
    """Generator keyed by (seed, purpose), so that no draw depends on how many came before it."""
    words = " ".join(str(p) for p in purpose).encode()
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def draw_hints(
    label_xyz: NDArray[np.uint8], labels: Mapping[str, int], image: str, per_area: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Voxels a person would point at while screening: up to `per_area` of every class and area.

    inside = every voxel of the class; border = class minus its erosion by the 6-neighbour ball(1), where outside of
    the image counts as background (nnActive specification, section 4.6).
    """
    hints: list[dict[str, Any]] = []
    ball = generate_binary_structure(3, 1)
    for name, value in labels.items():
        mask_xyz = label_xyz == value
        border_xyz = mask_xyz & ~binary_erosion(mask_xyz, ball, border_value=0)
        for area, area_xyz in zip(AREAS, (mask_xyz, border_xyz), strict=True):
            flat = np.flatnonzero(area_xyz)
            drawn = rng.choice(flat, size=min(per_area, flat.size), replace=False)
            voxels = np.stack(np.unravel_index(drawn, label_xyz.shape), axis=-1)
            hints += [{"image": image, "voxel": voxel, "class": name, "area": area} for voxel in voxels.tolist()]
    return hints


def region_slices(region: Mapping[str, Any]) -> tuple[slice, ...]:
    """Index that cuts a region of the server's answer out of its image."""
    return tuple(slice(a, a + d) for a, d in zip(region["start"], region["size"], strict=True))


def count_voxels(label_xyz: NDArray[np.uint8], region: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, int]:
    """Voxels of every class inside one region."""
    box_xyz = label_xyz[region_slices(region)]
    return {name: int(np.count_nonzero(box_xyz == value)) for name, value in labels.items()}


def to_nifti(label_xyz: NDArray[np.uint8], affine: NDArray[np.float64]) -> bytes:
    """A label map as the bytes of a .nii.gz file; the same array gives the same bytes."""
    return gzip.compress(nib.Nifti1Image(label_xyz, affine).to_bytes(), compresslevel=1, mtime=0)


def from_nifti(content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Label map and affine from the bytes of a .nii or .nii.gz file."""
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    volume = nib.Nifti1Image.from_bytes(plain)
    return np.asarray(volume.dataobj).astype(np.uint8), np.asarray(volume.affine, dtype=np.float64)
