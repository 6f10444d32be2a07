# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Crops with augmentation, from cases in memory; a whole batch is transformed at once, on its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lib.partial_labels import UNLABELLED
from lib.regions import Triple


@dataclass(frozen=True)
class Augmentation:
    """Strength of the changes to crops; `none` of all is plain cropping.

    - rotation: in degrees (uniform, every axis).
    - scale: as e^U(-s, s).
    - mirror: axes, each flipped with probability 1/2.
    - brightness, contrast: as factors e^U(-b, b).
    - noise: the upper bound of a Gaussian's standard deviation in units of the normalised image.
    - probability: of spatial and of intensity changes, each.
    - flat: slices across this axis stay slices. Crops are turned and scaled within them only (nnU-Net, for crops of
      few thick slices).
    """

    rotation: float = 15.0
    scale: float = 0.2
    mirror: tuple[int, ...] = (0,)
    contrast: float = 0.25
    noise: float = 0.1
    probability: float = 0.5
    flat: int | None = None


@dataclass(frozen=True)
class Changes:
    """Changes to each crop of a batch: offsets from its centre times matrix (B, 3, 3); gain, shift, noise (B,)."""

    matrix_bij: NDArray[np.float32]
    gain: NDArray[np.float32]
    shift: NDArray[np.float32]
    noise: NDArray[np.float32]

    def __getitem__(self, which: slice) -> Changes:
        return Changes(self.matrix_bij[which], self.gain[which], self.shift[which], self.noise[which])

    def margin(self, patch: Sequence[int]) -> Triple:
        """Voxels around a crop that its rotation and scaling can reach, on each axis."""
        half = (np.asarray(patch) - 1) / 2
        reach = np.abs(self.matrix_bij) @ half
        return cast(Triple, tuple(int(m) for m in np.ceil(np.maximum(reach.max(0) - half, 0)).astype(int) + 1))


def draw_changes(batch: int, how: Augmentation, rng: np.random.Generator) -> Changes:
    """Random changes for `batch` crops; drawn on the host, so that no step waits for its device."""

    def chosen() -> NDArray[np.bool_]:
        return rng.random(batch) < how.probability

    angles = rng.uniform(-how.rotation, how.rotation, (batch, 3))
    scale = np.exp(rng.uniform(-how.scale, how.scale, batch))
    turned = np.stack([rotation(a) * s for a, s in zip(angles, scale, strict=True)])
    if how.flat is not None:
        turned = np.stack([_within(a, s, how.flat) for a, s in zip(angles, scale, strict=True)])
    matrix = np.where(chosen()[:, None, None], turned, np.eye(3))
    flips = np.ones((batch, 3))
    for axis in how.mirror:
        flips[rng.random(batch) < 0.5, axis] = -1
    recoloured, noisy = chosen(), chosen()
    return Changes(
        matrix_bij=(matrix * flips[:, None, :]).astype(np.float32),
        gain=np.where(recoloured, np.exp(rng.uniform(-how.contrast, how.contrast, batch)), 1).astype(np.float32),
        shift=np.where(recoloured, rng.uniform(-how.contrast, how.contrast, batch), 0).astype(np.float32),
        noise=np.where(noisy, rng.uniform(0, how.noise, batch), 0).astype(np.float32),
    )


def _within(angles: NDArray[np.float64], scale: float, axis: int) -> NDArray[np.float64]:
    """Rotation about `axis` and scaling of the other two."""
    matrix: NDArray[np.float64] = rotation(np.where(np.arange(3) == axis, angles, 0)) * scale
    matrix[axis, axis] = 1
    return matrix


def changed(
    blocks_bcxyz: Tensor, labels_bxyz: Tensor, patch: Triple, changes: Changes, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The middle `patch` of each block after augmentation: one interpolation for the whole batch, then intensities.

    Blocks are crops with an additional `changes.margin(patch)` on either side, so that only voxels outside of the image
    are padded. If a warp moves every annotated voxel out of a crop, the plain crop is used instead, since a crop
    without annotation does not contribute to the loss. The device decides this without a synchronisation.

    Shapes: blocks (B, C, *block), labels (B, *block) uint8 -> (B, C, *patch), (B, *patch); on the blocks' device.
    """
    device = blocks_bcxyz.device
    x, y, z = (slice((b - p) // 2, (b - p) // 2 + p) for b, p in zip(blocks_bcxyz.shape[2:], patch, strict=True))
    grid = _grid(patch, tuple(blocks_bcxyz.shape[2:]), torch.from_numpy(changes.matrix_bij).to(device))
    images = functional.grid_sample(blocks_bcxyz, grid, mode="bilinear", align_corners=False)
    found = functional.grid_sample(labels_bxyz[:, None].float(), grid, mode="nearest", align_corners=False)
    labels = found[:, 0].to(torch.uint8)
    plain_images, plain_labels = blocks_bcxyz[:, :, x, y, z], labels_bxyz[:, x, y, z]
    lost = (labels == UNLABELLED).flatten(1).all(1).view(-1, 1, 1, 1)
    labels = torch.where(lost, plain_labels, labels)
    images = torch.where(lost[:, None], plain_images, images)
    gain, shift, noise = (
        torch.from_numpy(values).to(device).view(-1, 1, 1, 1, 1)
        for values in (changes.gain, changes.shift, changes.noise)
    )
    images = torch.addcmul(shift.expand_as(images), images, gain)
    return images.addcmul_(torch.randn(images.shape, generator=generator, device=device), noise), labels


def _grid(patch: Triple, block: Sequence[int], matrix_bij: Tensor) -> Tensor:
    """Sampling grid of each crop in its block, in the format of grid_sample: (B, *patch, 3).

    In (z, y, x) order, with -1 and 1 at the outer borders of the outermost voxels.
    """
    axes = [torch.arange(p, dtype=torch.float32, device=matrix_bij.device) - (p - 1) / 2 for p in patch]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(1, -1, 3)
    half = torch.tensor(block, dtype=torch.float32).to(matrix_bij.device) / 2
    moved = (offsets @ matrix_bij.transpose(1, 2)) / half
    return moved.flip(-1).view(-1, *patch, 3)


def rotation(degrees: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return cast("NDArray[np.float64]", about_z @ about_y @ about_x)
