# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Fifteen abdominal and pelvic organs in CT, from the liver to the adrenal glands, in a compact trunk."""

from __future__ import annotations

import numpy as np

from phantom.acquisition import Knobs
from phantom.body import AIR, BONE, MUSCLE, WATER, Mover, bowel, trunk, vary
from phantom.scene import Part, Scene, Warp
from phantom.shapes import Both, Ellipsoid, Shape, Tube, Union, Without

LABELS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate or uterus",
)  # fmt: skip
FIELD_MM = (240.0, 180.0, 230.0)
SPACING_MM = (2.5, 2.5, 5.0)
PATHOLOGY = 0.4
# HU in the portal venous phase.
VALUES = (128, 165, 165, 12, 48, 112, 34, 148, 122, 92, 78, 78, 58, 5, 62)
FINDINGS = ("liver lesions", "kidney cyst", "large spleen", "wide aorta")


def abdomen(rng: np.random.Generator, knobs: Knobs) -> tuple[Scene, Warp]:
    """A trunk from the dome of the liver to the pelvic floor; every organ in its place, none the same twice."""
    rate = PATHOLOGY if knobs.pathology is None else knobs.pathology
    chosen, chance = str(rng.choice(FINDINGS)), rng.uniform()
    finding = chosen if chance < rate else ""
    mover = Mover(rng)
    parts, cavity = trunk((vary(rng, 110.0, 0.03), vary(rng, 80.0, 0.03), 0.0), 62.0, vary(rng, 1.1, 0.2))
    organs = _organs(mover, 1.35 if finding == FINDINGS[2] else 1.0, 1.5 if finding == FINDINGS[3] else 1.0)
    low, high = (-66.0, 4.0, -72.0), (66.0, 46.0, -8.0)
    everything = Union([organs[name] for name in LABELS])
    parts += _pelvis()
    parts += bowel(rng, 8 + round(6 * knobs.lookalikes), low, high, everything, (15.0, 85.0))
    values = dict(zip(LABELS, (vary(rng, float(v), 0.05) for v in VALUES), strict=True))
    inside = ("spleen", "liver", "stomach", "right kidney", "left kidney")
    # Painted in the order of precedence: soft and large structures first, those that are never covered last.
    for name in (
        "stomach", "liver", "spleen", "right kidney", "left kidney", "duodenum", "pancreas", "gallbladder",
        "oesophagus", "postcava", "aorta", "right adrenal gland", "left adrenal gland", "prostate or uterus", "bladder",
    ):  # fmt: skip
        shape = Both(organs[name], cavity) if name in inside else organs[name]
        parts.append(Part(shape, values[name], LABELS.index(name) + 1, grain=9.0 if name == "stomach" else 4.0))
        parts += _details(rng, name, organs[name], values[name], finding)
    scene = Scene(parts, "CT", AIR, reference=MUSCLE, edge=0.9, noise=13.0, findings=(finding,) if finding else ())
    return scene, Warp.draw(rng, 1.4, (60, 140))


def _organs(mover: Mover, spleen: float, aorta: float) -> dict[str, Shape]:
    """The drawing in mm (x right, y front, z up), each organ moved and resized for this patient."""
    liver = Union([
        mover.blob((50.0, 4.0, 52.0), (46.0, 52.0, 42.0), power=2.2),
        mover.blob((6.0, 30.0, 62.0), (44.0, 24.0, 22.0), (0.0, 10.0, 0.0)),
        mover.blob((66.0, 0.0, 16.0), (24.0, 40.0, 30.0)),
    ])  # fmt: skip
    kidney_r = mover.blob((47.0, -32.0, -8.0), (16.0, 17.0, 29.0), (5.0, -10.0, 0.0))
    kidney_l = mover.blob((-47.0, -32.0, 2.0), (16.0, 17.0, 30.0), (5.0, 10.0, 0.0))
    stomach = mover.tube(
        [(-34.0, -8.0, 74.0), (-50.0, 6.0, 54.0), (-46.0, 26.0, 34.0), (-24.0, 36.0, 16.0), (2.0, 34.0, 8.0)],
        [20.0, 22.0, 18.0, 12.0, 9.0],
    )
    big = 16.0 * spleen, 28.0 * spleen, 30.0 * spleen
    organs: dict[str, Shape] = {
        "spleen": Without(mover.blob((-80.0, -18.0, 46.0), big, (0.0, -8.0, 0.0)), stomach, 1.0),
        "liver": Without(Without(liver, kidney_r, 1.5), stomach, 1.0),
        "stomach": stomach,
        "right kidney": _with_hilum(kidney_r, 1),
        "left kidney": _with_hilum(kidney_l, -1),
        "gallbladder": mover.tube([(30.0, 30.0, 18.0), (33.0, 38.0, 4.0), (35.0, 42.0, -6.0)], [6.0, 10.0, 11.0]),
        "oesophagus": mover.tube([(-6.0, -18.0, 140.0), (-8.0, -14.0, 92.0), (-22.0, -10.0, 78.0)], [7.0, 7.0, 6.5]),
        "aorta": mover.tube(
            [(-12.0, -27.0, 140.0), (-10.0, -25.0, 60.0), (-8.0, -24.0, -52.0)],
            [9.0, 8.5 * aorta, 7.5 * aorta],
        ),
        "postcava": mover.tube([(16.0, -8.0, 92.0), (17.0, -20.0, 40.0), (14.0, -24.0, -54.0)], [9.5, 9.5, 9.0]),
        "pancreas": mover.tube(
            [(22.0, 8.0, -14.0), (20.0, 11.0, 0.0), (4.0, 14.0, 8.0), (-20.0, 6.0, 16.0), (-46.0, -12.0, 26.0)],
            [9.0, 11.0, 8.0, 8.5, 7.0],
        ),
        "right adrenal gland": _adrenal(mover, 1, 30.0),
        "left adrenal gland": _adrenal(mover, -1, 38.0),
        "duodenum": mover.tube(
            [(8.0, 32.0, 8.0), (28.0, 24.0, 6.0), (38.0, 10.0, -6.0), (34.0, 2.0, -26.0), (12.0, -4.0, -32.0),
             (-12.0, 0.0, -28.0)],
            [8.0, 9.0, 8.5, 8.5, 7.5, 7.5],
        ),
        "bladder": mover.blob((0.0, 18.0, -84.0), (29.0, 22.0, 19.0)),
        "prostate or uterus": mover.blob((0.0, 0.0, -104.0), (19.0, 16.0, 14.0)),
    }  # fmt: skip
    return organs


