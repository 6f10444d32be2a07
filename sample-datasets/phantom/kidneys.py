# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Kidneys with rare, small tumours and cysts in a large and mostly empty CT volume."""

from __future__ import annotations

import numpy as np

from phantom.acquisition import Knobs
from phantom.body import AIR, MUSCLE, WATER, Mover, bowel, trunk, vary
from phantom.scene import Part, Scene, Warp
from phantom.shapes import Ellipsoid, Shape, Triple, Union, Without

LABELS = ("kidney", "tumour", "cyst")
FIELD_MM = (280.0, 220.0, 200.0)
SPACING_MM = (2.5, 2.5, 5.0)
PATHOLOGY = 0.4
KIDNEY, TUMOUR, CYST = 1, 2, 3


def kidneys(rng: np.random.Generator, knobs: Knobs) -> tuple[Scene, Warp]:
    """Trunk, other organs as background, two kidneys; with probability `pathology` each, tumours and cysts on them."""
    rate = PATHOLOGY if knobs.pathology is None else knobs.pathology
    mover = Mover(rng, step=3.0)
    parts, _ = trunk((vary(rng, 128.0, 0.04), vary(rng, 94.0, 0.04), 0.0), 62.0, vary(rng, 1.4, 0.25))
    right = mover.blob((58.0, -30.0, -10.0), (24.0, 21.0, 44.0), (6.0, -12.0, 0.0))
    left = mover.blob((-58.0, -30.0, 0.0), (24.0, 21.0, 45.0), (6.0, 12.0, 0.0))
    both = Union([right, left])
    parts += _neighbours(rng, mover, both, knobs)
    enhancement = vary(rng, 175.0, 0.08)
    findings: list[str] = []
    lesions: list[Part] = []
    found = rng.spawn(1)[0]  # the lesions of a patient must not change the rest of the patient
    for label, value, chance, name in ((TUMOUR, 85.0, rate, "tumour"), (CYST, WATER, 0.75 * rate, "cyst")):
        if found.uniform() >= chance:
            continue
        for _ in range(int(found.integers(1, 3))):
            kidney = right if found.uniform() < 0.5 else left
            lesions.append(
                Part(_lesion(found, kidney), vary(found, value, 0.08), label, grain=8.0 if label == TUMOUR else 1.5)
            )
            findings.append(name)
    for side, kidney in ((1, right), (-1, left)):
        x, y, z = kidney.centre
        hilum = Ellipsoid((x - side * 17, y + 6, z), (17.0, 9.0, 18.0))
        parts += [
            Part(Without(kidney, hilum), enhancement, KIDNEY, grain=6.0),
            Part(Without(_medulla(kidney), hilum), enhancement - 45, None, grain=8.0),
        ]
    scene = Scene([*parts, *lesions], "CT", AIR, reference=MUSCLE, edge=1.0, noise=16.0, findings=tuple(findings))
    return scene, Warp.draw(rng, 2.0, (60, 140))


def _lesion(rng: np.random.Generator, kidney: Ellipsoid) -> Ellipsoid:
    """A ball of 7 to 15 mm radius whose centre lies near the surface, half of it in the fat around."""
    direction = rng.normal(size=3) * (1.0, 1.0, 0.8)
    direction[0] = abs(direction[0]) * np.sign(kidney.centre[0])  # away from the vessels
    direction /= np.linalg.norm(direction)
    turn = np.asarray(kidney.turn)
    offset = turn.T @ (np.asarray(kidney.radii) * (turn @ direction) * rng.uniform(0.75, 1.0))
    x, y, z = np.asarray(kidney.centre) + offset
    radius = float(np.exp(rng.uniform(np.log(8), np.log(15))))
    return Ellipsoid((x, y, z), (radius, radius * vary(rng, 1, 0.1), radius * vary(rng, 1, 0.1)))


def _medulla(kidney: Ellipsoid) -> Ellipsoid:
    a, b, c = kidney.radii
    return Ellipsoid(kidney.centre, (0.62 * a, 0.62 * b, 0.78 * c), kidney.turn)


def _neighbours(rng: np.random.Generator, mover: Mover, kidneys_: Shape, knobs: Knobs) -> list[Part]:
    """Liver, spleen, stomach, vessels and bowel: none has a label, some are as bright as a tumour."""

    def part(shape: Shape, value: float, grain: float = 6.0) -> Part:
        return Part(Without(shape, kidneys_, 2.0), vary(rng, value, 0.05), grain=grain)

    places: list[tuple[Triple, Triple, float]] = [
        ((62.0, 10.0, 62.0), (52.0, 60.0, 58.0), 115.0),  # liver
        ((4.0, 38.0, 72.0), (58.0, 30.0, 34.0), 115.0),  # its left lobe
        ((-88.0, -22.0, 58.0), (20.0, 34.0, 40.0), 125.0),  # spleen
        ((-46.0, 26.0, 58.0), (36.0, 32.0, 34.0), 40.0),  # stomach
        ((0.0, 26.0, 16.0), (56.0, 12.0, 14.0), 98.0),  # pancreas
    ]
    parts = [part(mover.blob(centre, radii), value) for centre, radii, value in places]
    parts += [
        part(mover.tube([(-11.0, -24.0, 130.0), (-10.0, -22.0, -130.0)], [11.0, 9.0]), 165.0, 3.0),
        part(mover.tube([(17.0, -22.0, 130.0), (16.0, -22.0, -130.0)], [11.0, 11.0]), 125.0, 3.0),
    ]
    low, high = (-80.0, -12.0, -100.0), (80.0, 56.0, 10.0)
    return parts + bowel(rng, 10 + round(8 * knobs.lookalikes), low, high, kidneys_, (20.0, 95.0))
