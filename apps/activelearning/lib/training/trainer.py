# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Training of one ensemble member: an ignite engine over crops drawn from memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from lib.regions import Triple
from lib.training.augmentation import Augmentation, augmented_crop, crop
from lib.training.cases import TrainingCase
from lib.training.learned_loss import LossHead, pair_loss, sample_losses, tapped
from lib.training.loss import PartialDiceCELoss
from lib.training.recipe import Recipe
from lib.training.sampling import AnnotatedCase, RegionSampler

POLY_POWER = 0.9


@dataclass(frozen=True)
class Progress:
    """Where a training stands: finished steps of all, and the loss of the last one."""

    step: int
    steps: int
    loss: float


class CropStream:
    """Endless batches of (image (B, 1, *patch), label (B, *patch)); the same sequence for the same generator."""

    def __init__(self, cases: Sequence[TrainingCase], recipe: Recipe, rng: np.random.Generator) -> None:
        self.cases = cases
        self.recipe = recipe
        self.rng = rng
        self.how = Augmentation(mirror=recipe.mirror) if recipe.augment else None
        annotated = [AnnotatedCase.from_label(case.label_xyz.numpy(), rng) for case in cases]
        self.sampler = RegionSampler(annotated, recipe.patch, recipe.foreground)

    def next(self) -> tuple[Tensor, Tensor]:
        drawn = [self._crop(index, start) for index, start in self.sampler.draw(self.recipe.batch, self.rng)]
        return torch.stack([image for image, _ in drawn]), torch.stack([label for _, label in drawn])

    def _crop(self, index: int, start: Triple) -> tuple[Tensor, Tensor]:
        case = self.cases[index]
        if self.how is None:
            return crop(case.image_cxyz, case.label_xyz, start, self.recipe.patch)
        return augmented_crop(case.image_cxyz, case.label_xyz, start, self.recipe.patch, self.how, self.rng)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over `warmup * steps`, then poly decay: peak * (1 - t)^0.9 with t from 0 to 1 (nnU-Net)."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return recipe.learning_rate * (1 - (step - warm) / max(1, recipe.steps - warm)) ** POLY_POWER


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Reduced precision a device runs natively: bfloat16 on CPUs and GPUs that have it, float16 on older GPUs.

    A property of the hardware rather than a timing, so that a resumed training takes the same path.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def train_member(
    network: nn.Module,
    cases: Sequence[TrainingCase],
    recipe: Recipe,
    seed: np.random.SeedSequence,
    device: torch.device,
    report: Callable[[Progress], None] = lambda _: None,
    head: LossHead | None = None,
    taps: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Trains `network` in place from the weights it has and returns its last weights, on the CPU.

    AdamW with warm-up and poly decay, gradients clipped, Dice + cross-entropy over annotated voxels. The last weights
    are kept: choosing by validation Dice would spend labels that an active-learning study pretends not to have.
    A `head` on the activations of `taps` learns to rank the samples of a batch by their loss, in place.

    Raises:
        ValueError: no annotated voxel in any case.
    """
    network.to(device).train()
    stream = CropStream(cases, recipe, np.random.default_rng(seed))
    parameters = [*network.parameters(), *(head.to(device).train().parameters() if head else ())]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    loss_function = PartialDiceCELoss()
    half = autocast_type(device)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)

    def step(engine: Engine, _: object) -> Tensor:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(engine.state.iteration - 1, recipe)
        images, labels = (batch.to(device, non_blocking=True) for batch in stream.next())
        optimiser.zero_grad(set_to_none=True)
        with (
            torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None),
            tapped(network, taps) as activations,
        ):
            logits = network(images)
        loss: Tensor = loss_function(logits, labels)
        if head is not None:
            if engine.state.iteration > recipe.learning_loss_share * recipe.steps:
                activations = [activation.detach() for activation in activations]
            ranking = pair_loss(head(activations), sample_losses(logits, labels), recipe.learning_loss_margin)
            loss = loss + recipe.learning_loss * ranking
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        scaler.step(optimiser)
        scaler.update()
        return loss.detach()

    engine = Engine(step)
    every = max(1, recipe.steps // 50)

    @engine.on(Events.ITERATION_COMPLETED(every=every) | Events.COMPLETED)
    def _(running: Engine) -> None:
        report(Progress(running.state.iteration, recipe.steps, float(running.state.output or 0.0)))

    engine.run(range(recipe.steps), max_epochs=1)
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}
