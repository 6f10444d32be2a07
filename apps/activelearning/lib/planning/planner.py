# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The planner: from the fingerprint of a pool and the memory there is to spacing, crops, network and normalisation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from lib.models.plan import Configuration, Normalisation, Plan
from lib.planning.fingerprint import Fingerprint
from lib.planning.resolution import ANISOTROPIC, Spacing, coarse_axis, coarser, target_spacing
from lib.planning.topology import Ladder, activations, features, ladder
from lib.regions import Triple

GIB = 1 << 30
# nnU-Net's measure: so many activations a crop train in 8 GiB with so many crops.
REFERENCE_GIB = 8.0
REFERENCE_3D, CROPS_3D = 560e6, 2
REFERENCE_2D, CROPS_2D = 85e6, 12
# Largest crops the search starts from, in voxels of equal spacing.
START_3D, START_2D = 256.0**3, 2048.0**2
# A batch covers at most this share of the voxels of the pool.
COVERED = 0.05
SMALLEST_BATCH = 2
# Where a crop shows most of the image: nnU-Net's third of the crops centred on a class, and the steps of the recipe.
# Where it shows less than half: twice of both, because trainings as short as these do not find small classes otherwise,
# and mirror images along every axis (nnU-Net's default anywhere), because few cases hold a small class in each place.
# On small scans mirror images made no difference.
# Slices need no more of either: a crop of one slice shows a class in nearly every third.
FOREGROUND, MOST, LARGE = 1 / 3, 0.5, 2
# Crops that show less than a quarter of an image see too little around a structure to tell it from others. To show as
# much, a crop may have STRETCH times the positions.
QUARTER, STRETCH = 0.25, 1.6
SIDES = frozenset(("left", "right", "l", "r", "lt", "rt", "lh", "rh"))
# The anisotropic u-net has five levels, of which the upper two look along the slices only.
AUNET_LEVELS, AUNET_FLAT = 5, 2


@dataclass(frozen=True)
class Rules:
    """Planning rules that differ between hardware.

    Pairs are (3D, 2D).

    - first, largest: channels of the first level and of any.
    - folds: space-to-depth factors on the finely resolved axes, in the order they are tried. The first one whose crop
      shows a quarter of the image is taken, else the last.
    - coarser: factors of a coarser spacing of 3D networks, tried in the same way. A larger folding factor would leave
      the thin stage at full resolution, which then costs most of a step.
    - batch: crops per step; None for as many as fit.
    - positions: limit of the folded crop in voxels, which bounds the seconds per step.
    - cover: a crop may be this share of the median image rather than be padded beyond it.
    """

    first: int
    largest: tuple[int, int]
    folds: tuple[tuple[int, ...], tuple[int, ...]] = ((1,), (1,))
    coarser: tuple[float, ...] = (1.0,)
    batch: tuple[int, int] | None = None
    positions: tuple[int, int] | None = None
    cover: float = 1.0


# CPU, 3D: the recipe measured on hippocampi (two crops of 40 x 48 x 40 folded by two, 24-48-96 channels); no crop is
# a quarter more expensive than that, so a step takes less than a second on one core. 2D: measured on ACDC
# (eval/results/learner); six slices a step cost as much as two crops.
RULES = {
    "cuda": Rules(first=32, largest=(320, 512)),
    "cpu": Rules(
        first=24,
        largest=(192, 192),
        folds=((2,), (2, 4)),
        coarser=(1.0, 1.25, 1.5, 1.75, 2.0),
        batch=(2, 6),
        positions=(12_000, 4_096),
        cover=0.95,
    ),
}


@dataclass(frozen=True)
class Budget:
    """Memory of a training step in GiB, and its device."""

    device: Literal["cpu", "cuda"]
    memory_gib: float


