# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Acquisition: the grid a scene is scanned on, the scanner's noise and grey values, the orientation of the file."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from phantom.scene import Scene, Warp, Waves, paint, slabs

Spacing = tuple[float, float, float]
Size = tuple[int, int, int]
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPS")
MIXED = "mixed"


@dataclass(frozen=True)
class Knobs:
    """Settings of the command line; `difficulty` 0 is easy, 0.5 normal, 1 hard; `variation` 0 gives one scanner."""

    difficulty: float = 0.5
    spacing: Spacing | None = None
    scale: float = 1.0
    shape: Size | None = None
    pathology: float | None = None
    variation: float = 1.0
    orientation: str = "RAS"

    @property
    def contrast(self) -> float:
        """Factor on the contrast between tissues: 1.5, 1, 0.67 for easy, normal, hard."""
        return float(1.5 ** (1 - 2 * self.difficulty))

    @property
    def noise(self) -> float:
        """Factor on the noise: 0.5, 1, 2 for easy, normal, hard."""
        return float(2 ** (2 * self.difficulty - 1))

    @property
    def softness(self) -> float:
        """Factor on the width of edges: 0.71, 1, 1.41 for easy, normal, hard."""
        return float(2 ** (self.difficulty - 0.5))

    @property
    def lookalikes(self) -> float:
        """Factor on the number of structures that resemble a class without being one: 0, 1, 2."""
        return 2 * self.difficulty


@dataclass(frozen=True)
class Phantom:
    """One case for writing: image and label (X, Y, Z) in the file's axis order, affine to RAS mm, and its contents."""

    image_xyz: NDArray[np.int16]
    label_xyz: NDArray[np.uint8]
    affine: NDArray[np.float64]
    findings: tuple[str, ...]


def grid(knobs: Knobs, field_mm: Spacing, spacing: Spacing) -> tuple[Size, Spacing]:
    """Voxels and spacing (mm) of a preset: its own spacing over its own field of view, unless an option changes them.

    `spacing` keeps the field of view, and so does `shape`; both together crop or extend it. `scale` s replaces one
    voxel by s along each axis.
    """
    wanted = knobs.spacing or spacing
    if knobs.shape is not None and knobs.spacing is None:
        wanted = tuple(f / n for f, n in zip(field_mm, knobs.shape, strict=True))  # type: ignore[assignment]
    sx, sy, sz = (s / knobs.scale for s in wanted)
    nx, ny, nz = (max(1, round(f / s)) for f, s in zip(field_mm, (sx, sy, sz), strict=True))
    if knobs.shape is not None:
        nx, ny, nz = (max(1, round(n * knobs.scale)) for n in knobs.shape)
    return (nx, ny, nz), (sx, sy, sz)


def scan(rng: np.random.Generator, scene: Scene, warp: Warp, size: Size, spacing: Spacing, knobs: Knobs) -> Phantom:
    """Scan a scene: this patient's position, spacing and noise, then whole grey values, slab by slab.

    Spacing varies by up to 6 % in plane (8 % between slices), the noise by about a quarter, the centre of the field
    of view by a few mm, all times `variation`.
    """
    v = knobs.variation
    stretch = 1 + v * rng.uniform(-1, 1, size=2) * (0.06, 0.08)
    if knobs.spacing is not None or knobs.shape is not None:
        stretch = np.ones(2)  # the spacing was requested
    steps = np.round(np.array([spacing[0] * stretch[0], spacing[1] * stretch[0], spacing[2] * stretch[1]]), 4)
    shift = v * rng.normal(0, 1, size=3) * (3.0, 3.0, 2.0)
    noise = scene.noise * knobs.noise * float(np.exp(0.22 * v * rng.normal()))
    grain = Waves.draw(rng, (8.0, 25.0), count=10)
    bias = Waves.draw(rng, (150.0, 400.0), count=4)
    gain = float(np.exp(rng.uniform(np.log(200), np.log(8000))))
    key = int(rng.integers(2**32))
    axes = [
        ((np.arange(n) - (n - 1) / 2) * s + d).astype(np.float32) for n, s, d in zip(size, steps, shift, strict=True)
    ]

    image_xyz = np.empty(size, np.int16)
    label_xyz = np.empty(size, np.uint8)
    for slab in slabs(size):
        part_axes = (axes[0], axes[1], axes[2][slab])
        values, labels = paint(scene, warp, grain, part_axes, knobs.contrast, scene.edge * knobs.softness)
        if scene.bias:
            points_mm = np.stack(np.meshgrid(*part_axes, indexing="ij"), axis=-1)
            values *= np.exp(np.float32(scene.bias * knobs.softness) * bias.at(points_mm))
        for z in range(values.shape[2]):
            # One generator a slice: the slab's thickness never shows in the noise.
            slice_rng = np.random.default_rng([key, slab.start + z])
            make = _hounsfield if scene.modality == "CT" else _magnitude
            image_xyz[:, :, slab.start + z] = make(slice_rng, values[:, :, z], noise, gain)
        label_xyz[:, :, slab] = labels
    origin = np.round(rng.uniform(-60, 60, size=3), 1)
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = origin
    code = str(rng.choice(ORIENTATIONS)) if knobs.orientation == MIXED else knobs.orientation
    return _oriented(image_xyz, label_xyz, affine, code, scene.findings)


def _hounsfield(
    rng: np.random.Generator, values_xy: NDArray[np.float32], noise: float, gain: float
) -> NDArray[np.int16]:
    """HU with noise correlated over neighbouring pixels, as after reconstruction; the gain of CT is fixed."""
    grains_xy = gaussian_filter(rng.standard_normal(values_xy.shape, np.float32), 0.6)
    # 0.496 is the standard deviation that the filter leaves of white noise.
    return np.clip(np.round(values_xy + noise / 0.496 * grains_xy), -1024, 3071).astype(np.int16)


def _magnitude(
    rng: np.random.Generator, values_xy: NDArray[np.float32], noise: float, gain: float
) -> NDArray[np.int16]:
    """MR magnitude |s + n| of a complex signal with noise in both channels, times the gain of the case."""
    real, imaginary = noise * rng.standard_normal((2, *values_xy.shape), np.float32)
    return np.clip(np.round(gain * np.hypot(values_xy + real, imaginary)), 0, 32_000).astype(np.int16)


def _oriented(
    image_xyz: NDArray[np.int16],
    label_xyz: NDArray[np.uint8],
    affine: NDArray[np.float64],
    code: str,
    findings: tuple[str, ...],
) -> Phantom:
    """The same patient, stored in another axis order: every voxel keeps its place in mm."""
    there = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code))
    affine = affine @ nib.orientations.inv_ornt_aff(there, image_xyz.shape)
    return Phantom(
        nib.orientations.apply_orientation(image_xyz, there),
        nib.orientations.apply_orientation(label_xyz, there),
        affine,
        findings,
    )
