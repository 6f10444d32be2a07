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
from lib.training.loss import LOSSES, DeepSupervisionLoss, PartialDiceCELoss


@pytest.fixture(scope="module")
def golden(reference):
    return np.load(reference / "nnactive/partial_loss.npz")


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


def test_focal_by_hand():
    logits = torch.log(torch.tensor([[[0.25, 0.5, 0.9], [0.75, 0.5, 0.1]]]))
    target = torch.tensor([[1, 0, UNLABELLED]])
    expected = -(0.25**5 * math.log(0.75) + 0.5**5 * math.log(0.5)) / 2
    assert float(LOSSES["focal"]()(logits, target)) == pytest.approx(expected, abs=1e-6)


def test_weighted_dice_by_hand():
    logits = torch.log(torch.tensor([[[0.25, 0.5, 0.9], [0.75, 0.5, 0.1]]]))
    target = torch.tensor([[1, 0, UNLABELLED]])
    # The paper's 1 - 2 sum wyp / (sum wy + sum wp) without its constant.
    assert float(LOSSES["weighted_dice"]()(logits, target)) == pytest.approx(-2 * 0.75 / (1 + 0.75 + 0.5), abs=1e-6)


def test_a_voxel_that_is_only_known_not_to_be_of_the_drawn_class_by_hand():
    # Three classes; only class 1 was drawn. Voxel 0 is class 1, voxel 1 is "not class 1" (value 3: background or 2).
    probs = torch.tensor([[0.1, 0.2], [0.7, 0.3], [0.2, 0.5]])
    sets = torch.tensor([[True, False, True]])
    found = PartialDiceCELoss()(probs.log()[None], torch.tensor([[1, 3]]), sets)
    cross_entropy = -(math.log(0.7) + math.log(0.2 + 0.5)) / 2
    dice_1 = 2 * 0.7 / (1 + 0.7 + 0.3)
    # Class 2: voxel 0 is decided (it is class 1), voxel 1 is not.
    dice_2 = 0 / (0 + 0.2)
    assert float(found) == pytest.approx(cross_entropy - (dice_1 + dice_2) / 2, abs=1e-6)


def test_sets_that_are_never_met_change_nothing():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator)
    target = torch.randint(0, 3, (2, 4, 4, 4), generator=generator)
    target[:, 0] = UNLABELLED
    for make in LOSSES.values():
        plain, general = make()(logits, target), make()(logits, target, torch.tensor([[True, False, True]]))
        assert float(plain) == pytest.approx(float(general), abs=1e-6)


def test_the_gradient_under_a_set_never_prefers_one_of_its_classes_by_itself():
    # Cross-entropy alone: the classes of a set gain in proportion to their probability, so their ratio stays.
    logits = torch.tensor([[[0.3], [0.1], [-0.4]]], requires_grad=True)
    PartialDiceCELoss(dice_weight=0)(logits, torch.tensor([[3]]), torch.tensor([[True, False, True]])).backward()
    probs = logits.detach().softmax(1)[0, :, 0]
    inside = probs[0] + probs[2]
    expected = [float(probs[0] - probs[0] / inside), float(probs[1]), float(probs[2] - probs[2] / inside)]
    np.testing.assert_allclose(logits.grad[0, :, 0].numpy(), expected, atol=1e-6)


def test_deep_supervision_halves_the_weight_of_each_head():
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(2, 3, 4, 5, 5, 5, generator=generator)
    target = torch.randint(0, 4, (2, 5, 5, 5), generator=generator)
    single = PartialDiceCELoss()
    parts = [float(single(heads[:, h], target)) for h in range(3)]
    expected = (4 * parts[0] + 2 * parts[1] + parts[2]) / 7
    assert float(DeepSupervisionLoss(single)(heads, target)) == pytest.approx(expected, abs=1e-6)
    assert float(DeepSupervisionLoss(single)(heads[:, 0], target)) == pytest.approx(parts[0], abs=1e-6)
