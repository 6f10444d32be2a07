# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Fingerprint of a pool: spacings, sizes, intensities and modality."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lib.regions import Triple

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grey:
    """Grey values of a set of voxels."""

    low: float
    high: float
    mean: float
    std: float
    minimum: float
    voxels: int

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Grey:
        """0.5th and 99.5th percentile, mean, standard deviation and minimum."""
        low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
        wide = values.astype(np.float64)
        return cls(low, high, float(wide.mean()), float(wide.std()), float(values.min()), int(values.size))


@dataclass(frozen=True)
class Fingerprint:
    """Input of a plan; the same for any order of the images.

    Shapes and spacings (mm) of all readable images, sorted; modality "CT" or "other"; the intensity range of each
    sampled image. `grey` is over voxels of all sampled images, `foreground` over annotated foreground voxels, with
    equal weights for all classes.
    """

    shapes: tuple[Triple, ...]
    spacings: tuple[tuple[float, float, float], ...]
    modality: str
    modality_source: str
    images_grey: tuple[Grey, ...]
    grey: Grey
    foreground: Grey | None
    unreadable: tuple[str, ...] = ()

    def median_spacing(self) -> tuple[float, float, float]:
        x, y, z = np.median(np.array(self.spacings), axis=0)
        return float(x), float(y), float(z)

    def percentile_spacing(self, axis: int, percent: float) -> float:
        return float(np.percentile(np.array(self.spacings)[:, axis], percent))

    def median_shape(self, spacing: tuple[float, float, float]) -> tuple[float, float, float]:
        """Median size in voxels once every image is at `spacing`."""
        sizes = np.array(self.shapes) * np.array(self.spacings) / np.array(spacing)
        x, y, z = np.median(np.round(sizes), axis=0)
        return float(x), float(y), float(z)

    def rows(self) -> list[tuple[str, str]]:
        """Rows (name, value) that describe the pool to a person."""
        shape, spacing = np.array(self.shapes), np.array(self.spacings)
        tops = [grey.high for grey in self.images_grey]
        marked = f"{self.foreground.voxels} voxels" if self.foreground else "none"
        return [
            ("images", f"{len(self.shapes)}" + (f", unreadable: {', '.join(self.unreadable)}" * bool(self.unreadable))),
            ("size", " x ".join(f"{m:g} ({a}-{b})" for m, a, b in _spread(shape)) + " voxels"),
            ("spacing", " x ".join(f"{m:.4g} ({a:.4g}-{b:.4g})" for m, a, b in _spread(spacing)) + " mm"),
            ("modality", f"{self.modality} ({self.modality_source})"),
            ("grey values", f"99.5th percentile of an image: {min(tops):.4g} to {max(tops):.4g}"),
            ("annotated foreground", marked),
        ]


def _spread(values_na: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    return list(zip(np.median(values_na, axis=0), values_na.min(axis=0), values_na.max(axis=0), strict=True))
