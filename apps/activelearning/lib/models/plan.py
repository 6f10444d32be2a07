# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Plans: preprocessing and network for the images of one pool; made once, written as YAML."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lib.errors import PatchwiseError
from lib.options import problems
from lib.regions import Triple

FLAT = 3

Configuration = Literal["3d_fullres", "2d", "3d_anisotropic"]


class PlanError(PatchwiseError, ValueError):
    """A plan that cannot be made or used; one sentence that names the file or the field."""


class Normalisation(BaseModel):
    """Normalisation of intensities for the network.

    zscore: (x - mean) / std of each image, clipped to its own 0.5th and 99.5th percentiles.
    ct: (clip(x, low, high) - mean) / std with statistics of the whole pool.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: Literal["zscore", "ct"] = "zscore"
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)

    def __str__(self) -> str:
        if self.scheme == "zscore":
            return "z-score of each image"
        return f"clip to {self.low:g} .. {self.high:g}, then (x - {self.mean:.4g}) / {self.std:.4g}"


class Plan(BaseModel):
    """Everything about a training that follows from the pool and the hardware; axes are those of the stored images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    configuration: Configuration = Field(description="whole 3D crops, slices, or 3D with in-plane first levels")
    axis: int = Field(ge=0, le=2, description="axis that slices lie across: the coarsest one")
    spacing: tuple[float, float, float] = Field(description="mm per voxel of the network's input; 0: each image's own")
    patch: Triple = Field(description="voxels of a crop at that spacing")
    shown: float | None = Field(default=None, ge=0, le=1, description="share of the median image that a crop shows")
    batch: int = Field(ge=1, le=1024, description="crops per step")
    foreground: float = Field(default=1 / 3, ge=0, le=1, description="share of crops centred on a class")
    mirror: tuple[int, ...] = Field(default=(), description="axes mirrored in training and in segmentations")
    effort: float = Field(default=1.0, gt=0, le=100, description="times the steps of the recipe")
    factor: Triple = Field(default=(1, 1, 1), description="space-to-depth folding in front of the network")
    kernels: tuple[Triple, ...] = Field(min_length=3, description="size of the convolutions of each level")
    strides: tuple[Triple, ...] = Field(min_length=3, description="step into each level; the first is 1")
    features: tuple[int, ...] = Field(min_length=3, description="channels of each level")
    normalisation: Normalisation = Field(default=Normalisation(), description="normalisation of intensities")
    device: Literal["cpu", "cuda"] = Field(description="device that the plan was made for")
    memory_gib: float = Field(gt=0, description="memory budget in GiB")
    estimate_gib: float = Field(default=0.0, ge=0, description="estimated memory of a training step in GiB")
    why: dict[str, str] = Field(default_factory=dict, description="one sentence per decision")

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        if not len(self.kernels) == len(self.strides) == len(self.features):
            counts = f"{len(self.kernels)}, {len(self.strides)} and {len(self.features)}"
            raise ValueError(f"kernels, strides and features must have one entry a level, found {counts}")
        own = [
            mm for axis, mm in enumerate(self.spacing) if mm == 0 and (self.configuration, axis) == ("2d", self.axis)
        ]
        if sum(mm > 0 for mm in self.spacing) + len(own) < 3:
            raise ValueError(f"spacing must be above 0 (0 across the slices of a 2d plan), found {self.spacing}")
        if not set(self.mirror) <= {0, 1, 2}:
            raise ValueError(f"mirror takes the axes 0, 1 and 2, found {self.mirror}")
        if min(self.patch) < 1 or min(self.factor) < 1 or min(self.features) < 1:
            raise ValueError("patch, factor and features must be above 0")
        if any(p % d for p, d in zip(self.patch, self.divisor, strict=True)):
            raise ValueError(f"patch {self.patch} must be a multiple of {self.divisor} (factor times strides)")
        return self

    @property
    def divisor(self) -> Triple:
        """Divisor of the input size per axis: the folding factor times the product of the strides."""
        found = (f * math.prod(s[a] for s in self.strides) for a, f in enumerate(self.factor))
        return cast(Triple, tuple(found))

    @property
    def flat(self) -> int | None:
        """Axis across which augmentation must not mix slices: of slices, and of crops more than thrice as wide as deep.

        Source: Isensee et al. 2021, online methods (data augmentation in 2D for anisotropic patches).
        """
        shallow = max(self.patch) > FLAT * self.patch[self.axis]
        return self.axis if self.configuration == "2d" or shallow else None

    def table(self) -> str:
        """A readable table: decision, value, reason."""
        rows = [(name, _shown(name, getattr(self, name)), self.why.get(name, "")) for name in _TABLE]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {why}".rstrip() for name, value, why in rows]
        return "\n".join(lines)


_TABLE = tuple(name for name in Plan.model_fields if name not in ("why", "device", "axis"))


def _shown(name: str, value: Any) -> str:
    if name in ("kernels", "strides"):
        return " ".join("x".join(map(str, level)) for level in value)
    if name == "features":
        return "-".join(map(str, value))
    if name == "mirror":
        return ", ".join(map(str, value)) or "none"
    if name == "shown":
        return "unknown" if value is None else f"{value:.0%}"
    if isinstance(value, tuple):
        return " x ".join(f"{v:.4g}" for v in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def checked(fields: dict[str, Any], source: object) -> Plan:
    """A plan of these fields.

    Raises:
        PlanError: the fields that are wrong, after `source`.
    """
    try:
        return Plan.model_validate(fields)
    except ValidationError as error:
        raise PlanError(f"{source}: {problems(error)}") from error
