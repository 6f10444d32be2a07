# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Learning loss: a small head that predicts a crop's training loss from the network's own activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def per_crop(activation: Tensor, crops: int) -> Tensor:
    """Activations of slices folded into the batch, (B S, C, h, w), as those of crops, (B, C, S, h, w)."""
    if activation.shape[0] == crops:
        return activation
    apart: Tensor = activation.unflatten(0, (crops, math.floor(activation.shape[0] / crops))).transpose(1, 2)
    return apart
