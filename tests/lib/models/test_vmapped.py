# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.models.recipe import Bundle
from lib.models.vmapped import stacked
from lib.prediction.posterior import Ensemble
from lib.storage.volumes import Volume

BUNDLES = Path(__file__).resolve().parents[3] / "bundles"
CPU = torch.device("cpu")
VOLUME = Volume(np.random.default_rng(0).normal(size=(40, 36, 20)).astype(np.float32), np.eye(4), "x")


def networks(name, count=3):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(Bundle(BUNDLES / name).network(2, dropout=0.1).eval())
    return made


@pytest.mark.parametrize("name", sorted(p.parent.name for p in BUNDLES.glob("*/configs")))
def test_one_pass_gives_what_every_network_gives(name):
    members, images = networks(name), torch.randn(2, 1, 32, 32, 16)
    with torch.inference_mode():
        apart = torch.cat([member(images) for member in members], dim=1)
        together = stacked(members)(images)
    assert together.shape == (2, 9, 32, 32, 16)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_an_ensemble_predicts_the_same_in_one_pass(monkeypatch):
    members = networks("segmentation_dynunet_3d")
    ensemble = Ensemble(members, (16, 16, 16), (8, 8, 8), None, CPU, precision="full")
    apart, mean = [p.numpy() for p in ensemble.members(VOLUME)], ensemble.mean(VOLUME)
    assert ensemble.batched is False
    ensemble.batched = True
    calls = []
    monkeypatch.setattr(
        "lib.prediction.posterior.stacked", lambda networks: calls.append(len(networks)) or stacked(networks)
    )
    np.testing.assert_allclose([p.numpy() for p in ensemble.members(VOLUME)], apart, atol=1e-5)
    np.testing.assert_allclose(ensemble.mean(VOLUME), mean, atol=1e-5)
    assert calls == [2]  # the first shows how much room the others need; they are stacked once


class Stubborn(torch.nn.Module):
    """Network that reads values, which a mapped pass cannot."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 1, 1, 1, 1))

    def forward(self, images):
        return torch.nn.functional.conv3d(images, self.weight * (2 if float(self.weight.sum()) > 0 else 1))


def test_networks_that_cannot_run_together_run_one_after_the_other(caplog):
    ensemble = Ensemble([Stubborn() for _ in range(3)], (16, 16, 16), (8, 8, 8), None, CPU)
    apart = [p.numpy() for p in ensemble.members(VOLUME)]
    ensemble.batched = True
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal([p.numpy() for p in ensemble.members(VOLUME)], apart)
    assert "members run one after the other" in caplog.text
    assert ensemble.batched is False
