# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Scoring a pool with five members: streamed moments in native reduced precision against fp32, one member at a time.

The pool consists of the 156 cases of the decathlon's hippocampus task that studies query (DATA names another folder).
Members are trained on its test cases, so that the Dice of their mean is measured on unseen scans.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray

from eval.benchmarks import Row
from eval.benchmarks.nnunet import mean_dice, real_scans, training_case
from eval.benchmarks.timing import one_thread, row
from eval.protocol.dataset import Case
from eval.runner.server import PROJECT
from lib.models.precision import autocast_type
from lib.models.preprocessing import network_image
from lib.models.recipe import Bundle
from lib.prediction.posterior import Ensemble
from lib.storage.volumes import load_image
from lib.training.trainer import train_member
from lib.uncertainty import Moments

MEMBERS = 5
STEPS = 200
PATCH = (32, 40, 32)
OVERLAP = 0.25

Scored = tuple[NDArray[np.float32], NDArray[np.uint8]]


def run() -> Iterator[Row]:
    """CPU seconds of the pool and Dice of the mean, both ways in turns on every image."""
    labels, pool, test = real_scans()
    with one_thread():
        ensemble = _trained(test, len(labels) - 1)
        seconds = {"ours": 0.0, "plain": 0.0}
        predicted: dict[str, list[NDArray[np.uint8]]] = {"ours": [], "plain": []}
        for case in pool:
            for name, score in (("ours", _ours), ("plain", _plain)):
                began = time.process_time()
                _, label_xyz = score(ensemble, case)
                seconds[name] += time.process_time() - began
                predicted[name].append(label_xyz)
    kind = "bf16" if autocast_type(torch.device("cpu")) else "fp32: no native bf16 here"
    yield row(f"scoring {len(pool)} images with {MEMBERS} members ({kind})", seconds["ours"], seconds["plain"], 2.5)
    mine, plain = (mean_dice(labels, pool, predicted[name]) for name in ("ours", "plain"))
    yield {
        "name": "change of the Dice of the mean (bar: at most 0.002)",
        "ours_s": round(mine, 5),
        "reference_s": round(plain, 5),
        "ratio": round(1 - abs(mine - plain), 5),
        "bar": 0.998,
        "unit": "Dice",
    }


def _trained(cases: list[Case], classes: int) -> Ensemble:
    bundle = Bundle(PROJECT / "bundles" / "segmentation_dynunet_3d")
    recipe = bundle.recipe({"steps": STEPS, "patch": PATCH})
    material = [training_case(case) for case in cases]
    networks = []
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        networks.append(bundle.network(classes))
        train_member(networks[-1], material, recipe, np.random.SeedSequence(seed), torch.device("cpu"))
    return Ensemble(networks, recipe.patch, bundle.divisor, None, torch.device("cpu"))


def _ours(ensemble: Ensemble, case: Case) -> Scored:
    """One read, members streamed into sums."""
    moments = Moments.from_members(ensemble.members(load_image(case.image), OVERLAP))
    return moments.mutual_information(), np.asarray(moments.mean).argmax(axis=0).astype(np.uint8)


def _plain(ensemble: Ensemble, case: Case) -> Scored:
    """A read and a sweep of the same windows a member in fp32, moments from the whole stack."""
    stack = []
    for network in ensemble.networks:
        image = network_image(load_image(case.image), None)
        window = ensemble.window(image.shape[1:])
        with torch.inference_mode():
            logits = sliding_window_inference(image[None], window, 1, network, overlap=OVERLAP, mode="gaussian")
        assert isinstance(logits, torch.Tensor)
        stack.append(torch.softmax(logits[0], dim=0).numpy())
    probs_mcxyz = np.stack(stack)
    return _information(probs_mcxyz), probs_mcxyz.mean(axis=0).argmax(axis=0).astype(np.uint8)


def _information(probs_mcxyz: NDArray[np.float32]) -> NDArray[np.float32]:
    def entropy(p: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        return np.asarray(-np.sum(p * np.log(np.clip(p, 1e-12, None)), axis=axis))

    return np.asarray(entropy(probs_mcxyz.mean(0), 0) - entropy(probs_mcxyz, 1).mean(0))
