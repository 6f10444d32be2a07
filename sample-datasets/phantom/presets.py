# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Presets: which anatomy is scanned how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phantom import abdomen, heart, kidneys
from phantom.acquisition import Knobs, Phantom, Spacing, grid, scan
from phantom.scene import Scene, Warp
from phantom.tubes import TUBES, TubePreset


@dataclass(frozen=True)
class ScenePreset:
    """An anatomy with its classes, field of view and spacing in mm, and modality."""

    name: str
    labels: tuple[str, ...]
    field_mm: Spacing
    spacing: Spacing
    modality: str
    draw: Callable[[np.random.Generator, Knobs], tuple[Scene, Warp]]


Preset = TubePreset | ScenePreset

PRESETS: dict[str, Preset] = {
    **TUBES,
    "acdc": ScenePreset("acdc", heart.LABELS, heart.FIELD_MM, heart.SPACING_MM, "MR", heart.heart),
    "kits": ScenePreset("kits", kidneys.LABELS, kidneys.FIELD_MM, kidneys.SPACING_MM, "CT", kidneys.kidneys),
    "amos": ScenePreset("amos", abdomen.LABELS, abdomen.FIELD_MM, abdomen.SPACING_MM, "CT", abdomen.abdomen),
}


def make_scene_case(rng: np.random.Generator, preset: ScenePreset, knobs: Knobs) -> Phantom:
    """One patient of a preset, scanned once."""
    size, spacing = grid(knobs, preset.field_mm, preset.spacing)
    scene, warp = preset.draw(rng, knobs)
    return scan(rng, scene, warp, size, spacing, knobs)
