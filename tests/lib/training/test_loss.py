# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lib.partial_labels import UNLABELLED
from lib.training.loss import PartialDiceCELoss


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "reference/nnactive/golden/h_partial_loss.npz")


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("case", ["partial", "noclass3", "all_ignored", "full"])
def test_loss_and_gradient_are_the_published_ones(golden, case, batch_dice):
    logits = torch.tensor(golden["logits"], requires_grad=True)
    target = torch.tensor(golden[f"target_{case}"])
    loss = PartialDiceCELoss(ignore=int(golden["ignore_label"]), batch_dice=batch_dice)(logits, target)
    loss.backward()
    suffix = f"{case}_batchdice{int(batch_dice)}"
    assert float(loss) == pytest.approx(float(golden[f"loss_{suffix}"]), abs=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), golden[f"grad_{suffix}"], atol=1e-7)


def test_two_voxels_by_hand():
    # p = (0.25, 0.75) where annotated as 1, p = (0.5, 0.5) where annotated as 0, and a voxel without annotation.
    logits = torch.log(torch.tensor([[[0.25, 0.5, 0.9], [0.75, 0.5, 0.1]]]))
    target = torch.tensor([[1, 0, UNLABELLED]])
    cross_entropy = -(math.log(0.75) + math.log(0.5)) / 2
    dice = 2 * 0.75 / (1 + 0.75 + 0.5)
    assert float(PartialDiceCELoss()(logits, target)) == pytest.approx(cross_entropy - dice, abs=1e-6)


def test_an_unlabelled_crop_contributes_nothing_and_a_batch_of_them_gives_zero():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator)
    target = torch.randint(0, 3, (2, 4, 4, 4), generator=generator)
    target[1] = UNLABELLED
    alone = PartialDiceCELoss()(logits[:1], target[:1])
    both = logits.clone().requires_grad_(True)
    loss = PartialDiceCELoss()(both, target)
    loss.backward()
    assert float(loss) == pytest.approx(float(alone), abs=1e-6)
    assert float(both.grad[1].abs().max()) == 0
    nothing = both.detach().clone().requires_grad_(True)
    zero = PartialDiceCELoss()(nothing, torch.full_like(target, UNLABELLED))
    zero.backward()
    assert float(zero) == 0
    assert float(nothing.grad.abs().max()) == 0


def test_the_values_under_ignored_voxels_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 3, 4, 4, 4, generator=generator)
    target = torch.randint(0, 3, (1, 4, 4, 4), generator=generator)
    target[:, :2] = UNLABELLED
    changed = logits.clone()
    changed[:, :, :2] = 50 * torch.randn(1, 3, 2, 4, 4, generator=generator)
    loss = PartialDiceCELoss()
    assert float(loss(logits, target)) == pytest.approx(float(loss(changed, target)), abs=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        PartialDiceCELoss()(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 4, 4, 5))
