# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Tubes: two adjacent curved structures along one bent line, among lookalikes of the same grey value.

Edges are soft, a bias field and noise lie over everything, and the grey values of every case have their own gain, as in
real MR scans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from phantom.acquisition import Knobs, grid


@dataclass(frozen=True)
class TubePreset:
    """Appearance of one family of phantoms; lengths in mm, intensities as fractions of the brightest tissue."""

    name: str
    labels: tuple[str, ...]
    shape: tuple[int, int, int]
    shape_jitter: int
    spacing: tuple[float, float, float]
    length: float
    bend: float
    radius: float
    edge: float
    tissue: float
    contrast: tuple[float, ...]
    lookalikes: int
    bias: float
    noise: float


TUBES: dict[str, TubePreset] = {
    "hippocampus": TubePreset(
        name="hippocampus",
        labels=("anterior", "posterior"),
        shape=(36, 50, 35),
        shape_jitter=2,
        spacing=(1.0, 1.0, 1.0),
        length=38.0,
        bend=5.0,
        radius=6.6,
        edge=0.9,
        tissue=0.42,
        contrast=(0.36, 0.22),
        lookalikes=2,
        bias=0.22,
        noise=0.03,
    ),
    "thick_slices": TubePreset(
        name="thick_slices",
        labels=("anterior", "posterior"),
        shape=(48, 60, 12),
        shape_jitter=2,
        spacing=(1.0, 1.0, 4.0),
        length=46.0,
        bend=7.0,
        radius=7.5,
        edge=1.0,
        tissue=0.42,
        contrast=(0.27, 0.20),
        lookalikes=3,
        bias=0.22,
        noise=0.035,
    ),
}

_LEVELS = 30  # grey levels of the brightest tissue: few enough that noise still compresses well


def tuned(preset: TubePreset, knobs: Knobs) -> TubePreset:
    """The preset at this difficulty and on this grid; with knobs at rest it is the same preset, to the bit."""
    field = tuple(n * s for n, s in zip(preset.shape, preset.spacing, strict=True))
    shape, spacing = grid(knobs, (field[0], field[1], field[2]), preset.spacing)
    if (shape, spacing) == (preset.shape, preset.spacing):
        jitter = preset.shape_jitter
    else:
        jitter = 0 if knobs.shape is not None else round(preset.shape_jitter * knobs.scale)
    return replace(
        preset,
        shape=shape,
        spacing=spacing,
        shape_jitter=jitter,
        contrast=tuple(c * knobs.contrast for c in preset.contrast),
        lookalikes=round(preset.lookalikes * knobs.lookalikes),
        edge=preset.edge * knobs.softness,
        noise=preset.noise * knobs.noise,
    )


def make_case(
    rng: np.random.Generator, preset: TubePreset
) -> tuple[NDArray[np.float32], NDArray[np.uint8], tuple[float, float, float]]:
    """One phantom: image (X, Y, Z), label map (X, Y, Z) with 0 background and 1..N, and spacing in mm.

    A voxel at distance d mm from a bent centre line of local radius r(t) is inside if d < r(t); its intensity is tissue
    + contrast / (1 + exp((d - r) / edge)), times exp(bias field), plus noise.
    """
    jitter = rng.integers(-preset.shape_jitter, preset.shape_jitter + 1, size=3)
    shape = tuple(int(n + j) for n, j in zip(preset.shape, jitter, strict=True))
    spacing = np.asarray(preset.spacing)
    grid_mm = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1) * spacing
    centre_mm = (np.asarray(shape) - 1) * spacing / 2 + rng.normal(0, 1.5, size=3)

    points, radii, along = _tube(rng, preset, centre_mm)
    depth_xyz, along_xyz = _depth(grid_mm, points, radii, along)
    cuts = _cuts(rng, len(preset.labels))
    part_xyz = np.digitize(along_xyz, cuts)
    label_xyz = np.where(depth_xyz > 0, part_xyz + 1, 0).astype(np.uint8)

    image_xyz = preset.tissue + 0.06 * _smooth_noise(rng, shape, 3.0 / spacing)
    contrast_xyz = np.asarray(preset.contrast)[part_xyz] * rng.uniform(0.85, 1.15)
    image_xyz = image_xyz + contrast_xyz / (1 + np.exp(-depth_xyz / preset.edge))
    for _ in range(preset.lookalikes):
        image_xyz = np.maximum(image_xyz, _lookalike(rng, preset, grid_mm, depth_xyz))
    image_xyz = image_xyz * np.exp(preset.bias * _bias(rng, grid_mm, centre_mm))
    image_xyz = image_xyz + rng.normal(0, preset.noise, size=shape)
    return _grey_values(rng, image_xyz), label_xyz, preset.spacing


