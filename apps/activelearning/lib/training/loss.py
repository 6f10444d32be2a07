# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Losses on partial labels: voxels without annotation weigh nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.partial_labels import UNLABELLED

_EPSILON = 1e-8


class PartialDiceCELoss(nn.Module):
    """Soft Dice plus cross-entropy over annotated voxels only.

    With w = 1 where the target is annotated and 0 elsewhere, p = softmax(logits) and y the one-hot target,

        L = F_w - mean_c (2 sum w p_c y_c + s) / max(sum w y_c + sum w p_c + s, 1e-8),    c over foreground classes,

    where F_w is the mean of -(1 - p_y)^gamma log p_y over annotated voxels (cross-entropy for gamma = 0). A crop
    without annotation adds 0 to the sums of batch Dice; for a batch without any, L = 0 and the gradients are zero. With
    s = 0, a class that is absent from the annotated voxels contributes 0, as published.

    If only some classes were annotated, a voxel belongs to a set S of classes: those that were not annotated, and
    background. Then p_y is the sum of p over S, and the voxel counts in the Dice of every class outside of S, as a
    voxel without that class.

    Args:
        ignore: value of the target that means "not annotated".
        batch_dice: sums run over the whole batch (True) or over each sample, averaged afterwards.
        smooth: s of the equation. Published with 0 ("noSmooth").
        dice_weight, ce_weight: factors of the two parts.
        gamma: exponent of the focal part; 0 is cross-entropy.

    Shapes: logits (B, C, ...), target (B, ...) or (B, 1, ...), whole numbers; `sets` (K, C) bool: row k marks the
        classes that a voxel of value C + k may have.

    Source: nnActive (Lueth et al. 2025), appendix on partial annotation; nnU-Net's ignore label; focal part: Lin et al.
    2017, equation 5; sets: the marginal loss of Shi et al. 2021, equation 3.
    """

    def __init__(
        self,
        ignore: int = UNLABELLED,
        batch_dice: bool = True,
        smooth: float = 0.0,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore = ignore
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.dice_weight = dice_weight
        self.ce_weight = ce_weight
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor, sets: Tensor | None = None) -> Tensor:
        if target.ndim == logits.ndim:
            target = target[:, 0]
        if target.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(f"target of shape {tuple(target.shape)} does not fit logits of {tuple(logits.shape)}")
        log_probs = functional.log_softmax(logits.float(), dim=1)
        if sets is None:
            known = target != self.ignore
            classes = torch.where(known, target.long(), 0)
            log_truth = log_probs.gather(1, classes[:, None])[:, 0]
            truth = torch.stack([classes == c for c in range(1, logits.shape[1])], dim=1) & known[:, None]
            decided = known[:, None]
        else:
            possible = self._possible(target, sets, logits.shape[1])
            log_truth = torch.logsumexp(log_probs.masked_fill(~possible, -torch.inf), dim=1)
            single = possible.sum(1, keepdim=True) == 1
            known = ~possible.all(1)
            truth = (possible & single)[:, 1:]
            decided = single | ~possible[:, 1:]
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.ce_weight:
            loss = loss + self.ce_weight * self._cross_entropy(log_truth, known)
        if self.dice_weight:
            loss = loss - self.dice_weight * self._dice(log_probs.exp()[:, 1:], truth, decided)
        return loss

    def _possible(self, target: Tensor, sets: Tensor, classes: int) -> Tensor:
        """(B, C, ...) bool: which classes each voxel may have."""
        table = torch.ones((256, classes), dtype=torch.bool, device=target.device)
        table[:classes] = torch.eye(classes, dtype=torch.bool, device=target.device)
        table[classes : classes + len(sets)] = sets.to(target.device)
        table[self.ignore] = True
        return table[target.long()].movedim(-1, 1)

    def _cross_entropy(self, log_truth: Tensor, known: Tensor) -> Tensor:
        if self.gamma:
            log_truth = log_truth * (1 - log_truth.exp()).clamp(min=0) ** self.gamma
        # Without a host synchronisation: an empty selection divides 0 by 1.
        return -torch.where(known, log_truth, 0.0).sum() / known.sum().clamp(min=1)

    def _dice(self, probs: Tensor, truth: Tensor, decided: Tensor) -> Tensor:
        weighted = probs * decided
        axes = list(range(2, probs.ndim))
        if self.batch_dice:
            axes.insert(0, 0)
        overlap = (weighted * truth).sum(axes)
        total = truth.sum(axes) + weighted.sum(axes)
        return ((2 * overlap + self.smooth) / (total + self.smooth).clamp(min=_EPSILON)).mean()


class DeepSupervisionLoss(nn.Module):
    """Weighted mean of a loss over the heads of a deeply supervised network: sum_h 2^-h L_h / sum_h 2^-h.

    Shapes: logits (B, H, C, ...) with every head at the resolution of the target, as MONAI's DynUNet stacks them while
    it trains; plain logits (B, C, ...) go to the loss as they are. Spatial axes are those of the target.

    Source: nnU-Net (Isensee et al. 2021), supplementary note on network training: each lower resolution weighs half.
    """

    def __init__(self, loss: PartialDiceCELoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor, sets: Tensor | None = None) -> Tensor:
        if logits.ndim == target.ndim + 1:
            result: Tensor = self.loss(logits, target, sets)
            return result
        heads = logits.shape[1]
        weights = [0.5**head / (2 - 0.5 ** (heads - 1)) for head in range(heads)]
        losses = [weight * self.loss(logits[:, head], target, sets) for head, weight in enumerate(weights)]
        return torch.stack(losses).sum()


# Losses that a recipe can name. The weighted soft Dice of the slice-sampling paper (Chlebus et al. 2022, section on
# training) is 1 - Dice over the annotated voxels of the mini-batch: the Dice part alone, up to the constant 1.
LOSSES: dict[str, Callable[[], PartialDiceCELoss]] = {
    "dice_ce": PartialDiceCELoss,
    "focal": lambda: PartialDiceCELoss(dice_weight=0.0, gamma=5.0),
    "weighted_dice": lambda: PartialDiceCELoss(ce_weight=0.0),
}
