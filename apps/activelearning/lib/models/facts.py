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
    """One finished training. Fields with a default are absent from files of earlier versions.

    Args:
        digest: of everything the training depended on; the name of its folder starts with it.
        round: round of the training.
        bundle: name of the bundle.
        members: networks of the ensemble.
        classes: class name -> id.
        recipe: see `Recipe`.
        spacing: spacing in mm that the networks work at; None for the spacing of each image.
        plan: the plan that the networks were built by; None for the network of the bundle.
        start: digest and members of the training whose weights these began with; None for fresh weights.
        smallest_mm3: smallest annotated structure of every optional class, in mm^3.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    digest: str
    round: int
    bundle: str
    members: int = Field(ge=1)
    classes: dict[str, int]
    recipe: Recipe
    spacing: tuple[float, float, float] | None = None
    plan: Plan | None = None
    start: tuple[str, int] | None = None
    smallest_mm3: dict[str, float] = Field(default_factory=dict)