def _tube(
    rng: np.random.Generator, preset: TubePreset, centre_mm: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Points of a bent centre line (N, 3) in mm, their radii in mm and their position 0..1 along it."""
    along = np.linspace(0, 1, 200)
    length = preset.length * rng.uniform(0.85, 1.12)
    bend = preset.bend * rng.uniform(0.6, 1.4) * np.array([rng.choice([-1, 1]), 0.6])
    y = (0.5 - along) * length  # RAS: the head lies anterior
    x = bend[0] * (np.sin(np.pi * along) - 0.6) + rng.normal(0, 1.0) * (along - 0.5) * 4
    z = bend[1] * (np.cos(np.pi * along)) + rng.normal(0, 1.0) * (along - 0.5) * 4
    # A thick head that narrows towards the tail, with a ripple of its own.
    ripple = 0.12 * np.sin(2 * np.pi * (along * rng.uniform(1.5, 3.0) + rng.uniform()))
    taper = (1.15 - 0.55 * along) * np.sqrt(np.clip(np.sin(np.pi * np.clip(along, 0.02, 0.98)), 0, 1))
    radii = preset.radius * rng.uniform(0.85, 1.15) * taper * (1 + ripple)
    return np.stack([x, y, z], axis=-1) + centre_mm, radii, along


def _depth(
    grid_mm: NDArray[np.float64],
    points: NDArray[np.float64],
    radii: NDArray[np.float64],
    along: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Signed depth in mm (positive inside) and position along the line of every voxel."""
    distance, nearest = cKDTree(points).query(grid_mm.reshape(-1, 3))
    shape = grid_mm.shape[:3]
    return (radii[nearest] - distance).reshape(shape), along[nearest].reshape(shape)


def _cuts(rng: np.random.Generator, parts: int) -> NDArray[np.float64]:
    """Positions along the line where one structure ends and the next begins."""
    return np.arange(1, parts) / parts + rng.uniform(-0.06, 0.06, size=parts - 1)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Texture of standard deviation 1 and correlation length `sigma` voxels."""
    texture = gaussian_filter(rng.normal(size=shape), sigma)
    return texture / texture.std()


def _lookalike(
    rng: np.random.Generator, preset: TubePreset, grid_mm: NDArray[np.float64], depth_xyz: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A bright blob of the structures' grey value somewhere outside of them."""
    outside = grid_mm[depth_xyz < -1.5 * preset.radius]
    if len(outside) == 0:
        return np.full(depth_xyz.shape, -np.inf)
    radius = preset.radius * rng.uniform(0.6, 1.0, size=3)
    scaled = np.linalg.norm((grid_mm - outside[rng.integers(len(outside))]) / radius, axis=-1)
    level = preset.tissue + rng.uniform(0.6, 1.1) * preset.contrast[0]
    return np.asarray(level - preset.contrast[0] / (1 + np.exp(-(scaled - 1) * radius.mean() / preset.edge)))


def _bias(
    rng: np.random.Generator, grid_mm: NDArray[np.float64], centre_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Second-order polynomial over the image, scaled to -1..1."""
    u = (grid_mm - centre_mm) / np.abs(grid_mm - centre_mm).max(axis=(0, 1, 2))
    weights = rng.uniform(-1, 1, size=6)
    field = u @ weights[:3] + (u**2) @ weights[3:]
    return field / np.abs(field).max()


def _grey_values(rng: np.random.Generator, image_xyz: NDArray[np.float64]) -> NDArray[np.float32]:
    """Whole grey values: few levels times a gain of the case, drawn on a logarithmic scale from 1 to 10,000."""
    gain = round(10 ** rng.uniform(0, 4))
    return (np.clip(np.round(image_xyz * _LEVELS), 0, None) * gain).astype(np.float32)