def _with_hilum(kidney: Ellipsoid, side: int) -> Shape:
    x, y, z = kidney.centre
    return Without(kidney, Ellipsoid((x - side * 14, y + 6, z), (11.0, 6.0, 11.0)))


def _adrenal(mover: Mover, side: int, z: float) -> Shape:
    """Two thin limbs that meet in front, above the kidney."""
    tip = (side * 26.0, -25.0, z + 5)
    return mover.tube([(side * 38.0, -36.0, z - 8), tip, (side * 26.0, -40.0, z - 8)], [4.2, 5.6, 4.2])


def _details(rng: np.random.Generator, name: str, organ: Shape, value: float, finding: str) -> list[Part]:
    """Texture within an organ that leaves its label alone: medulla, gas, vessels, and this patient's finding."""
    low, high = organ.bounds()
    middle = (low + high) / 2
    if name == "stomach":
        gas = Ellipsoid((-44.0, 22.0, 56.0), (12.0, 9.0, 12.0))
        return [Part(Both(gas, organ), -600.0, None, fades=False)]
    if name.endswith("kidney"):
        x, y, z = middle
        core = Part(Both(Ellipsoid((x, y, z), (9.0, 9.0, 19.0)), organ), value - 40, None, grain=6.0)
        cyst = Ellipsoid((x + 9.0 * np.sign(x), y + 2, z - 14), (8.0, 8.0, 9.0))
        return [core, *([Part(Both(cyst, organ), WATER, None)] if finding == FINDINGS[1] else [])]
    if name == "liver":
        vein = Tube([(14.0, 2.0, 40.0), (34.0, 6.0, 52.0), (58.0, 12.0, 58.0)], [5.0, 4.0, 2.5])
        lesions = [
            Part(Both(Ellipsoid((float(x), float(y), float(z)), (r, r, r)), organ), 60.0, None)
            for x, y, z, r in rng.uniform((25, -25, 25, 4), (80, 35, 75, 9), size=(4, 4))
        ]
        return [Part(Both(vein, organ), value + 35, None), *(lesions if finding == FINDINGS[0] else [])]
    return []


def _pelvis() -> list[Part]:
    """Iliac wings, hip joints and sacrum around the bladder."""
    parts = []
    for side in (-1, 1):
        wing = Tube(
            [
                (side * 34.0, -50.0, -62.0),
                (side * 66.0, -26.0, -56.0),
                (side * 74.0, 4.0, -66.0),
                (side * 58.0, 0.0, -96.0),
            ],
            [6.0, 6.0, 6.0, 10.0],
        )
        joint = Ellipsoid((side * 66.0, 2.0, -106.0), (15.0, 15.0, 15.0))
        parts += [Part(wing, BONE, fades=False, grain=25.0), Part(joint, BONE - 40, fades=False, grain=25.0)]
        muscle = Ellipsoid((side * 60.0, -48.0, -100.0), (34.0, 18.0, 40.0))
        parts.insert(0, Part(muscle, MUSCLE, grain=5.0))
    return parts
