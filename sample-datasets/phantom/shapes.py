# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Solid shapes in patient millimetres: each gives the depth of points below its surface, positive inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]
Bounds = tuple[NDArray[np.float64], NDArray[np.float64]]
Triple = tuple[float, float, float]


class Shape(Protocol):
    """A solid: `depth` of points (..., 3) in mm, exact at the surface and nearly so around it; a box around it."""

    def depth(self, points_mm: Points) -> Points: ...

    def bounds(self) -> Bounds: ...


@dataclass(frozen=True)
class Ellipsoid:
    """|R (p - c) / r|_k <= 1, with k = 2 for an ellipsoid and more for a rounder box; `turn` is R (3, 3)."""

    centre: Triple
    radii: Triple
    turn: tuple[Triple, Triple, Triple] | None = None
    power: float = 2.0

    def depth(self, points_mm: Points) -> Points:
        """First-order distance (1 - q) / |grad q| with q = |R (p - c) / r|_k."""
        p = points_mm - np.asarray(self.centre, np.float32)
        if self.turn is not None:
            p = p @ np.asarray(self.turn, np.float32).T
        r, k = np.asarray(self.radii, np.float32), self.power
        u = np.maximum(np.abs(p / r), 1e-4)
        q = (u**k).sum(axis=-1) ** (1 / k)
        slope = np.sqrt((((u / q[..., None]) ** (k - 1) / r) ** 2).sum(axis=-1))
        return np.asarray((1 - q) / slope, np.float32)

    def bounds(self) -> Bounds:
        reach = np.asarray(self.radii) if self.turn is None else np.full(3, max(self.radii))
        return np.asarray(self.centre) - reach, np.asarray(self.centre) + reach


@dataclass(frozen=True)
class Tube:
    """A chain of round cones through `points` (N, 3) with radius `radii` (N,) at each of them."""

    points: Sequence[Triple]
    radii: Sequence[float]

    def depth(self, points_mm: Points) -> Points:
        """The largest r(t) - |p - c(t)| over the segments, t the foot of p on each."""
        best = np.full(points_mm.shape[:-1], -np.inf, np.float32)
        ends = np.asarray(self.points, np.float32)
        for a, b, r_a, r_b in zip(ends[:-1], ends[1:], self.radii[:-1], self.radii[1:], strict=True):
            line = b - a
            t = np.clip((points_mm - a) @ line / max(float(line @ line), 1e-6), 0, 1)
            gap = points_mm - a - t[..., None] * line
            distance = np.sqrt((gap**2).sum(axis=-1))
            best = np.maximum(best, r_a + t * np.float32(r_b - r_a) - distance)
        return np.asarray(best, np.float32)

    def bounds(self) -> Bounds:
        ends, reach = np.asarray(self.points, np.float64), np.asarray(self.radii, np.float64)[:, None]
        return (ends - reach).min(axis=0), (ends + reach).max(axis=0)


@dataclass(frozen=True)
class Slab:
    """Everything with normal . p <= offset; unbounded, so only of use inside `Both` and `Without`."""

    normal: Triple
    offset: float

    def depth(self, points_mm: Points) -> Points:
        n = np.asarray(self.normal, np.float32)
        return np.asarray(self.offset - points_mm @ (n / np.linalg.norm(n)), np.float32)

    def bounds(self) -> Bounds:
        return np.full(3, -1e4), np.full(3, 1e4)


@dataclass(frozen=True)
class Union:
    """The points of any of the shapes."""

    shapes: Sequence[Shape]

    def depth(self, points_mm: Points) -> Points:
        return np.asarray(np.max([shape.depth(points_mm) for shape in self.shapes], axis=0), np.float32)

    def bounds(self) -> Bounds:
        lows, highs = zip(*(shape.bounds() for shape in self.shapes), strict=True)
        return np.min(lows, axis=0), np.max(highs, axis=0)


@dataclass(frozen=True)
class Both:
    """The points of both shapes."""

    first: Shape
    second: Shape

    def depth(self, points_mm: Points) -> Points:
        return np.minimum(self.first.depth(points_mm), self.second.depth(points_mm))

    def bounds(self) -> Bounds:
        (low_a, high_a), (low_b, high_b) = self.first.bounds(), self.second.bounds()
        return np.maximum(low_a, low_b), np.minimum(high_a, high_b)


@dataclass(frozen=True)
class Without:
    """The points of the first shape that are more than `gap` mm outside of the second."""

    first: Shape
    second: Shape
    gap: float = 0.0

    def depth(self, points_mm: Points) -> Points:
        return np.minimum(self.first.depth(points_mm), -self.second.depth(points_mm) - np.float32(self.gap))

    def bounds(self) -> Bounds:
        return self.first.bounds()


def turned(about_x: float, about_y: float, about_z: float) -> tuple[Triple, Triple, Triple]:
    """Rotation matrix Rz Ry Rx of three angles in degrees."""
    a, b, c = np.deg2rad([about_x, about_y, about_z])
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    r = rz @ ry @ rx
    return (
        (float(r[0, 0]), float(r[0, 1]), float(r[0, 2])),
        (float(r[1, 0]), float(r[1, 1]), float(r[1, 2])),
        (float(r[2, 0]), float(r[2, 1]), float(r[2, 2])),
    )
