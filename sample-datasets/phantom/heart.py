# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The heart in short-axis slices: cavities and muscle of the left ventricle, nested, and the right ventricle beside."""

from __future__ import annotations

import numpy as np

from phantom.acquisition import Knobs
from phantom.body import vary
from phantom.scene import Part, Scene, Warp
from phantom.shapes import Both, Ellipsoid, Shape, Slab, Triple, Tube, Union, Without, turned

LABELS = ("right ventricle", "myocardium", "left ventricle")
FIELD_MM = (150.0, 150.0, 90.0)
SPACING_MM = (1.5, 1.5, 9.0)
PATHOLOGY = 0.6
RIGHT, MUSCLE, LEFT = 1, 2, 3
BLOOD = 0.82
FINDINGS = ("dilated left ventricle", "thick myocardium", "dilated right ventricle", "thin wall segment")


def heart(rng: np.random.Generator, knobs: Knobs) -> tuple[Scene, Warp]:
    """A short-axis stack: x to the patient's right, z from apex (below) to base; lengths in mm.

    The left cavity is half an ellipsoid, the myocardium a shell around it that ends at the base, the right ventricle
    a crescent: another half ellipsoid without the first two.
    """
    rate = PATHOLOGY if knobs.pathology is None else knobs.pathology
    chosen, chance = str(rng.choice(FINDINGS)), rng.uniform()
    finding = chosen if chance < rate else ""
    size = vary(rng, 1.0, 0.07)
    cavity, wall, right = 21.0 * size, 9.5 * vary(rng, 1.0, 0.08), 24.0 * vary(rng, 1.0, 0.08)
    cavity *= {FINDINGS[0]: 1.25, FINDINGS[1]: 0.82}.get(finding, 1.0)
    wall *= {FINDINGS[0]: 0.82, FINDINGS[1]: 1.5}.get(finding, 1.0)
    right *= 1.25 if finding == FINDINGS[2] else 1.0
    base, length = float(rng.uniform(24, 31)), 62.0 * vary(rng, 1.0, 0.06)
    turn = turned(0, 0, float(rng.normal(0, 12)))
    centre = (float(rng.normal(-8, 3)), float(rng.normal(-4, 3)), base)
    inner = Ellipsoid(centre, (cavity, cavity * vary(rng, 0.96, 0.03), length), turn)
    outer = Ellipsoid(centre, (cavity + wall, (cavity + wall) * vary(rng, 0.97, 0.02), length + wall), turn)
    below = Slab((0.0, 0.0, 1.0), base)
    beside = (centre[0] + 0.72 * (cavity + wall) + 5, centre[1] + 6 + float(rng.normal(0, 3)), base)
    chamber = Ellipsoid(beside, (right, 1.28 * right, 0.86 * length), turn)
    parts = [
        *_chest(rng, centre, outer, knobs),
        Part(Ellipsoid(centre, (cavity + wall + right * 0.75, cavity + wall + 14, length + 14)), 0.62, grain=0.03),
        Part(
            Both(Without(Ellipsoid(beside, (right + 3.5, 1.28 * right + 3.5, 0.86 * length + 3)), outer), below), 0.36
        ),
        Part(Both(Without(chamber, outer), below), BLOOD - 0.03, RIGHT, grain=0.02),
        Part(Both(outer, below), 0.34, MUSCLE, grain=0.02),
        Part(Both(inner, below), BLOOD, LEFT, grain=0.02),
        *_papillary(rng, centre, cavity, length, turn),
    ]
    if finding == FINDINGS[3]:
        angle = float(rng.uniform(0, 2 * np.pi))
        scar = (centre[0] + (cavity + wall / 2) * np.cos(angle), centre[1] + (cavity + wall / 2) * np.sin(angle), -2.0)
        thinned = Both(Without(Ellipsoid(scar, (14.0, 14.0, 20.0)), inner, 0.4 * wall), Without(outer, inner))
        parts.append(Part(Both(thinned, below), 0.5, MUSCLE))
    scene = Scene(parts, "MR", outside=0.02, reference=0.5, edge=0.9, noise=0.035, bias=0.18)
    findings = (finding,) if finding else ()
    return Scene(**{**scene.__dict__, "findings": findings}), Warp.draw(rng, 1.3, (45, 100))


def _chest(rng: np.random.Generator, centre: Triple, outer: Ellipsoid, knobs: Knobs) -> list[Part]:
    """Chest wall, lungs, liver, vessels and other structures as bright as blood."""
    x, y, _ = centre
    wall = Ellipsoid((15.0, -20.0, 0.0), (118.0, 92.0, 400.0), power=2.4)
    muscle = Ellipsoid((15.0, -22.0, 0.0), (108.0, 80.0, 400.0), power=2.4)
    inside = Ellipsoid((15.0, -22.0, 0.0), (98.0, 71.0, 400.0), power=2.4)
    aorta = (x + 4 + float(rng.normal(0, 2)), y - 52 + float(rng.normal(0, 2)))
    parts = [
        Part(wall, 0.78, fades=False, grain=0.04),
        Part(muscle, 0.30, grain=0.03),
        Part(inside, 0.09, grain=0.02),
        Part(Ellipsoid((58.0, -8.0, -42.0), (62.0, 66.0, 34.0), turned(0, 18, 0)), 0.40, grain=0.04),  # liver
        Part(Ellipsoid((-48.0, -16.0, -48.0), (26.0, 34.0, 26.0)), 0.30, grain=0.05),  # stomach
        Part(Tube([(aorta[0], aorta[1], -200.0), (aorta[0], aorta[1], 200.0)], [10.5, 10.5]), BLOOD - 0.02),
        Part(Tube([(30.0, -70.0, -200.0), (30.0, -70.0, 200.0)], [15.0, 15.0]), 0.5, grain=0.05),  # vertebra
        Part(Ellipsoid((34.0, 38.0, 0.0), (42.0, 9.0, 60.0), turned(0, 0, -8)), 0.76, fades=False),  # fat pad
    ]
    atrium = Ellipsoid((x + 10, y - 22, centre[2] + 20), (36.0, 26.0, 20.0))
    parts.append(Part(atrium, BLOOD - 0.04, grain=0.02))
    rng = rng.spawn(1)[0]  # their number must not change the rest of the patient
    for _ in range(round(3 * knobs.lookalikes)):
        place = (float(rng.uniform(-60, 66)), float(rng.uniform(-62, 34)), float(rng.uniform(-50, 50)))
        vessel = Tube([place, (place[0] + 8, place[1] + 4, place[2] + 24)], [vary(rng, 5, 0.3), vary(rng, 4, 0.3)])
        parts.append(Part(Without(vessel, outer, 6.0), BLOOD * vary(rng, 0.95, 0.08)))
    return parts


def _papillary(
    rng: np.random.Generator, centre: Triple, cavity: float, length: float, turn: tuple[Triple, Triple, Triple]
) -> list[Part]:
    """Two dark muscles in the bright cavity; as in the published labels they belong to the cavity."""
    muscles: list[Shape] = []
    for angle in (-0.6 + rng.normal(0, 0.15), -2.3 + rng.normal(0, 0.15)):
        x, y = centre[0] + 0.58 * cavity * np.cos(angle), centre[1] + 0.58 * cavity * np.sin(angle)
        top = centre[2] - 0.35 * length
        muscles.append(Tube([(x, y, top), (x, y, top - 0.3 * length)], [0.14 * cavity, 0.2 * cavity]))
    return [Part(Union(muscles), 0.42, None)]
