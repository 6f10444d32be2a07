# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Losses that teach a head to predict a crop's training loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lib.training.loss import PartialDiceCELoss


def pair_loss(predicted: Tensor, target: Tensor, margin: float = 1.0) -> Tensor:
    """Mean over the pairs (i, B - 1 - i) of max(0, margin - sign (p_i - p_j)), sign +1 where t_i > t_j, else -1.

    The published configuration has margin 0, Yoo & Kweon have 1. Targets are detached from the graph.

    Raises:
        ValueError: an odd number of samples, which leaves one without a partner.
    """
    if len(predicted) % 2:
        raise ValueError(f"learning loss compares pairs: the batch must be even, found {len(predicted)}")
    half = len(predicted) // 2
    difference = predicted[:half] - predicted.flip(0)[:half]
    sign = torch.where(target[:half] > target.flip(0)[:half], 1.0, -1.0)
    return functional.relu(margin - sign * difference).mean()


def sample_losses(logits: Tensor, labels: Tensor, sets: Tensor | None = None) -> Tensor:
    """Dice + cross-entropy of each sample over its annotated voxels, (B,), without gradient."""
    loss = PartialDiceCELoss()
    with torch.no_grad():
        return torch.stack([loss(logits[i : i + 1], labels[i : i + 1], sets) for i in range(len(logits))])