def make_plan(
    pool: Fingerprint,
    budget: Budget,
    configuration: Configuration = "3d_fullres",
    classes: int = 3,
    spacing: Spacing | None = None,
    sided: bool = False,
) -> Plan:
    """The plan of a pool; a pure function of its arguments.

    Args:
        classes: outputs of the network, background included.
        spacing: mm the network works at; None decides by `target_spacing`.
        sided: whether classes distinguish left and right (`names_sides`), so that the labels of a mirror image would be
            wrong.

    Source: Isensee et al. 2021, online methods (rule-based parameters), where Rules do not say otherwise.
    """
    rules = RULES[budget.device]
    wanted, why_spacing = (spacing, "as asked for") if spacing else target_spacing(pool)
    axis = coarse_axis(wanted)
    if configuration == "2d":
        found = _Search(pool, budget, rules, configuration, axis, wanted, classes).slices()
        wanted = cast(Spacing, tuple(0.0 if a == axis else mm for a, mm in enumerate(wanted)))
        why_spacing = f"{why_spacing}; slices stay where they are (0: each image's own)"
    else:
        for times in (1.0,) if spacing else rules.coarser:
            at = coarser(wanted, times)
            found = _Search(pool, budget, rules, configuration, axis, at, classes).volumes()
            if found.shown is not None and found.shown >= QUARTER:
                break
        wanted = at
        why_spacing += f"; {times:g} times coarser, so that a crop shows more of an image" if times > 1 else ""
    return _with_pool(_with_mirror(found, sided), wanted, why_spacing, pool)


def names_sides(names: Iterable[str]) -> bool:
    """Return whether a class is named left or right: "left kidney", "Kidney_R", "hippocampus-lh"."""
    words = (re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) for name in names)
    return any(not SIDES.isdisjoint(found) for found in words)


def normalisation(pool: Fingerprint) -> tuple[Normalisation, str]:
    """CT: clipping and z-score with numbers of annotated foreground; others: z-score of each image."""
    if pool.modality != "CT":
        return Normalisation(), f"{pool.modality_source}: grey values mean nothing across images"
    grey = pool.foreground or pool.grey
    of = "annotated foreground" if pool.foreground else "whole sampled images, as hardly any foreground is annotated"
    made = Normalisation(scheme="ct", low=grey.low, high=grey.high, mean=grey.mean, std=max(grey.std, 1e-6))
    return made, f"CT ({pool.modality_source}): percentiles, mean and deviation of {of}"


def _with_mirror(plan: Plan, sided: bool) -> Plan:
    """The plan with the axes to mirror: all of them where crops show little of an image, unless classes have sides."""
    little = plan.effort > 1
    mirror = (0, 1, 2) if little and not sided else ()
    why = f"a crop shows {'little' if little else 'most'} of an image"
    if plan.configuration == "2d":
        why = "mirror images of slices cost Dice in trainings as short as these"
    why = "classes tell left from right" if little and sided else why
    return plan.model_copy(update={"mirror": mirror, "why": {**plan.why, "mirror": why}})


def _with_pool(plan: Plan, spacing: Spacing, why_spacing: str, pool: Fingerprint) -> Plan:
    """The plan with its spacing and normalisation, and why."""
    grey, why_grey = normalisation(pool)
    why = {**plan.why, "spacing": why_spacing, "normalisation": why_grey}
    return plan.model_copy(update={"spacing": spacing, "normalisation": grey, "why": why})


