# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Training of one ensemble member: an ignite engine over crops drawn from memory."""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.models.cpu_convolutions import FullWhereShort
from lib.models.loss_head import LossHead, tapped
from lib.models.precision import autocast_type
from lib.models.preprocessing import TrainingCase, crop
from lib.models.recipe import Recipe
from lib.partial_labels import UNLABELLED
from lib.storage.atomic_files import write_atomic
from lib.training.augmentation import Augmentation, changed, draw_changes
from lib.training.loss import LOSSES, DeepSupervisionLoss
from lib.training.loss_prediction import pair_loss, sample_losses
from lib.training.sampling import AnnotatedCase, RegionSampler

POLY_POWER = 0.9
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Progress:
    """Progress of a training: finished steps of all, and the loss of the last one."""

    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Replica:
    """This process's part of a member that several devices train together: its rank among `world`."""

    rank: int = 0
    world: int = 1


class CropStream:
    """Endless batches of (image (B, 1, *patch), label (B, *patch)) on `device`; the same ones for the same generator.

    A replica gets its share of every batch, so that all of them together see the batches of a single process.
    """

    def __init__(
        self,
        cases: Sequence[TrainingCase],
        recipe: Recipe,
        rng: np.random.Generator,
        device: torch.device | str = "cpu",
        replica: Replica | None = None,
        classes: int = UNLABELLED - 1,
    ) -> None:
        self.device = torch.device(device)
        self.cases = on_device(cases, self.device)
        self.recipe = recipe
        self.rng = rng
        self.replica = replica or Replica()
        self.how = Augmentation(mirror=recipe.mirror, flat=recipe.flat) if recipe.augment else None
        annotated = [AnnotatedCase.from_label(case.label_xyz.cpu().numpy(), rng, classes) for case in cases]
        self.sampler = RegionSampler(annotated, recipe.patch, recipe.foreground)
        self.noise = torch.Generator(self.device)
        self.noise.manual_seed(int(rng.integers(2**63)))

    def next(self) -> tuple[Tensor, Tensor]:
        mine = slice(self.replica.rank, None, self.replica.world)
        drawn = self.sampler.draw(self.recipe.batch, self.rng)
        if self.how is None:
            return self._blocks(drawn[mine], (0, 0, 0))
        changes = draw_changes(self.recipe.batch, self.how, self.rng)[mine]
        images, labels = self._blocks(drawn[mine], changes.margin(self.recipe.patch))
        return changed(images, labels, self.recipe.patch, changes, self.noise)

    def _blocks(self, drawn: Sequence[tuple[int, Sequence[int]]], margin: Sequence[int]) -> tuple[Tensor, Tensor]:
        size = [p + 2 * m for p, m in zip(self.recipe.patch, margin, strict=True)]
        blocks = [
            crop(
                self.cases[index].image_cxyz,
                self.cases[index].label_xyz,
                [s - m for s, m in zip(start, margin, strict=True)],
                size,
            )
            for index, start in drawn
        ]
        images, labels = (torch.stack(parts) for parts in zip(*blocks, strict=True))
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def state(self) -> dict[str, Any]:
        """Position of the stream, for `torch.save` and `restore`."""
        return {"rng": json.dumps(self.rng.bit_generator.state), "noise": self.noise.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.noise.set_state(state["noise"])


def on_device(cases: Sequence[TrainingCase], device: torch.device) -> list[TrainingCase]:
    """Return the cases on `device` if they fit into half of its free memory, else unchanged."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if sum(case.image_cxyz.nbytes + case.label_xyz.nbytes for case in cases) > free // 2:
            return list(cases)
    return [TrainingCase(c.name, c.image_cxyz.to(device), c.label_xyz.to(device)) for c in cases]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up over `warmup * steps`, then poly decay: peak * (1 - t)^0.9 with t from 0 to 1 (nnU-Net)."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return float(recipe.learning_rate * (1 - (step - warm) / max(1, recipe.steps - warm)) ** POLY_POWER)


def sound(device: torch.device, half: torch.dtype | None) -> AbstractContextManager[object]:
    """Context around the network for reliable gradients of a training in reduced precision."""
    return FullWhereShort() if half is not None and device.type == "cpu" else nullcontext()


class TrainingDivergedError(ValueError):
    """The loss of a training is not finite."""


def train_member(
    network: nn.Module,
    cases: Sequence[TrainingCase],
    recipe: Recipe,
    seed: np.random.SeedSequence,
    device: torch.device,
    report: Callable[[Progress], None] = lambda _: None,
    head: LossHead | None = None,
    taps: Sequence[str] = (),
    sets: Tensor | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    replica: Replica | None = None,
) -> dict[str, Tensor]:
    """Train `network` in place from its present weights and return its last weights, on the CPU.

    AdamW with warm-up and poly decay, gradients clipped, the recipe's loss over annotated voxels. The last weights are
    kept: selection by validation Dice would use labels that are not annotated in an active-learning study. With `ema`
    in the recipe they are averaged: w_t = d w_(t-1) + (1 - d) v_t with d = min(ema, (1 + t) / (10 + t)). A `head` on
    the activations of `taps` learns to rank the samples of a batch by their loss, in place.

    A training with a `checkpoint` resumes from it and ends with the same weights as an uninterrupted one (on a CPU,
    with the same number of threads). The file is written every `checkpoint_seconds`.

    Raises:
        ValueError: no annotated voxel in any case.
        TrainingDivergedError: the loss is infinite or NaN; checked at every report of progress.
    """
    member = _Member(network, cases, recipe, seed, device, head, taps, sets, replica or Replica())
    begun = member.load(checkpoint)
    engine = Engine(lambda _, step: member.step(step))
    every = max(1, recipe.steps // 50)
    written = time.monotonic()

    @engine.on(Events.ITERATION_COMPLETED)
    def _(running: Engine) -> None:
        nonlocal written
        done = begun + running.state.iteration
        if done % every == 0 or done == recipe.steps:
            report(Progress(done, recipe.steps, _finite(float(running.state.output or 0.0), done, recipe)))
        if checkpoint and done < recipe.steps and time.monotonic() - written >= checkpoint_seconds:
            member.save(checkpoint, done)
            written = time.monotonic()

    if begun < recipe.steps:
        engine.run(range(begun, recipe.steps), max_epochs=1)
    return member.weights()


def _finite(value: float, done: int, recipe: Recipe) -> float:
    if not math.isfinite(value):
        raise TrainingDivergedError(
            f"the loss after step {done} of {recipe.steps} is {value}, so the training was stopped; check the images "
            f"for extreme values, or use a learning_rate below {recipe.learning_rate:g} or precision: full"
        )
    return value


class _Member:
    """Everything that changes while a member trains, so that it can be stored and found again."""

    def __init__(
        self,
        network: nn.Module,
        cases: Sequence[TrainingCase],
        recipe: Recipe,
        seed: np.random.SeedSequence,
        device: torch.device,
        head: LossHead | None,
        taps: Sequence[str],
        sets: Tensor | None,
        replica: Replica,
    ) -> None:
        self.network, self.recipe, self.device, self.head, self.taps = network, recipe, device, head, taps
        self.sets = None if sets is None else sets.to(device)
        self.replica = replica
        network.to(device).train()
        # Small networks keep a GPU waiting for launches, which CUDA graphs ("reduce-overhead") save.
        mode = "reduce-overhead" if device.type == "cuda" else None
        self.model = cast(nn.Module, torch.compile(network, mode=mode)) if recipe.compiled else network
        # Gradients of replicas are averaged; a lone process needs no wrapper.
        self.model = DistributedDataParallel(self.model) if replica.world > 1 else self.model
        classes = UNLABELLED - 1 if sets is None else sets.shape[1] - 1
        self.stream = CropStream(cases, recipe, np.random.default_rng(seed), device, replica, classes)
        self.parameters = [*network.parameters(), *(head.to(device).train().parameters() if head else ())]
        # Fused: one pass over every parameter instead of one for each operation.
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.loss = DeepSupervisionLoss(LOSSES[recipe.loss]())
        self.half = autocast_type(device, recipe.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half is torch.float16)
        self.average = [p.detach().clone() for p in network.parameters()] if recipe.ema else []

    def step(self, step: int) -> Tensor:
        """One optimiser step; answers its loss without waiting for the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(step, self.recipe)
        images, labels = self.stream.next()
        self.optimiser.zero_grad(set_to_none=True)
        with (
            torch.autocast(self.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None),
            sound(self.device, self.half),
            tapped(self.network, self.taps) as activations,
        ):
            logits = self.model(images)
        loss: Tensor = self.loss(logits, labels, self.sets)
        if self.head is not None:
            if step >= self.recipe.learning_loss_share * self.recipe.steps:
                activations = [activation.detach() for activation in activations]
            top = logits[:, 0] if logits.ndim > images.ndim else logits
            ranking = pair_loss(
                self.head(activations), sample_losses(top, labels, self.sets), self.recipe.learning_loss_margin
            )
            loss = loss + self.recipe.learning_loss * ranking
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            kept = min(self.recipe.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.detach() for p in self.network.parameters()], 1 - kept)
        return loss.detach()

    def weights(self) -> dict[str, Tensor]:
        """The weights that count, on the CPU; the network holds them afterwards."""
        if self.average:
            with torch.no_grad():
                torch._foreach_copy_(list(self.network.parameters()), self.average)
        return {name: value.detach().cpu() for name, value in self.network.state_dict().items()}

    def save(self, path: Path, done: int) -> None:
        """Everything a later process needs to go on after `done` steps; replicas leave it to the first of them."""
        if self.replica.rank:
            return
        state = {
            "done": done,
            "network": self.network.state_dict(),
            "head": self.head.state_dict() if self.head else None,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average,
            "stream": self.stream.state(),
            "torch": torch.get_rng_state(),
        }
        write_atomic(path, lambda stream: torch.save(state, stream))

    def load(self, path: Path | None) -> int:
        """Resume from the state in `path`; return its number of steps, 0 if it is missing or incomplete."""
        if path is None or not zipfile.is_zipfile(path):
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        if self.head:
            self.head.load_state_dict(state["head"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.average = [value.to(self.device) for value in state["average"]]
        self.stream.restore(state["stream"])
        torch.set_rng_state(state["torch"])
        return int(state["done"])
