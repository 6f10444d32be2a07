# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The facts of a finished training, as `facts.json` and `current.json` hold them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from lib.models.plan import Plan
from lib.models.recipe import Recipe


class ModelFacts(BaseModel):
    """One finished training. Fields with a default are absent from files of earlier versions."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    digest: str
    """Digest of all inputs of the training; the name of its folder starts with it."""
    round: int
    bundle: str
    """Name of the bundle."""
    members: int = Field(ge=1)
    """Number of networks of the ensemble."""
    classes: dict[str, int]
    """Class name -> id."""
    recipe: Recipe
    spacing: tuple[float, float, float] | None = None
    """Spacing in mm of the input of the networks; None for the spacing of each image."""
    plan: Plan | None = None
    """Plan that the networks follow; None for the network of the bundle."""
    start: tuple[str, int] | None = None
    """Digest and members of the training that provided the initial weights; None for fresh weights."""
    smallest_mm3: dict[str, float] = Field(default_factory=dict)
    """Smallest annotated structure of every optional class, in mm^3."""
    one_piece: tuple[int, ...] = ()
    """Ids of classes that are one component in nearly all annotated images, 0 for all foreground together."""