@dataclass(frozen=True)
class _Search:
    """Largest crop whose network fits, for one pool, budget and configuration."""

    pool: Fingerprint
    budget: Budget
    rules: Rules
    configuration: Configuration
    axis: int
    spacing: Spacing
    classes: int

    def volumes(self) -> Plan:
        """3D crops."""
        median = self.pool.median_shape(self.spacing)
        start = _start(self.spacing, START_3D)
        flat, levels = None, 99
        if self.configuration == "3d_anisotropic":
            flat, levels = (self.axis, AUNET_FLAT), AUNET_LEVELS
        limit = REFERENCE_3D * self.budget.memory_gib / REFERENCE_GIB
        if self.rules.batch:
            limit = limit * CROPS_3D / self.rules.batch[0]
        for fold in self.rules.folds[0]:
            factor = self._factor(median, range(3), fold)
            found, cost = self._shrunk(start, median, range(3), factor, limit, 0, levels, flat)
            patch = cast(Triple, tuple(n * f for n, f in zip(found.size, factor, strict=True)))
            shown = _shown(patch, median, range(3))
            if shown >= QUARTER:
                break
        batch, why = self._batch(cost, limit, CROPS_3D, patch, median)
        return self._plan(found, patch, factor, batch, cost * batch / CROPS_3D / REFERENCE_3D, median, shown, why)

    def slices(self) -> Plan:
        """Crops of single slices for a 2D network."""
        axes = [a for a in range(3) if a != self.axis]
        median = self.pool.median_shape(self.spacing)
        start = _start([self.spacing[a] for a in axes], START_2D)
        limit = REFERENCE_2D * self.budget.memory_gib / REFERENCE_GIB
        flat_median = [median[a] for a in axes]
        for fold in self.rules.folds[1]:
            factor = self._factor(median, axes, fold)
            found, cost = self._shrunk(start, flat_median, axes, factor, limit, 1, 99, None)
            patch = cast(Triple, _with([n * factor[a] for n, a in zip(found.size, axes, strict=True)], self.axis, 1))
            shown = _shown(patch, median, axes)
            if shown >= QUARTER:
                break
        ladder_3d = replace(
            found,
            kernels=tuple(_with(level, self.axis, 1) for level in found.kernels),
            strides=tuple(_with(level, self.axis, 1) for level in found.strides),
        )
        batch, why = self._batch(cost, limit, CROPS_2D, patch, median)
        return self._plan(ladder_3d, patch, factor, batch, cost * batch / CROPS_2D / REFERENCE_2D, median, shown, why)

    def _factor(self, median: Sequence[float], axes: Sequence[int], fold: int) -> Triple:
        """Folding on finely resolved axes that keep room for two halvings."""
        fine = min(self.spacing[a] for a in axes)
        folds = [a for a in axes if self.spacing[a] < 2 * fine and median[a] / fold >= 14]
        return cast(Triple, tuple(fold if a in folds else 1 for a in range(3)))

    def _shrunk(
        self,
        start: Sequence[float],
        median: Sequence[float],
        axes: Sequence[int],
        factor: Triple,
        limit: float,
        kind: int,
        levels: int,
        flat: tuple[int, int] | None,
    ) -> tuple[Ladder, int]:
        """Ladder and activations of the largest crop below `limit`; `kind` is 0 for volumes and 1 for slices.

        The crop starts as the median image, at most `start`; the axis that covers most of the image gives way by one
        step of its divisor until the network fits.
        """
        fold = [factor[a] for a in axes]
        spacing = [self.spacing[a] * f for a, f in zip(axes, fold, strict=True)]
        whole = [m / f for m, f in zip(median, fold, strict=True)]
        wanted: list[float] = [min(s / f, w) for s, f, w in zip(start, fold, whole, strict=True)]
        found = ladder(wanted, spacing, levels, flat)
        if self.rules.cover < 1:
            lower = [n - d for n, d in zip(found.size, found.divisor, strict=True)]
            wanted = [
                low if n > w and low >= self.rules.cover * w else n
                for n, low, w in zip(found.size, lower, whole, strict=True)
            ]
            found = ladder(wanted, spacing, levels, flat)
        largest, most = self.rules.largest[kind], math.inf
        if self.rules.positions:
            most = self.rules.positions[kind]
            most = max(most, min(STRETCH * most, 1.25 * QUARTER * math.prod(whole)))
        cost = self._cost(found, largest)
        while cost > limit or math.prod(found.size) > most:
            share = [n / w for n, w in zip(found.size, whole, strict=True)]
            shrinkable = [a for a, (n, d) in enumerate(zip(found.size, found.divisor, strict=True)) if n > d]
            if not shrinkable:
                break
            widest = max(shrinkable, key=lambda a: (share[a], -a))
            smaller: list[float] = list(found.size)
            smaller[widest] -= found.divisor[widest]
            step = ladder(smaller, spacing, levels, flat).divisor[widest]
            smaller[widest] = found.size[widest] - step
            found = ladder(smaller, spacing, levels, flat)
            cost = self._cost(found, largest)
        # MONAI's DynUNet has three levels at least.
        missing = max(0, 3 - len(found.strides))
        ones = ((1,) * len(spacing),) * missing
        found = replace(found, kernels=found.kernels + found.kernels[-1:] * missing, strides=found.strides + ones)
        return found, self._cost(found, largest)

    def _cost(self, found: Ladder, largest: int) -> int:
        channels = features(self.rules.first, largest, len(found.strides))
        return activations(found.size, found.strides, channels, self.classes)

    def _batch(self, cost: float, limit: float, crops: int, patch: Triple, median: Sequence[float]) -> tuple[int, str]:
        if self.rules.batch:
            flat = self.configuration == "2d"
            why = "more looks at the data a second than larger crops" if flat else "more steps train further"
            return self.rules.batch[flat], f"fixed on a CPU: {why}"
        fits = round(limit / cost * crops)
        share = round(math.prod(median) * len(self.pool.shapes) * COVERED / math.prod(patch))
        batch = max(SMALLEST_BATCH, min(fits, share))
        if batch == fits:
            return batch, "what fits the memory"
        if batch == share:
            return batch, f"{COVERED:.0%} of the pool's voxels, although {fits} would fit"
        return batch, "the smallest that is trained with"

    def _why_configuration(self) -> str:
        thick = self.spacing[self.axis] / min(self.spacing)
        if self.configuration != "3d_fullres" or thick <= ANISOTROPIC:
            return f"as the bundle asks; slices lie across axis {self.axis}"
        advice = "bundles for 3d_anisotropic and 2d are made for that"
        return f"as the bundle asks; slices across axis {self.axis} are {thick:.1f} times coarser: {advice}"

    def _plan(
        self,
        found: Ladder,
        patch: Triple,
        factor: Triple,
        batch: int,
        share: float,
        median: Sequence[float],
        shown: float,
        why_batch: str,
    ) -> Plan:
        largest = self.rules.largest[1 if self.configuration == "2d" else 0]
        image = " x ".join(f"{m:g}" for m in median)
        gib = round(share * REFERENCE_GIB, 3)
        of = "plane" if self.configuration == "2d" else "volume"
        more = LARGE if shown < MOST and self.configuration != "2d" else 1
        little = (
            f"; WARNING: below {QUARTER:.0%}, so structures far apart may be confused; a coarser spacing shows more"
        )
        return Plan(
            configuration=self.configuration,
            axis=self.axis,
            spacing=self.spacing,
            patch=patch,
            shown=round(shown, 4),
            batch=batch,
            foreground=FOREGROUND * more,
            effort=more,
            factor=factor,
            kernels=cast("tuple[Triple, ...]", found.kernels),
            strides=cast("tuple[Triple, ...]", found.strides),
            features=features(self.rules.first, largest, len(found.strides)),
            device=self.budget.device,
            memory_gib=self.budget.memory_gib,
            estimate_gib=gib,
            why={
                "configuration": self._why_configuration(),
                "patch": f"median image is {image} at this spacing; the largest crop within the budget",
                "shown": f"of the {of} of the median image{little if shown < QUARTER else ''}",
                "batch": why_batch,
                "foreground": f"doubled for volumes of which a crop shows less than {MOST:.0%}",
                "effort": "doubled with it",
                "factor": "folding keeps every voxel and makes a step cheaper on a CPU" if max(factor) > 1 else "none",
                "kernels": "an axis is looked along once it is less than twice as coarse as the finest",
                "strides": "an axis is halved while it has 8 voxels and is among the finest",
                "features": f"doubled from level to level, at most {largest}",
                "memory_gib": f"of the {'GPU' if self.budget.device == 'cuda' else 'RAM'}",
                "estimate_gib": "from the number of activations",
            },
        )


def _start(spacing: Sequence[float], voxels: float) -> list[float]:
    """A crop of `voxels` voxels with the same millimetres on every axis."""
    density = [1 / mm for mm in spacing]
    scale = (voxels / math.prod(density)) ** (1 / len(density))
    return [float(round(d * scale)) for d in density]


def _shown(patch: Sequence[int], median: Sequence[float], axes: Iterable[int]) -> float:
    """Share of the median image that a crop shows along `axes`."""
    return math.prod(min(1.0, patch[a] / median[a]) for a in axes)


def _with(values: Sequence[int], axis: int, value: int) -> tuple[int, ...]:
    """`values` of the other axes with `value` put in at `axis`."""
    return (*values[:axis], value, *values[axis:])
