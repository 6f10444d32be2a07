# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.models.loss_head import fresh_head, tapped
from lib.models.preprocessing import TrainingCase, network_image
from lib.models.recipe import Bundle
from lib.partial_labels import UNLABELLED
from lib.prediction.posterior import Ensemble
from lib.storage.volumes import Volume
from lib.training.loss import PartialDiceCELoss
from lib.training.loss_prediction import pair_loss, sample_losses
from lib.training.trainer import train_member
from lib.uncertainty import Moments, score_map_of

BUNDLE = Bundle(Path(__file__).resolve().parents[3] / "bundles" / "segmentation_dynunet_3d")
CPU = torch.device("cpu")


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_pair_loss_is_the_published_one(reference, margin):
    golden = json.loads((reference / "stochastic_batches/learning_loss.json").read_text())
    found = pair_loss(torch.tensor(golden["pred"]), torch.tensor(golden["target"]), margin)
    assert float(found) == pytest.approx(golden[f"loss_margin{margin}"], abs=1e-6)


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="must be even, found 3"):
        pair_loss(torch.zeros(3), torch.zeros(3))


def test_sample_losses_are_those_of_each_sample_alone():
    logits = torch.randn(3, 3, 4, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (3, 4, 4, 4))
    labels[2] = UNLABELLED
    found = sample_losses(logits, labels)
    assert not found.requires_grad
    assert float(found[1]) == pytest.approx(float(PartialDiceCELoss()(logits[1:2], labels[1:2]).detach()), abs=1e-6)
    assert float(found[2]) == 0


def test_taps_see_each_pass_and_leave_no_hooks():
    network = BUNDLE.network(2)
    taps = BUNDLE.layers("loss_taps")
    with tapped(network, taps) as activations:
        network(torch.zeros(2, 1, 16, 16, 16))
        assert [a.shape[:2] for a in activations] == [(2, 24), (2, 48), (2, 96)]
    network(torch.zeros(1, 1, 16, 16, 16))
    assert activations[0].shape[0] == 2


@pytest.mark.slow
def test_the_head_learns_which_crops_are_hard():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    network = BUNDLE.network(1)
    cases = []
    for i in range(4):
        # Half of the scans are noise only, whose labels cannot be learnt.
        truth = np.zeros((16, 16, 16), np.uint8)
        truth[4:12, 4:12, 4:12] = 1
        noise = rng.integers(0, 2, truth.shape).astype(np.uint8)
        image = (truth * 3 if i % 2 else 0) + rng.normal(0, 0.3 if i % 2 else 1.0, truth.shape)
        volume = Volume(image.astype(np.float32), np.eye(4), "x")
        cases.append(TrainingCase(str(i), network_image(volume, None), torch.from_numpy(truth if i % 2 else noise)))
    recipe = BUNDLE.recipe({"steps": 80, "patch": [16, 16, 16], "batch": 4, "augment": False, "learning_loss": 1.0})
    head = fresh_head(network, BUNDLE.layers("loss_taps"), BUNDLE.divisor)
    taps = BUNDLE.layers("loss_taps")
    train_member(network, cases, recipe, np.random.SeedSequence(1), CPU, head=head, taps=taps)
    network.eval()
    with torch.no_grad(), tapped(network, taps) as activations:
        network(torch.stack([case.image_cxyz for case in cases]))
        predicted = head(activations)
    assert min(predicted[0], predicted[2]) > max(predicted[1], predicted[3])
    ensemble = Ensemble([network], recipe.patch, BUNDLE.divisor, None, CPU, [head], taps)
    volume = Volume(np.random.default_rng(3).normal(size=(20, 18, 17)).astype(np.float32), np.eye(4), "x")
    found = ensemble.learning_loss(volume)
    assert found.shape == (20, 18, 17)
    assert found.min() > 0
    moments = Moments.from_members(ensemble.members(volume), found)
    stored = Moments.from_arrays(moments.to_arrays())
    np.testing.assert_array_equal(score_map_of("learning_loss", stored), found)


def test_members_without_a_head_predict_no_loss():
    ensemble = Ensemble([BUNDLE.network(1)], (16, 16, 16), BUNDLE.divisor, None, CPU)
    volume = Volume(np.zeros((16, 16, 16), np.float32), np.eye(4), "x")
    assert ensemble.learning_loss(volume) is None
    with pytest.raises(ValueError, match="train with learning_loss above 0"):
        Moments.from_members(np.full((1, 2, 3, 3, 3), 0.5)).learning_loss()
