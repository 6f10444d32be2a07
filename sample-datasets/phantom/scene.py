# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Scenes: structures with place and intensity, painted slab by slab on any grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from phantom.shapes import Points, Shape

SLAB_VOXELS = 1_500_000  # bounds the float arrays in memory; the result does not depend on it
_REACH = 4.0  # the logistic edge is below 2 % this many edge widths away


@dataclass(frozen=True)
class Part:
    """One structure: `value` in HU (CT) or as a fraction of the brightest tissue (MR); parts are painted in order.

    `label` None leaves the label of the part below; `fades` lets the difficulty move its value towards the
    reference tissue; `grain` is the standard deviation of its texture.
    """

    shape: Shape
    value: float
    label: int | None = 0
    fades: bool = True
    grain: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything in one patient; the field of view (mm) is centred on the origin of patient space."""

    parts: Sequence[Part]
    modality: Literal["CT", "MR"]
    outside: float
    reference: float
    edge: float
    noise: float
    bias: float = 0.0
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Waves:
    """A smooth random field, the sum of cosines: sum_k a_k cos(f_k . p + phase_k), of standard deviation about 1."""

    frequencies: NDArray[np.float32]
    phases: NDArray[np.float32]

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelength: tuple[float, float], count: int = 6) -> Waves:
        """`count` waves of random direction and a wavelength within the limits, in mm."""
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        lengths = rng.uniform(*wavelength, size=(count, 1))
        frequencies = 2 * np.pi * direction / lengths
        return cls(frequencies.astype(np.float32), rng.uniform(0, 2 * np.pi, count).astype(np.float32))

    def at(self, points_mm: Points) -> Points:
        total = np.zeros(points_mm.shape[:-1], np.float32)
        for frequency, phase in zip(self.frequencies, self.phases, strict=True):
            total += np.cos(points_mm @ frequency + phase)
        return np.asarray(total * np.float32(np.sqrt(2 / len(self.phases))), np.float32)


@dataclass(frozen=True)
class Warp:
    """Deformation of the drawing for this patient: p -> p + amplitude * waves(p), per axis."""

    waves: tuple[Waves, Waves, Waves]
    amplitude: float

    @classmethod
    def draw(cls, rng: np.random.Generator, amplitude: float, wavelength: tuple[float, float]) -> Warp:
        return cls(
            (Waves.draw(rng, wavelength), Waves.draw(rng, wavelength), Waves.draw(rng, wavelength)),
            amplitude,
        )

    def at(self, points_mm: Points) -> Points:
        shift = np.stack([waves.at(points_mm) for waves in self.waves], axis=-1)
        return np.asarray(points_mm + np.float32(self.amplitude) * shift, np.float32)

    @property
    def largest(self) -> float:
        """No point moves further than this along an axis, in mm."""
        return self.amplitude * float(np.sqrt(2 * len(self.waves[0].phases)))


def slabs(shape: tuple[int, int, int]) -> Iterator[slice]:
    """Consecutive slices along z that hold at most `SLAB_VOXELS` voxels each (one slice at least)."""
    thickness = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for start in range(0, shape[2], thickness):
        yield slice(start, min(start + thickness, shape[2]))


def paint(
    scene: Scene, warp: Warp, grain: Waves, axes_mm: tuple[Points, Points, Points], contrast: float, edge: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Values and labels (X, Y, Z) on a grid with these coordinates in mm along each axis.

    Each part blends in with weight w = 1 / (1 + exp(-depth / edge)); the label changes where depth > 0. The value of
    a part that fades is reference + contrast * (value - reference).
    """
    shape = (len(axes_mm[0]), len(axes_mm[1]), len(axes_mm[2]))
    points_mm = np.stack(np.meshgrid(*axes_mm, indexing="ij"), axis=-1)
    texture_xyz = grain.at(points_mm)
    points_mm = warp.at(points_mm)
    image_xyz = np.full(shape, scene.outside, np.float32)
    label_xyz = np.zeros(shape, np.uint8)
    for part in scene.parts:
        low, high = part.shape.bounds()
        margin = _REACH * edge + warp.largest
        box = tuple(_span(axis, a - margin, b + margin) for axis, a, b in zip(axes_mm, low, high, strict=True))
        if any(span.start >= span.stop for span in box):
            continue
        depth = part.shape.depth(points_mm[box])
        weight = 1 / (1 + np.exp(-np.clip(depth / np.float32(edge), -30, 30)))
        value = scene.reference + contrast * (part.value - scene.reference) if part.fades else part.value
        image_xyz[box] += weight * (np.float32(value) + np.float32(part.grain) * texture_xyz[box] - image_xyz[box])
        if part.label is not None:
            label_xyz[box][depth > 0] = part.label
    return image_xyz, label_xyz


def _span(axis_mm: Points, low: float, high: float) -> slice:
    """Indices of an ascending axis between two coordinates."""
    return slice(int(np.searchsorted(axis_mm, low)), int(np.searchsorted(axis_mm, high, side="right")))
