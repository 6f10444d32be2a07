# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Network recipes: the content of a folder of `bundles`, and the options that a request may change."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from lib.errors import PatchwiseError
from lib.models.plan import Configuration, Normalisation, Plan
from lib.options import problems
from lib.regions import Triple


class RecipeError(PatchwiseError, ValueError):
    """A bundle or a training option that cannot be used."""


# Fields of network.json that a plan decides, where they are there.
_PLANNED = ("factor", "kernels", "strides", "features", "axis")


class Recipe(BaseModel):
    """Training options of one ensemble member: values of the bundle, overridden by the /train request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patch: tuple[int, int, int] = Field(description="crop in voxels at the network's spacing")
    batch: int = Field(ge=1, le=1024, description="crops per step")
    steps: int = Field(ge=1, le=10_000_000, description="optimiser steps per member")
    learning_rate: float = Field(gt=0, le=10, description="peak learning rate of AdamW")
    weight_decay: float = Field(ge=0, le=10, description="decoupled weight decay")
    warmup: float = Field(ge=0, lt=1, description="share of the steps with rising learning rate")
    clip: float = Field(gt=0, description="largest norm of the gradient")
    foreground: float = Field(ge=0, le=1, description="share of crops centred on foreground")
    mirror: tuple[int, ...] = Field(default=(0,), description="axes that may be flipped")
    mirror_predictions: bool = Field(
        default=False, description="whether segmentations average the mirror images along these axes too"
    )
    shifts: int = Field(
        default=1,
        ge=1,
        le=16,
        description="predictions, shifted by one voxel each, whose mean segments an image of one window",
    )
    confidence: float = Field(
        default=0.0, ge=0, le=1, description="least mean probability of a component of a segmentation; 0: no limit"
    )
    smallest: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="least size of a component of an optional class, relative to the smallest annotated one",
    )
    one_piece: bool = Field(
        default=True,
        description="whether classes that are one piece in nearly all fully annotated images are shown as one piece",
    )
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
    deep_supervision: int = Field(default=0, ge=0, le=5, description="lower resolutions with a loss of their own")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the running mean of the weights; 0: last weights")
    start: Literal["scratch", "last"] = Field(
        default="scratch", description="fresh weights, or those of the last finished training"
    )
    flat: int | None = Field(
        default=None, ge=0, le=2, description="axis whose slices are turned and scaled in-plane only; null for none"
    )
    compiled: bool = Field(
        default=False, description="whether torch.compile runs the network; with CUDA graphs on a GPU"
    )
    precision: Literal["native", "full"] = Field(
        default="native", description="reduced precision where the device has it natively, or float32 everywhere"
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
        self.plan: Plan | None = None

    @property
    def configuration(self) -> Configuration:
        """Kind of plan that fits the network."""
        wanted = self._config.get("configuration", "3d_fullres")
        if wanted not in get_args(Configuration):
            known = ", ".join(get_args(Configuration))
            raise RecipeError(f"bundle {self.name}: configuration must be one of {known}, found {wanted!r}")
        return cast(Configuration, wanted)

    @property
    def normalisation(self) -> Normalisation:
        """Grey values as the plan has them; the z-score of each image without one."""
        return self.plan.normalisation if self.plan else Normalisation()

    def planned(self, plan: Plan) -> Bundle:
        """This bundle with the plan's network, crops, batch, spacing and normalisation.

        A plan decides only those fields of the network that network.json has. A network of fixed shape takes crops of
        the plan's size, rounded up to its own divisor.
        """
        made = copy.copy(self)
        decided = plan.model_dump(mode="json")
        made._config = {**self._config, **{k: decided[k] for k in _PLANNED if k in self._config}}
        made.plan = plan
        patch = [math.ceil(p / d) * d for p, d in zip(plan.patch, made.divisor, strict=True)]
        made._config["recipe"] = {
            **self._config["recipe"],
            **{"patch": patch, "batch": plan.batch, "foreground": plan.foreground, "flat": plan.flat},
            **{"mirror": plan.mirror, "mirror_predictions": bool(plan.mirror)},
        }
        return made

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Names of the recipes and their changes to the bundle's own recipe, which is `default` and comes first."""
        return {"default": {}, **self._config.get("recipes", {})}

    def recipe(self, overrides: dict[str, Any]) -> Recipe:
        """The bundle's recipe with `overrides`, of which `recipe` may name one of network.json's `recipes`.

        Raises:
            RecipeError: unknown or unusable options, all in one message.
        """
        given = dict(overrides)
        name = str(given.pop("recipe", "default"))
        if name not in self.recipes:
            raise RecipeError(f"training option recipe: {self.name} has {', '.join(self.recipes)}, found {name!r}")
        try:
            fixed = {**self._config["recipe"], **self.recipes[name]}
            fixed["steps"] = max(1, round(fixed["steps"] * (self.plan.effort if self.plan else 1)))
            recipe = Recipe.model_validate({**fixed, **given})
        except ValidationError as error:
            raise RecipeError(f"training option {problems(error)}") from error
        heads = len(self._config["strides"]) - 2 if "heads" in self._config else 0
        if recipe.deep_supervision > heads:
            found = f"{self.name} has {heads} lower resolutions for it, found {recipe.deep_supervision}"
            raise RecipeError(f"training option deep_supervision: {found}")
        return recipe

    @property
    def divisor(self) -> Triple:
        """Divisor of the input size per axis: the folding factor times the product of the strides.

        A network without strides in network.json has it as `divisor`.
        """
        if "divisor" in self._config:
            return cast(Triple, tuple(int(d) for d in self._config["divisor"]))
        factor = self._config.get("factor", 1)
        folds = [factor] * 3 if isinstance(factor, int) else factor
        found = (int(f) * math.prod(int(s[a]) for s in self._config["strides"]) for a, f in enumerate(folds))
        return cast(Triple, tuple(found))

    def layers(self, what: str) -> list[str]:
        """Names of the network's parts that serve as `bottleneck`, `bottleneck_weights`, `last_decoder` or `decoder`.

        A name may contain `{up}` and `{down}`: each step up, and each level between the first and the lowest. `{last}`
        and `{lowest}` are the last step up and the lowest level. Their numbers follow from the plan.

        Raises:
            RecipeError: the bundle has none, so methods that need features or gradients cannot use it.
        """
        found = self._config.get("layers", {}).get(what)
        if not found:
            raise RecipeError(f"bundle {self.name} names no layers for {what!r}; add them to configs/network.json")
        names = [found] if isinstance(found, str) else list(found)
        levels = len(self._config.get("strides", ()))
        each = {"{up}": range(levels - 1), "{down}": range(levels - 2)}
        fixed = [name.replace("{last}", str(levels - 2)).replace("{lowest}", str(levels - 1)) for name in names]
        return [
            name.replace(key, str(i)) if key else name
            for key, steps, group in _groups(fixed, each)
            for i in steps
            for name in group
        ]

    def network(self, classes: int, dropout: float | None = None, heads: int = 0) -> nn.Module:
        """A fresh network with `classes` foreground classes; MONAI's ConfigParser resolves `network_def`.

        While it trains, one with `heads` answers (B, 1 + heads, C, ...), see `lib.training.loss.DeepSupervisionLoss`.
        """
        from monai.bundle import ConfigParser

        parser = ConfigParser({**self._config, "num_classes": classes + 1, "dropout": dropout, "heads": heads})
        network = parser.get_parsed_content("network_def", instantiate=True)
        assert isinstance(network, nn.Module)
        return network

    def fingerprint(self) -> dict[str, Any]:
        """Options that determine the network and its input; part of a training's digest."""
        fed = self.plan.model_dump(mode="json", include={"spacing", "normalisation"}) if self.plan else {}
        return {key: value for key, value in self._config.items() if key not in ("recipe", "recipes")} | {
            "name": self.name,
            **fed,
        }


def _groups(names: list[str], each: dict[str, range]) -> list[tuple[str, range, list[str]]]:
    """Groups of consecutive names with the same placeholder; a name without one is a group of its own."""
    found: list[tuple[str, range, list[str]]] = []
    for name in names:
        key = next((k for k in each if k in name), "")
        if key and found and found[-1][0] == key:
            found[-1][2].append(name)
        else:
            found.append((key, each[key] if key else range(1), [name]))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path}: not readable as JSON ({error}); repair the bundle") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a JSON object")
    return content
