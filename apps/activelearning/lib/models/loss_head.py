# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Learning loss: a small head that predicts a crop's training loss from the network's own activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.training.loss import PartialDiceCELoss
from lib.training.networks import per_crop

WIDTH = 128


class LossHead(nn.Module):
    """Predicted loss of each sample, (B,): per tap a global average, a linear layer and a ReLU; then one linear layer.

    Args:
        channels: channels of the taps, in their order.

    Source: Yoo & Kweon 2019; Gaillochet et al. 2023, section on learning loss.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.taps = nn.ModuleList(nn.Linear(c, WIDTH) for c in channels)
        self.last = nn.Linear(WIDTH * len(self.channels), 1)

    def forward(self, activations: Sequence[Tensor]) -> Tensor:
        averages = [activation.float().flatten(2).mean(2) for activation in activations]
        pooled = [functional.relu(tap(average)) for tap, average in zip(self.taps, averages, strict=True)]
        predicted: Tensor = self.last(torch.cat(pooled, dim=1))[:, 0]
        return predicted


def pair_loss(predicted: Tensor, target: Tensor, margin: float = 1.0) -> Tensor:
    """Mean over the pairs (i, B - 1 - i) of max(0, margin - sign (p_i - p_j)), sign +1 where t_i > t_j, else -1.

    The published configuration has margin 0, Yoo & Kweon have 1. Targets carry no gradient.

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


@contextmanager
def tapped(network: nn.Module, layers: Sequence[str]) -> Iterator[list[Tensor]]:
    """Inside of the block, the list holds the activations of `layers` after each forward pass of `network`.

    They are (B, C, ...) for a batch of B crops, also where the network folds slices into its batch.
    """
    found: list[Tensor] = []
    latest: dict[str, Tensor] = {}
    crops = 0

    def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal crops
        crops = len(inputs[0])

    def keep(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            latest[name] = per_crop(output, crops)
            found[:] = [latest[layer] for layer in layers if layer in latest]

        handles.append(network.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = [network.register_forward_pre_hook(count)]
    for layer in layers:
        keep(layer)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def fresh_head(network: nn.Module, layers: Sequence[str], divisor: Sequence[int]) -> LossHead:
    """A head for `network`; how many channels its taps have is seen in one pass of an empty image."""
    training = network.training
    network.eval()
    with torch.no_grad(), tapped(network, layers) as activations:
        network(torch.zeros(1, 1, *(2 * d for d in divisor)))
        head = LossHead([a.shape[1] for a in activations])
    network.train(training)
    return head
