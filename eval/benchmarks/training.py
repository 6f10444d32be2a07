# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""One training step against the usual way: MONAI dictionary transforms over a CacheDataset, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    Lambdad,
    RandCropByLabelClassesd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandZoomd,
    SpatialPadd,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from eval.benchmarks import Row
from eval.benchmarks.timing import ratio
from lib.models.precision import autocast_type
from lib.models.preprocessing import TrainingCase
from lib.models.recipe import Bundle, Recipe
from lib.partial_labels import UNLABELLED
from lib.training.loss import PartialDiceCELoss
from lib.training.trainer import CropStream

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "segmentation_dynunet_3d"
SHAPE = (36, 50, 35)
CASES = 8
_KEYS = ("image", "label")
_ANGLE = float(np.deg2rad(15))


def run() -> Iterator[Row]:
    """Rows of the training side, each as it is measured."""
    rng = np.random.default_rng(0)
    images = [rng.normal(size=SHAPE).astype(np.float32) for _ in range(CASES)]
    labels = [(rng.random(SHAPE) < 0.05).astype(np.uint8) * rng.integers(1, 3, SHAPE).astype(np.uint8) for _ in images]
    bundle = Bundle(BUNDLE)
    recipe = bundle.recipe({})
    yield step_row(bundle, recipe, images, labels)
    yield data_row(recipe, images, labels)


def step_row(bundle: Bundle, recipe: Recipe, images: list[NDArray[Any]], labels: list[NDArray[Any]]) -> Row:
    """A whole step, data included, of the same network: this project's trainer against the usual one."""
    mine, plain = our_batches(recipe, images, labels), monai_batches(recipe, images, labels)
    half = autocast_type(torch.device("cpu"))
    kind = "bf16" if half else "fp32: no native bf16 here"
    usual = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    return ratio(
        f"training step with data ({kind})",
        _stepper(bundle.network(2), mine, PartialDiceCELoss(), half),
        _stepper(bundle.network(2), plain, usual, None),
        1.0,
        5,
        5,
    )


def data_row(recipe: Recipe, images: list[NDArray[Any]], labels: list[NDArray[Any]]) -> Row:
    """The batch alone: crops and augmentation."""
    ours, plain = our_batches(recipe, images, labels), monai_batches(recipe, images, labels)
    return ratio("batch of augmented crops", ours, plain, 1.0, 9, 9)


def our_batches(
    recipe: Recipe, images: list[NDArray[Any]], labels: list[NDArray[Any]]
) -> Callable[[], tuple[Tensor, Tensor]]:
    cases = [
        TrainingCase(str(i), torch.from_numpy(image)[None], torch.from_numpy(label))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    return CropStream(cases, recipe, np.random.default_rng(0)).next


def monai_batches(
    recipe: Recipe, images: list[NDArray[Any]], labels: list[NDArray[Any]], seed: int = 0
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same kinds of change, as a MONAI training script would write them."""
    mode = ("bilinear", "nearest")
    augment = Compose(
        [
            SpatialPadd(_KEYS, recipe.patch),
            RandCropByPosNegLabeld(_KEYS, "label", recipe.patch, pos=1, neg=2),
            RandRotated(_KEYS, _ANGLE, _ANGLE, _ANGLE, prob=0.5, mode=mode),
            RandZoomd(_KEYS, prob=0.5, min_zoom=0.82, max_zoom=1.22, mode=("trilinear", "nearest")),
            RandFlipd(_KEYS, prob=0.5, spatial_axis=0),
            RandScaleIntensityd("image", factors=0.25, prob=0.5),
            RandGaussianNoised("image", prob=0.5, std=0.1),
        ]
    )
    return _cached(augment, recipe, images, labels, seed)


def monai_batches_alike(
    recipe: Recipe, images: list[NDArray[Any]], labels: list[NDArray[Any]], seed: int = 0, classes: int = 2
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same with this project's targets: labels aligned with their image, and unlabelled outside of it.

    Images are rotated before they are cropped. MONAI fills the uncovered voxels with zeros, so labels are one higher
    until the end, where 0 becomes unlabelled. Zoomed by "nearest", a label is shifted on average by half a voxel
    against its image, which torch aligns by the centres of voxels; "nearest-exact" aligns both.
    """
    mode, share = ("bilinear", "nearest"), recipe.foreground / (1 - recipe.foreground) / classes
    augment = Compose(
        [
            Lambdad("label", lambda label: label + 1),
            RandRotated(_KEYS, _ANGLE, _ANGLE, _ANGLE, prob=0.5, mode=mode, padding_mode="zeros"),
            RandZoomd(
                _KEYS,
                prob=0.5,
                min_zoom=0.82,
                max_zoom=1.22,
                mode=("trilinear", "nearest-exact"),
                padding_mode="constant",
            ),
            SpatialPadd(_KEYS, recipe.patch),
            RandCropByLabelClassesd(
                _KEYS, "label", recipe.patch, ratios=[0, 1, *[share] * classes], num_classes=classes + 2
            ),
            Lambdad("label", lambda label: torch.where(label == 0, UNLABELLED, label - 1).byte()),
            RandFlipd(_KEYS, prob=0.5, spatial_axis=0),
            RandScaleIntensityd("image", factors=0.25, prob=0.5),
            RandShiftIntensityd("image", offsets=0.25, prob=0.5),
            RandGaussianNoised("image", prob=0.5, std=0.1),
        ]
    )
    return _cached(augment, recipe, images, labels, seed)


def _cached(
    augment: Compose, recipe: Recipe, images: list[NDArray[Any]], labels: list[NDArray[Any]], seed: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    items = [
        {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]}
        for image, label in zip(images, labels, strict=True)
    ]
    augment.set_random_state(seed)
    dataset = CacheDataset(items, augment, progress=False)
    order = np.random.default_rng(seed)

    def batch() -> tuple[Tensor, Tensor]:
        # Crops at random answer a list of them an item, here of one.
        drawn = [dataset[int(i)][0] for i in order.integers(len(dataset), size=recipe.batch)]
        image, label = (torch.stack([item[key].as_tensor() for item in drawn]) for key in _KEYS)
        return image, label

    return batch


def _stepper(
    network: nn.Module, batches: Callable[[], tuple[Tensor, Tensor]], loss_function: nn.Module, half: torch.dtype | None
) -> Callable[[], float]:
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network.train()

    def step() -> float:
        images, labels = batches()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
            logits = network(images)
        loss = loss_function(logits.float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        return float(loss.detach())

    return step
