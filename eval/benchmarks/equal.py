# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Quality of the faster step: the same network, loss and schedule fed by MONAI dictionaries instead.

All train 300 steps (STEPS) on the pool of the decathlon's hippocampus task (DATA names another folder) from three
seeds: MONAI in fp32, this project in its own precision. Reported are seconds per step and Dice of the test cases.
MONAI's dictionaries come as in a usual training script ("plain"), and with the same training examples as ours
("alike").
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from eval.benchmarks import Row
from eval.benchmarks.nnunet import mean_dice, real_scans, training_case
from eval.benchmarks.timing import one_thread, row
from eval.benchmarks.training import monai_batches, monai_batches_alike
from eval.protocol.dataset import Case
from eval.runner.server import PROJECT
from lib.models.preprocessing import TrainingCase
from lib.models.recipe import Bundle, Recipe
from lib.prediction.posterior import Ensemble
from lib.storage.volumes import load_image
from lib.training.loss import PartialDiceCELoss
from lib.training.trainer import learning_rate, train_member

SEEDS = (1, 2, 3)
PATCH = (32, 40, 32)


def run() -> Iterator[Row]:
    """Seconds per step and Dice of this project and of two configurations of MONAI."""
    labels, pool, test = real_scans()
    steps = int(os.environ.get("STEPS", 300))
    bundle = Bundle(PROJECT / "bundles" / "segmentation_dynunet_3d")
    recipe = bundle.recipe({"recipe": "quick", "steps": steps, "patch": PATCH, "ema": 0.0, "mirror": [0]})
    cases = [training_case(case) for case in pool]
    ways: dict[str, Callable[[nn.Module, list[TrainingCase], Recipe, int], None]] = {
        "ours": _ours,
        "plain": partial(_fed, monai_batches),
        "alike": partial(_fed, monai_batches_alike),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with one_thread():
        for seed in SEEDS:
            for name, train in ways.items():
                torch.manual_seed(seed)
                network = bundle.network(len(labels) - 1)
                began = time.process_time()
                train(network, cases, recipe, seed)
                taken = (time.process_time() - began) / steps
                found[name].append((taken, _dice(bundle, recipe, network, labels, test)))
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in found.items()}
    dice = {name: statistics.mean(d for _, d in runs) for name, runs in found.items()}
    for name, bar in (("plain", "worse"), ("alike", "apart")):
        differ = dice["ours"] - dice[name]
        yield row(f"step of {steps} ({name}; same network, three seeds)", seconds["ours"], seconds[name], 1.5)
        yield {
            "name": f"Dice after them, ours and {name} (bar: at most 0.005 {bar})",
            "ours_s": round(dice["ours"], 4),
            "reference_s": round(dice[name], 4),
            "ratio": round(1 + (differ if bar == "worse" else -abs(differ)), 4),
            "bar": 0.995,
            "unit": "Dice",
        }


def _ours(network: nn.Module, cases: list[TrainingCase], recipe: Recipe, seed: int) -> None:
    train_member(network, cases, recipe, np.random.SeedSequence(seed), torch.device("cpu"))


def _fed(
    feed: Callable[..., Callable[[], tuple[Tensor, Tensor]]],
    network: nn.Module,
    cases: list[TrainingCase],
    recipe: Recipe,
    seed: int,
) -> None:
    images, labels = [c.image_cxyz[0].numpy() for c in cases], [c.label_xyz.numpy() for c in cases]
    batches = feed(recipe, images, labels, seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    loss_function = PartialDiceCELoss()
    network.train()
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, recipe)
        crops, truth = batches()
        optimiser.zero_grad(set_to_none=True)
        loss_function(network(crops), truth).backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimiser.step()


def _dice(bundle: Bundle, recipe: Recipe, network: nn.Module, labels: dict[str, int], test: list[Case]) -> float:
    ensemble = Ensemble([network], recipe.patch, bundle.divisor, None, torch.device("cpu"))
    predicted = [ensemble.mean(load_image(case.image)).argmax(axis=0).astype(np.uint8) for case in test]
    return mean_dice(labels, test, predicted)
