# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Features of regions: pooled bottleneck activations, and gradients of pseudo labels, computed batch by batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap

from lib.models.loss_head import tapped
from lib.models.preprocessing import crop, network_image
from lib.prediction.posterior import Ensemble
from lib.regions import Box, Triple
from lib.storage.volumes import Volume

# Voxels of crops that go through a network at a time.
BATCH_VOXELS = 1 << 20


def bottleneck_features(ensemble: Ensemble, layer: str, volume: Volume, boxes: Sequence[Box]) -> NDArray[np.float32]:
    """Mean over each region's crop of the activations of `layer`, concatenated over the members: (N, D).

    A crop is the region, widened by its surroundings to a size that the network takes.

    Source: nnActive, KMeansBALD (mean of the last encoder stage over the patch, concatenated over folds).
    """
    if not boxes:
        return np.zeros((0, 1), np.float32)
    parts = []
    for network in ensemble.networks:
        found: list[Tensor] = []
        with torch.inference_mode(), tapped(network, [layer]) as activations:
            for batch in _batches(ensemble, volume, boxes):
                network(batch)
                found.append(activations[0].flatten(2).mean(2))
        parts.append(torch.cat(found).float().cpu())
    return cast("NDArray[np.float32]", torch.cat(parts, dim=1).numpy())


def gradient_embeddings(
    ensemble: Ensemble, layers: Sequence[str], volume: Volume, boxes: Sequence[Box]
) -> NDArray[np.float32]:
    """Gradient of each region's pseudo-label log likelihood with respect to the weights of `layers`: (N, P).

        l = mean over voxels of log p_y,  y = argmax_c p_c

    taken of the first member, per region, whole batches at a time.

    Source: Foellmer et al. 2024, section on gradient embeddings; Ash et al. 2020 (BADGE) for the pseudo labels.
    """
    # DynUNet holds its parts under several names, which functional_call does not restore; a copy keeps the member.
    network = copy.deepcopy(ensemble.networks[0])
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    chosen = {f"{layer}.weight": parameters.pop(f"{layer}.weight") for layer in layers}

    def log_likelihood(weights: dict[str, Tensor], crop_cxyz: Tensor) -> Tensor:
        logits = functional_call(network, {**parameters, **weights}, (crop_cxyz[None],))
        return torch.log_softmax(logits.float(), dim=1).amax(dim=1).mean()

    per_region = vmap(grad(log_likelihood), in_dims=(None, 0))
    rows = []
    for batch in _batches(ensemble, volume, boxes):
        gradients = per_region(chosen, batch)
        rows.append(torch.cat([gradients[name].flatten(1) for name in chosen], dim=1).cpu())
    width = sum(value.numel() for value in chosen.values())
    return cast("NDArray[np.float32]", torch.cat(rows).numpy()) if rows else np.zeros((0, width), np.float32)


def _batches(ensemble: Ensemble, volume: Volume, boxes: Sequence[Box]) -> Iterator[Tensor]:
    """Crops (B, 1, X, Y, Z) of equal size, in the order of `boxes`."""
    image = network_image(volume, ensemble.spacing, ensemble.normalisation).to(ensemble.device)
    label = torch.zeros(image.shape[1:], dtype=torch.uint8, device=image.device)
    scale = [n / s for n, s in zip(image.shape[1:], volume.shape, strict=True)]
    sizes = [[max(1, round(d * f)) for d, f in zip(size, scale, strict=True)] for _, size in boxes]
    # One size for all regions of an image, so that they stack and their features mean the same.
    largest = [max(size[axis] for size in sizes) for axis in range(3)] if sizes else [1, 1, 1]
    # At least two voxels an axis at the bottleneck: an instance norm over a single voxel has no deviation.
    patch = cast(Triple, tuple(max(2, math.ceil(n / d)) * d for n, d in zip(largest, ensemble.divisor, strict=True)))
    batch = max(1, BATCH_VOXELS // math.prod(patch))
    for first in range(0, len(boxes), batch):
        crops = []
        for (start, _), size in zip(boxes[first : first + batch], sizes[first : first + batch], strict=True):
            centred = (round(s * f + n / 2 - p / 2) for s, f, n, p in zip(start, scale, size, patch, strict=True))
            crops.append(crop(image, label, cast(Triple, tuple(centred)), patch)[0])
        yield torch.stack(crops)
