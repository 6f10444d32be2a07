# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Network parts that MONAI does not have; bundles name them in `network_def`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.layers.factories import Norm
from torch import Tensor, nn

from lib.regions import Triple, triple


class SpaceToDepth(nn.Module):
    """`network` at 1/factor of the resolution, with every block of voxels folded into channels; in 2D or 3D.

    `(B, C, X, Y, Z) -> (B, C f, X/fx, Y/fy, Z/fz) -> network -> (B, K f, ...) -> (B, K, X, Y, Z)`, f = fx fy fz. No
    voxel is lost, while the convolutions run over f times fewer positions. A factor of 1 is the network itself. In 2D
    the last axis is missing everywhere.

    With `refine` R > 0 the network returns R channels per voxel instead of classes. A thin stage at full resolution
    then reads every voxel and its neighbours: `s = a(conv(image))`, `h = a(unfolded + s)`, `logits = out(a(conv(h)))`,
    where a is instance norm and leaky ReLU. Borders gain most from it.

    Args:
        factor: one number for each spatial axis of the images. Sizes of the input must be multiples of it.
        network: takes C f channels and returns K f, or R f with `refine`.
        refine: channels of the stage at full resolution. With 0 there is none.
        classes: K, needed with `refine`.
        kernel: of the stage's convolutions, one number for each axis; 1 along an axis keeps slices apart. None is 3
            along every axis.
    """

    def __init__(
        self,
        factor: int | Sequence[int],
        network: nn.Module,
        refine: int = 0,
        classes: int = 0,
        kernel: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.factor = (factor,) * 3 if isinstance(factor, int) else tuple(factor)
        self.network = network
        self.refine = refine
        if refine:
            size = tuple(kernel or (3,) * len(self.factor))
            axes = len(self.factor)
            self.stem = nn.Sequential(_look(1, refine, size), _activation(refine, axes))
            self.joined = _activation(refine, axes)
            self.look = nn.Sequential(_look(refine, refine, size), _activation(refine, axes))
            self.output = _CONVOLUTION[axes](refine, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        scores = self._unfolded(image)
        if not self.refine:
            return scores
        if scores.ndim == image.ndim:
            return self._refined(scores, image)
        heads = [self._refined(scores[:, 0], image), *(self.output(head) for head in scores[:, 1:].unbind(1))]
        return torch.stack(heads, dim=1)

    def _refined(self, features: Tensor, image: Tensor) -> Tensor:
        logits: Tensor = self.output(self.look(self.joined(features + self.stem(image))))
        return logits

    def _unfolded(self, image: Tensor) -> Tensor:
        block = math.prod(self.factor)
        if block == 1:
            logits: Tensor = self.network(image)
            return logits
        axes = len(self.factor)
        b, c, *size = image.shape
        coarse = [n // f for n, f in zip(size, self.factor, strict=True)]
        pairs = [n for pair in zip(coarse, self.factor, strict=True) for n in pair]
        # Places within a block go before the axes of blocks: (B, C, X/fx, fx, ...) -> (B, C, fx, ..., X/fx, ...).
        inner, outer = range(3, 3 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
        folded = image.reshape(b, c, *pairs).permute(0, 1, *inner, *outer)
        scores = self.network(folded.reshape(b, c * block, *coarse))
        lead = scores.shape[: -axes - 1]  # batch, and heads of a deeply supervised network
        scores = scores.reshape(-1, scores.shape[-axes - 1] // block, *self.factor, *coarse)
        back = [axis for pair in zip(range(2 + axes, 2 + 2 * axes), range(2, 2 + axes), strict=True) for axis in pair]
        unfolded: Tensor = scores.permute(0, 1, *back).reshape(*lead, -1, *size)
        return unfolded


_CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def _look(inputs: int, outputs: int, kernel: Sequence[int]) -> nn.Module:
    """Convolution of `kernel` (two or three numbers) that keeps the size."""
    return _CONVOLUTION[len(kernel)](inputs, outputs, tuple(kernel), padding=tuple(k // 2 for k in kernel))  # type: ignore[arg-type]


def _activation(channels: int, axes: int) -> nn.Module:
    return nn.Sequential(_NORM[axes](channels, affine=True), nn.LeakyReLU(0.01, inplace=True))


class Slicewise(nn.Module):
    """Apply a 2D network to every slice across `axis` (0, 1, 2): (B, C, X, Y, Z) -> (B, K, X, Y, Z).

    Slices are folded into the batch, so crops of any thickness work.
    """

    def __init__(self, axis: int, network: nn.Module) -> None:
        super().__init__()
        self.axis = axis
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        slices = image.movedim(self.axis + 2, 1)
        scores = self.network(slices.flatten(0, 1))
        # Spatial axes are the last three; before them stand batch, heads of a deeply supervised network, and classes.
        volume: Tensor = scores.unflatten(0, slices.shape[:2]).movedim(1, self.axis - 3)
        return volume


def in_plane(levels: Sequence[Sequence[int]], axis: int) -> list[list[int]]:
    """Kernels or strides of each level without the axis that slices lie across, for a 2D network."""
    return [plane(level, axis) for level in levels]


def plane(sizes: Sequence[int], axis: int) -> list[int]:
    """`sizes` (X, Y, Z) without the axis that slices lie across."""
    return [size for a, size in enumerate(sizes) if a != axis]


def _same(kernel: Triple) -> Triple:
    """Padding that keeps the size."""
    x, y, z = kernel
    return x // 2, y // 2, z // 2


class SeparableConv(nn.Module):
    """An in-plane convolution, then one along `axis` where the kernel looks along it; batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Sequence[int], axis: int, norm: str) -> None:
        super().__init__()
        plane = triple([1 if a == axis else k for a, k in enumerate(kernel)], "kernel")
        across = triple([k if a == axis else 1 for a, k in enumerate(kernel)], "kernel")
        self.plane = nn.Conv3d(inputs, outputs, plane, padding=_same(plane), bias=False)
        self.across: nn.Module = nn.Identity()
        if max(across) > 1:
            self.across = nn.Conv3d(outputs, outputs, across, padding=_same(across), bias=False)
        self.norm = Norm[norm, 3](outputs, affine=True)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.norm(self.across(self.plane(image))))


class _Level(nn.Module):
    """Two convolutions; dropout after them on the way up."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Sequence[int], axis: int, norm: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.first = SeparableConv(inputs, outputs, kernel, axis, norm)
        self.second = SeparableConv(outputs, outputs, kernel, axis, norm)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.dropout(self.second(self.first(image)))
        return features


class AnisotropicUNet(nn.Module):
    """U-net for thick slices: in-plane kernels where a plan's kernel is 1 along `axis`, else separable 3D kernels.

    Max pooling down, transposed convolutions up, batch norm and ReLU, and dropout at each level of the decoder, which
    Monte Carlo dropout samples. Unlike in the paper, convolutions are padded and keep the size.

    Args:
        kernels, strides: per level, as in a plan.
        features: channels of each level.
        dropout: rate in the decoder; None is 0.
        norm: MONAI's name of the normalisation.

    Source: Chlebus et al. 2022, section II-A.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        features: Sequence[int],
        axis: int = 2,
        dropout: float | None = None,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        rate = dropout or 0.0
        inputs = (in_channels, *features[:-1])
        self.encoder = nn.ModuleList(
            _Level(i, o, k, axis, norm) for i, o, k in zip(inputs, features, kernels, strict=True)
        )
        self.pools = nn.ModuleList(
            nn.MaxPool3d(triple(stride, "stride"), triple(stride, "stride")) for stride in strides[1:]
        )
        steps = list(zip(features[1:], features[:-1], strides[1:], kernels[:-1], strict=True))[::-1]
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(deep, c, triple(stride, "stride"), triple(stride, "stride"))
            for deep, c, stride, _ in steps
        )
        self.decoder = nn.ModuleList(_Level(2 * c, c, kernel, axis, norm, rate) for _, c, _, kernel in steps)
        self.output = nn.Conv3d(features[0], out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, pool in zip(self.encoder[:-1], self.pools, strict=True):
            image = level(image)
            skips.append(image)
            image = pool(image)
        image = self.encoder[-1](image)
        for up, level, skip in zip(self.ups, self.decoder, skips[::-1], strict=True):
            image = level(torch.cat([up(image), skip], dim=1))
        logits: Tensor = self.output(image)
        return logits
