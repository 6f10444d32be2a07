# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The kind of network that suits a pool and the hardware, and the reason."""

from __future__ import annotations

import numpy as np

from lib.models.plan import Configuration
from lib.planning.fingerprint import Fingerprint
from lib.planning.planner import QUARTER, Budget, make_plan
from lib.planning.resolution import ANISOTROPIC, coarse_axis, target_spacing

# Fewer thick slices than this make a 3D network see little along them.
FEW_SLICES = 32


def choose_configuration(pool: Fingerprint, budget: Budget) -> tuple[Configuration, str]:
    """Kind of network, and why in a sentence.

    Let r be the coarsest median spacing over the finest, and n the median number of slices across the coarsest axis.

    - 2d for r >= 3 and n < 32.
    - 2d on a CPU if a 3D crop at the pool's spacing would show less than a quarter of the image.
    - Else 3d_anisotropic for r >= 3, and 3d_fullres below.

    Source: Isensee et al. 2021 (on ACDC a 2D U-Net is as good as a 3D one); the limit of 32 slices is ours. The rule
    for CPUs was measured on FetalSB (eval/results/learner): in the same minutes a 2D network sees so many more slices
    that its Dice was twice that of a 3D one.
    """
    median = pool.median_spacing()
    axis = coarse_axis(median)
    thick = median[axis] / min(median)
    slices = float(np.median(np.array(pool.shapes)[:, axis]))
    across = f"slices are {thick:.1f} times as far apart as their voxels, and the median image has {slices:g} of them"
    if thick >= ANISOTROPIC and slices < FEW_SLICES:
        return "2d", f"{across}: too few to look along, so each slice is segmented by itself"
    if budget.device == "cpu":
        plan = make_plan(pool, budget, "3d_fullres", spacing=target_spacing(pool)[0])
        if plan.shown is not None and plan.shown < QUARTER:
            shown = f"a 3D crop that a CPU trains in time would show {plan.shown:.0%} of the median image"
            return "2d", f"{shown}, so each slice is segmented by itself"
    if thick >= ANISOTROPIC:
        return "3d_anisotropic", f"{across}: looked at in-plane first, then along all axes"
    return "3d_fullres", f"voxels of the median image are {thick:.1f} times as long as wide, which suits 3D crops"
