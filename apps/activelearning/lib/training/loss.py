# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Loss on partial labels: voxels without annotation weigh nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.partial_labels import UNLABELLED

_EPSILON = 1e-8


class PartialDiceCELoss(nn.Module):
    """Soft Dice plus cross-entropy over annotated voxels only.

    With w = 1 where the target is annotated and 0 elsewhere, p = softmax(logits) and y the one-hot target,

        L = CE_w - mean_c (2 sum w p_c y_c + s) / max(sum w y_c + sum w p_c + s, 1e-8),    c over foreground classes,

    where CE_w is the mean of -log p over annotated voxels. A crop without annotation adds nothing to the sums of batch
    Dice; a batch without any gives L = 0 and zero gradients. With s = 0 a class that is absent from the annotated
    voxels contributes 0, as published.

    Args:
        ignore: value of the target that means "not annotated".
        batch_dice: sums run over the whole batch (True) or over each sample, averaged afterwards.
        smooth: s of the equation, 0 as published ("noSmooth").
        dice_weight, ce_weight: factors of the two parts.

    Shapes: logits (B, C, ...), target (B, ...) or (B, 1, ...), whole numbers.

    Source: nnActive (Lueth et al. 2025), appendix on partial annotation; nnU-Net's ignore label.
    """

    def __init__(
        self,
        ignore: int = UNLABELLED,
        batch_dice: bool = True,
        smooth: float = 0.0,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.ignore = ignore
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.dice_weight = dice_weight
        self.ce_weight = ce_weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.ndim == logits.ndim:
            target = target[:, 0]
        if target.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(f"target of shape {tuple(target.shape)} does not fit logits of {tuple(logits.shape)}")
        target = target.long()
        annotated = target != self.ignore
        classes = torch.where(annotated, target, 0)
        logits = logits.float()
        log_probs = functional.log_softmax(logits, dim=1)
        picked = log_probs.gather(1, classes[:, None])[:, 0]
        # Without a host synchronisation: an empty selection divides 0 by 1.
        cross_entropy = -(picked * annotated).sum() / annotated.sum().clamp(min=1)
        return self.ce_weight * cross_entropy - self.dice_weight * self._dice(log_probs.exp(), classes, annotated)

    def _dice(self, probs: Tensor, classes: Tensor, annotated: Tensor) -> Tensor:
        truth = torch.stack([classes == c for c in range(1, probs.shape[1])], dim=1) & annotated[:, None]
        weighted = probs[:, 1:] * annotated[:, None]
        axes = list(range(2, probs.ndim))
        if self.batch_dice:
            axes.insert(0, 0)
        overlap = (weighted * truth).sum(axes)
        total = truth.sum(axes) + weighted.sum(axes)
        return ((2 * overlap + self.smooth) / (total + self.smooth).clamp(min=_EPSILON)).mean()
