# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Network recipes: what a folder of `bundles` says, and what a request may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from lib.options import problems


class RecipeError(ValueError):
    """A bundle or a training option that cannot be used."""


class Recipe(BaseModel):
    """How one ensemble member is trained. Values of the bundle, overridden by the /train request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patch: tuple[int, int, int] = Field(description="crop in voxels at the network's spacing")
    batch: int = Field(ge=1, le=1024, description="crops a step")
    steps: int = Field(ge=1, le=10_000_000, description="optimiser steps a member")
    learning_rate: float = Field(gt=0, le=10, description="peak learning rate of AdamW")
    weight_decay: float = Field(ge=0, le=10, description="decoupled weight decay")
    warmup: float = Field(ge=0, lt=1, description="share of the steps with rising learning rate")
    clip: float = Field(gt=0, description="largest norm of the gradient")
    foreground: float = Field(ge=0, le=1, description="share of crops centred on foreground")
    mirror: tuple[int, ...] = Field(default=(0,), description="axes that may be flipped")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout rate while training")
    learning_loss: float = Field(default=0.0, ge=0, le=1000, description="weight of the head that predicts losses")
    learning_loss_margin: float = Field(default=1.0, ge=0, le=1000, description="margin of its ranking loss")
    learning_loss_share: float = Field(
        default=0.27, ge=0, le=1, description="share of the steps in which the head trains the network too"
    )
    pseudo_labels: Literal["none", "signed_distance", "morphological"] = Field(
        default="none", description="labels interpolated between annotated slices"
    )
    pseudo_thickness: int = Field(default=10, ge=3, le=10_000, description="thickest block that is interpolated")
    pseudo_axis: int = Field(default=2, ge=0, le=2, description="axis that annotated slices lie across")
    loss: Literal["dice_ce", "focal", "weighted_dice"] = Field(
        default="dice_ce", description="loss over annotated voxels"
    )
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the running mean of the weights; 0: last weights")
    start: Literal["scratch", "last"] = Field(
        default="scratch", description="fresh weights, or those of the last finished training"
    )
    augment: bool = Field(default=True, description="whether crops are augmented")


class Bundle:
    """One folder of `bundles`: configs/metadata.json and configs/network.json.

    Raises:
        RecipeError: the folder or one of its files is missing or not readable.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.folder = folder
        if not folder.is_dir():
            known = sorted(p.name for p in folder.parent.glob("*") if (p / "configs").is_dir())
            raise RecipeError(f"no bundle {folder.name} in {folder.parent}; known bundles are {', '.join(known)}")
        self.metadata = _read(folder / "configs" / "metadata.json")
        self._config = _read(folder / "configs" / "network.json")

    def recipe(self, overrides: dict[str, Any]) -> Recipe:
        """The bundle's recipe with `overrides`.

        Raises:
            RecipeError: unknown or unusable options, all in one message.
        """
        try:
            return Recipe.model_validate({**self._config["recipe"], **overrides})
        except ValidationError as error:
            raise RecipeError(f"training option {problems(error)}") from error

    @property
    def divisor(self) -> tuple[int, int, int]:
        """What sizes of an input must be multiples of: the folding factor times the product of the strides."""
        total = [int(self._config["factor"])] * 3
        for stride in self._config["strides"]:
            total = [t * s for t, s in zip(total, stride, strict=True)]
        return total[0], total[1], total[2]

    def layers(self, what: str) -> list[str]:
        """Names of the network's parts that serve as `bottleneck`, `bottleneck_weights`, `last_decoder` or `decoder`.

        Raises:
            RecipeError: the bundle names none, so methods on features or gradients cannot work with it.
        """
        found = self._config.get("layers", {}).get(what)
        if not found:
            raise RecipeError(f"bundle {self.name} names no layers for {what!r}; add them to configs/network.json")
        return [found] if isinstance(found, str) else list(found)

    def network(self, classes: int, dropout: float | None = None) -> nn.Module:
        """A fresh network with `classes` foreground classes; MONAI's ConfigParser resolves `network_def`."""
        from monai.bundle import ConfigParser

        parser = ConfigParser({**self._config, "num_classes": classes + 1, "dropout": dropout})
        network = parser.get_parsed_content("network_def", instantiate=True)
        assert isinstance(network, nn.Module)
        return network

    def fingerprint(self) -> dict[str, Any]:
        """What decides which network comes out; part of a training's digest."""
        return {key: value for key, value in self._config.items() if key != "recipe"} | {"name": self.name}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path}: not readable as JSON ({error}); repair the bundle") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a JSON object")
    return content
