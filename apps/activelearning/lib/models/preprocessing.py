# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cases as the network sees them: normalised, at its spacing, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lib.models.plan import Normalisation
from lib.partial_labels import UNLABELLED
from lib.regions import Triple
from lib.storage.volumes import Volume

# Spacings whose ratio is closer to 1 than this are not resampled.
SAME_SPACING = 0.02


@dataclass(frozen=True)
class TrainingCase:
    """One annotated image at the spacing of the network: normalised float32 (1, X, Y, Z), uint8 labels (X, Y, Z)."""

    name: str
    image_cxyz: Tensor
    label_xyz: Tensor


def normalise(image_xyz: NDArray[np.float32], how: Normalisation = Normalisation()) -> NDArray[np.float32]:  # noqa: B008
    """(x - mean) / standard deviation after clipping, with numbers of the image or, for CT, of the whole pool.

    MR intensities of one task span four orders of magnitude from image to image, with single voxels far outside, so
    there both the clipping (0.5th and 99.5th percentile) and the z-score are per image.
    """
    if how.scheme == "ct":
        scaled: NDArray[np.float32] = ((np.clip(image_xyz, how.low, how.high) - how.mean) / how.std).astype(np.float32)
        return scaled
    low, high = np.percentile(image_xyz, (0.5, 99.5))
    clipped = np.clip(image_xyz, low, high)
    scored: NDArray[np.float32] = ((clipped - clipped.mean()) / max(float(clipped.std()), 1e-8)).astype(np.float32)
    return scored


def network_shape(shape: Sequence[int], spacing: Sequence[float], wanted: Sequence[float] | None) -> Triple:
    """Shape of an image of `shape` and `spacing` (mm) once it is at the spacing `wanted` (mm).

    None, or 0 on an axis, keeps the image's own.
    """
    goal = [w or s for s, w in zip(spacing, wanted or spacing, strict=True)]
    if all(abs(s / w - 1) <= SAME_SPACING for s, w in zip(spacing, goal, strict=True)):
        x, y, z = shape
    else:
        x, y, z = (max(1, round(n * s / w)) for n, s, w in zip(shape, spacing, goal, strict=True))
    return int(x), int(y), int(z)


def network_image(
    volume: Volume,
    spacing: Sequence[float] | None,
    how: Normalisation = Normalisation(),  # noqa: B008
) -> Tensor:
    """Normalised (1, X, Y, Z) tensor at `spacing` (trilinear)."""
    image = torch.from_numpy(normalise(volume.array_xyz, how))[None]
    shape = network_shape(volume.shape, volume.spacing, spacing)
    return image if shape == volume.shape else _resize(image, shape, "trilinear")


def network_label(label_xyz: NDArray[np.uint8], spacing: Sequence[float], wanted: Sequence[float] | None) -> Tensor:
    """uint8 label map at the spacing `wanted` (nearest neighbour, so that UNLABELLED never mixes with a class)."""
    label = torch.from_numpy(np.ascontiguousarray(label_xyz))
    shape = network_shape(label_xyz.shape, spacing, wanted)
    if shape == tuple(label_xyz.shape):
        return label
    return _resize(label[None].float(), shape, "nearest-exact")[0].to(torch.uint8)


def to_grid(scores_cxyz: Tensor, shape: Sequence[int]) -> Tensor:
    """Scores (C, X, Y, Z) interpolated (trilinear) to the stored grid of an image."""
    x, y, z = shape
    return scores_cxyz if tuple(scores_cxyz.shape[1:]) == (x, y, z) else _resize(scores_cxyz, (x, y, z), "trilinear")


def _resize(volume_cxyz: Tensor, shape: Triple, mode: str) -> Tensor:
    aligned = {"align_corners": False} if mode == "trilinear" else {}
    return functional.interpolate(volume_cxyz[None], size=shape, mode=mode, **aligned)[0]


def crop(image_cxyz: Tensor, label_xyz: Tensor, start: Sequence[int], patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Plain crop; outside of the image lies 0 (the mean of a normalised image) and no annotation."""
    image = image_cxyz.new_zeros((image_cxyz.shape[0], *patch))
    label = label_xyz.new_full(tuple(patch), UNLABELLED)
    source, target = [], []
    for s, p, n in zip(start, patch, label_xyz.shape, strict=True):
        a, b = max(s, 0), min(s + p, n)
        source.append(slice(a, b))
        target.append(slice(a - s, b - s))
    image[(slice(None), *target)] = image_cxyz[(slice(None), *source)]
    label[tuple(target)] = label_xyz[tuple(source)]
    return image, label
