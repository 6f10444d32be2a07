# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The trunk that abdominal organs lie in, seen by CT after contrast: body wall, spine, ribs, lungs, bowel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phantom.scene import Part
from phantom.shapes import Both, Ellipsoid, Shape, Slab, Triple, Tube, Union, Without, turned

AIR, LUNG, FAT, MUSCLE, BONE, WATER = -1000.0, -820.0, -100.0, 55.0, 320.0, 8.0


def vary(rng: np.random.Generator, value: float, share: float) -> float:
    """`value` times a log-normal factor of about 1 +- share, held within 2.5 deviations."""
    return value * float(np.exp(share * np.clip(rng.normal(), -2.5, 2.5)))


@dataclass(frozen=True)
class Mover:
    """Random places of structures in this patient: `step` mm of spread around the drawing, `share` of size."""

    rng: np.random.Generator
    step: float = 2.2
    share: float = 0.06

    def blob(self, centre: Triple, radii: Triple, lean: Triple = (0.0, 0.0, 0.0), power: float = 2.0) -> Ellipsoid:
        """An ellipsoid near `centre` that leans by about the angles `lean` in degrees."""
        size = vary(self.rng, 1.0, self.share)
        x, y, z = np.asarray(centre) + self.step * self.rng.normal(size=3)
        a, b, c = (radius * size * vary(self.rng, 1.0, self.share / 2) for radius in radii)
        angles = np.asarray(lean) + 4.0 * self.rng.normal(size=3)
        return Ellipsoid((x, y, z), (a, b, c), turned(*angles), power)

    def tube(self, points: list[Triple], radii: list[float]) -> Tube:
        """A tube along about these points; ends move with it and a little on their own."""
        moved = np.asarray(points) + 0.8 * self.step * self.rng.normal(size=3)
        moved = moved + 0.5 * self.step * self.rng.normal(size=moved.shape)
        size = vary(self.rng, 1.0, self.share)
        return Tube([(float(x), float(y), float(z)) for x, y, z in moved], [r * size for r in radii])


def trunk(half: Triple, lung_base: float, fatness: float) -> tuple[list[Part], Ellipsoid]:
    """Body wall, lungs, spine and ribs of a trunk with these half axes (mm), and the cavity inside of them."""
    a, b, _ = half
    rim = 7.0 * fatness
    skin = Ellipsoid((0.0, 0.0, 0.0), (a, b, 2e3), power=2.5)
    wall = Ellipsoid((0.0, 0.0, 0.0), (a - rim, b - rim, 2e3), power=2.5)
    cavity = Ellipsoid((0.0, 4.0, 0.0), (a - rim - 9, b - rim - 12, 2e3), power=2.4)
    spine_y = -b + rim + 22
    parts = [
        Part(skin, FAT, fades=False, grain=6.0),
        Part(wall, MUSCLE, fades=False, grain=5.0),
        Part(cavity, FAT + 5, fades=False, grain=9.0),
        *(
            Part(
                Both(Ellipsoid((side * 0.5 * a, 2.0, lung_base + 62), (0.46 * a, 0.72 * b, 74.0)), cavity),
                LUNG,
                fades=False,
                grain=22.0,
            )
            for side in (-1, 1)
        ),
        Part(
            Ellipsoid((-4.0, 14.0, lung_base + 58), (0.36 * a, 0.5 * b, 52.0)), 110.0, fades=False, grain=6.0
        ),  # heart
        *(_psoas(side, spine_y) for side in (-1, 1)),
        *_spine(spine_y),
        *_ribs(a - rim - 4, b - rim - 6, lung_base - 55),
    ]
    return parts, cavity


def bowel(
    rng: np.random.Generator, count: int, low: Triple, high: Triple, keep_out: Shape, values: tuple[float, float]
) -> list[Part]:
    """Loops of unlabelled bowel in a box, some with gas, outside of `keep_out`, which resemble organs."""
    parts = []
    rng = rng.spawn(1)[0]  # their number must not change the rest of the patient
    for _ in range(count):
        start = rng.uniform(low, high)
        steps = np.cumsum(rng.normal(0, 13, size=(4, 3)) * (1.0, 0.6, 0.6), axis=0)
        line = np.clip(start + np.vstack([np.zeros(3), steps]), low, high)
        points = [(float(x), float(y), float(z)) for x, y, z in line]
        radius = float(rng.uniform(6, 10))
        loop = Tube(points, [radius] * len(points))
        parts.append(Part(Without(loop, keep_out, 2.0), float(rng.uniform(*values)), grain=10.0))
        if rng.uniform() < 0.35:
            x, y, z = points[2]
            gas = Ellipsoid((x, y + 0.3 * radius, z), (0.7 * radius, 0.5 * radius, 0.7 * radius))
            parts.append(Part(Without(gas, keep_out, 4.0), -700.0, fades=False))
    return parts


def _psoas(side: int, spine_y: float) -> Part:
    return Part(Tube([(side * 20.0, spine_y, 0.0), (side * 34.0, spine_y + 14, -100.0)], [9.0, 13.0]), 60.0, grain=5.0)


def _spine(spine_y: float) -> list[Part]:
    """Vertebrae with discs between them, the canal and spinous processes behind."""
    parts = [Part(Tube([(0.0, spine_y, -300.0), (0.0, spine_y, 300.0)], [15.0, 15.0]), 95.0, fades=False)]
    for level in range(-6, 7):
        z = 27.0 * level
        body = Both(Tube([(0.0, spine_y, z - 40), (0.0, spine_y, z + 40)], [16.0, 16.0]), _between(z - 10, z + 10))
        process = Tube([(0.0, spine_y - 18, z), (0.0, spine_y - 33, z - 8)], [5.0, 3.5])
        parts += [Part(body, BONE - 120, fades=False, grain=35.0), Part(process, BONE, fades=False)]
    canal = Tube([(0.0, spine_y - 19, -300.0), (0.0, spine_y - 19, 300.0)], [6.0, 6.0])
    return [*parts, Part(canal, 25.0, fades=False)]


def _between(low: float, high: float) -> Shape:
    return Both(Slab((0.0, 0.0, 1.0), high), Slab((0.0, 0.0, -1.0), -low))


def _ribs(a: float, b: float, lowest: float) -> list[Part]:
    """Arcs along the wall that slope downwards from the spine to the front."""
    angles = np.linspace(np.deg2rad(-75), np.deg2rad(35), 9)
    arcs: list[Shape] = []
    for level in range(6):
        for side in (-1, 1):
            line = [
                (float(side * a * np.cos(t)), float(b * np.sin(t)), float(lowest + 26 * level - 16 * np.sin(t)))
                for t in angles
            ]
            arcs.append(Tube(line, [3.6] * len(line)))
    return [Part(Union([arc]), BONE, fades=False) for arc in arcs]
