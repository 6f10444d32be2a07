# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Test-time augmentation: views of an image and the way back from their predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LARGEST_ANGLE = 10


@dataclass(frozen=True)
class View:
    """A changed copy of an image: `forward` makes it, `inverse` brings its scores (C, X, Y, Z) back.

    `inverse` answers the scores and a mask (X, Y, Z) of voxels that the copy held; None where it held all.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def identity() -> View:
    """The image itself."""
    return View(lambda image: image, lambda scores: (scores, None))


def flip(axis: int) -> View:
    """Mirrored along one spatial axis; exact both ways."""
    return View(lambda image: image.flip(axis + 1), lambda scores: (scores.flip(axis + 1), None))


def moved(by: int, shape: Sequence[int], divisor: Sequence[int]) -> View:
    """An image of `shape` behind `by` zeros on each spatial axis, filled up with zeros to a multiple of `divisor`.

    A network with strides or folding answers a little differently where its grid lies elsewhere on the image.

    Source: Coifman & Donoho 1995 (cycle spinning).
    """
    pads = [(by, -(by + size) % step) for size, step in zip(shape, divisor, strict=True)]
    kept = (slice(None), *(slice(by, by + size) for size in shape))

    def forward(image_cxyz: Tensor) -> Tensor:
        return functional.pad(image_cxyz, [width for pair in reversed(pads) for width in pair])

    return View(forward, lambda scores_cxyz: (scores_cxyz[kept], None))


def rotation(degrees: int, noise: float, seed: int) -> View:
    """Rotated in the plane of the first two axes by whole degrees, nearest neighbour, plus Gaussian noise.

    Scores are rotated back the same way; voxels that either rotation moved out of the image are masked out.

    Source: Gaillochet et al. 2023 (angles of at most 10 degrees, noise of standard deviation 0.01).
    """

    def forward(image_cxyz: Tensor) -> Tensor:
        turned = rotate(image_cxyz, degrees)
        generator = torch.Generator().manual_seed(seed)
        return turned + noise * torch.randn(turned.shape, generator=generator).to(turned.device)

    def inverse(scores_cxyz: Tensor) -> tuple[Tensor, Tensor]:
        kept = rotate(rotate(torch.ones_like(scores_cxyz[:1]), degrees), -degrees)[0] > 0.5
        return rotate(scores_cxyz, -degrees), kept

    return View(forward, inverse)


def rotate(volume_cxyz: Tensor, degrees: int) -> Tensor:
    """Rotation about the centre in the plane of x and y, nearest neighbour, zero outside, size unchanged."""
    _, nx, ny, nz = volume_cxyz.shape
    planes = volume_cxyz.permute(0, 3, 1, 2).reshape(1, -1, nx, ny)
    x = torch.arange(nx, dtype=torch.float32) - (nx - 1) / 2
    y = torch.arange(ny, dtype=torch.float32) - (ny - 1) / 2
    grid_x, grid_y = torch.meshgrid(x, y, indexing="ij")
    angle = np.deg2rad(degrees)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    source = torch.stack([-sin * grid_x + cos * grid_y, cos * grid_x + sin * grid_y], dim=-1)
    # Halves of the size, so that -1 and 1 are the outer borders of the outermost voxels.
    grid = (source / torch.tensor([ny / 2, nx / 2]))[None].to(volume_cxyz.device)
    turned = functional.grid_sample(planes, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return turned.reshape(-1, nz, nx, ny).permute(0, 2, 3, 1)


def views(flips: bool, rotations: int, noise: float, rng: np.random.Generator) -> Iterator[View]:
    """The image itself, its three mirror images where `flips`, and `rotations` turned copies with noise."""
    yield identity()
    if flips:
        yield from (flip(axis) for axis in range(3))
    for _ in range(rotations):
        degrees = int(rng.integers(-LARGEST_ANGLE, LARGEST_ANGLE + 1))
        yield rotation(degrees, noise, int(rng.integers(2**31)))
