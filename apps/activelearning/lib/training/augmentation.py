# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Crops with augmentation, cut out of cases that live in memory; torch only, no MONAI dictionaries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lib.partial_labels import UNLABELLED
from lib.regions import Triple


@dataclass(frozen=True)
class Augmentation:
    """How strongly crops are changed; `none` of all is plain cropping.

    rotation in degrees (uniform, every axis), scale as e^U(-s, s), mirror axes flipped with probability 1/2,
    brightness and contrast as factors e^U(-b, b), noise as the upper bound of a Gaussian's standard deviation in units
    of the normalised image; spatial and intensity changes are applied with `probability` each.
    """

    rotation: float = 15.0
    scale: float = 0.2
    mirror: tuple[int, ...] = (0,)
    contrast: float = 0.25
    noise: float = 0.1
    probability: float = 0.5


def crop(image_cxyz: Tensor, label_xyz: Tensor, start: Triple, patch: Triple) -> tuple[Tensor, Tensor]:
    """Plain crop; outside of the image lies 0 (the mean of a normalised image) and no annotation."""
    image = image_cxyz.new_zeros((image_cxyz.shape[0], *patch))
    label = label_xyz.new_full(patch, UNLABELLED)
    source, target = [], []
    for s, p, n in zip(start, patch, label_xyz.shape, strict=True):
        a, b = max(s, 0), min(s + p, n)
        source.append(slice(a, b))
        target.append(slice(a - s, b - s))
    image[(slice(None), *target)] = image_cxyz[(slice(None), *source)]
    label[tuple(target)] = label_xyz[tuple(source)]
    return image, label


def augmented_crop(
    image_cxyz: Tensor, label_xyz: Tensor, start: Triple, patch: Triple, how: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A crop under a random rotation, scaling, mirroring and intensity change.

    The crop is cut and warped in one interpolation over the whole image, so that nothing is padded that the image has.
    A warp that turns every annotated voxel out of the crop is dropped for the plain crop: a crop without annotation
    would teach nothing.

    Shapes: image (C, X, Y, Z), label (X, Y, Z) uint8 -> (C, *patch), patch.
    """
    if rng.random() < how.probability and (how.rotation or how.scale):
        image, label = _warp(image_cxyz, label_xyz, start, patch, how, rng)
        if bool((label == UNLABELLED).all()):
            image, label = crop(image_cxyz, label_xyz, start, patch)
    else:
        image, label = crop(image_cxyz, label_xyz, start, patch)
    flips = [axis for axis in how.mirror if rng.random() < 0.5]
    if flips:
        image, label = image.flip([axis + 1 for axis in flips]), label.flip(flips)
    return _intensity(image, how, rng), label


def _warp(
    image_cxyz: Tensor, label_xyz: Tensor, start: Triple, patch: Triple, how: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    matrix = _rotation(rng.uniform(-how.rotation, how.rotation, 3)) * math.exp(rng.uniform(-how.scale, how.scale))
    axes = [torch.arange(p, dtype=torch.float32) - (p - 1) / 2 for p in patch]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    centre = torch.tensor([s + (p - 1) / 2 for s, p in zip(start, patch, strict=True)], dtype=torch.float32)
    voxels = offsets @ torch.as_tensor(matrix, dtype=torch.float32).T + centre
    shape = torch.tensor(label_xyz.shape, dtype=torch.float32)
    # grid_sample wants (z, y, x) order and -1 ... 1 between the outer borders of the outermost voxels.
    grid = ((2 * voxels + 1) / shape - 1).flip(-1)[None].to(image_cxyz.device)
    image = functional.grid_sample(image_cxyz[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # Shifted so that the zeros outside of the image read as "not annotated".
    shifted = (label_xyz.float() - UNLABELLED)[None, None]
    label = functional.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return image[0], (label[0, 0] + UNLABELLED).to(torch.uint8)


def _rotation(degrees: np.ndarray) -> np.ndarray:
    """Rotation about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _intensity(image: Tensor, how: Augmentation, rng: np.random.Generator) -> Tensor:
    if rng.random() < how.probability and how.contrast:
        factor = math.exp(rng.uniform(-how.contrast, how.contrast))
        image = image * factor + rng.uniform(-how.contrast, how.contrast)
    if rng.random() < how.probability and how.noise:
        noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0, how.noise)
        image = image + torch.from_numpy(noise).to(image.device)
    return image
