# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Resolution ladders and their cost: the axes halved per level, and the number of activations of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Levels = tuple[tuple[int, ...], ...]

# Shortest edge of the coarsest feature map, in voxels.
EDGE = 4
# Axes whose spacings differ by less than this factor count as equally resolved.
RESOLVED = 2.0


@dataclass(frozen=True)
class Ladder:
    """Kernels and strides of each level, and the input size rounded up to a multiple of the strides."""

    kernels: Levels
    strides: Levels
    size: tuple[int, ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """Product of the strides on each axis."""
        return tuple(math.prod(level) for level in zip(*self.strides, strict=True))


def ladder(
    size: Sequence[float], spacing: Sequence[float], levels: int = 99, flat: tuple[int, int] | None = None
) -> Ladder:
    """Return the ladder for an input of `size` voxels at `spacing` mm.

    From level to level, an axis is halved while it has 2 x EDGE voxels or more and its spacing is below RESOLVED times
    the finest spacing among such axes. One axis alone is halved only while it has 3 x EDGE. The kernel is 3 along an
    axis from the level on at which its spacing is below RESOLVED times the finest of all, and 1 before that. At the
    coarsest level it is 3 along every axis.

    Args:
        levels: at most this many.
        flat: (axis, n): the first n levels have stride 1 and kernel 1 along this axis, for any spacing.

    Source: Isensee et al. 2021, online methods, "Architecture topology"; `flat`: Chlebus et al. 2022, section II-A.
    """
    now, mm = [float(n) for n in size], list(spacing)
    axes = range(len(now))
    kernels: list[tuple[int, ...]] = []
    strides = [(1,) * len(now)]
    looks = [1] * len(now)

    def is_flat(axis: int, level: int) -> bool:
        return flat is not None and axis == flat[0] and level < flat[1]

    while len(strides) < levels:
        long = [a for a in axes if now[a] >= 2 * EDGE and not is_flat(a, len(strides))]
        if not long:
            break
        finest = min(mm[a] for a in long)
        halved = [a for a in long if mm[a] / finest < RESOLVED]
        if len(halved) == 1 and now[halved[0]] < 3 * EDGE:
            break
        looks = [3 if k == 3 or mm[a] / min(mm) < RESOLVED else 1 for a, k in zip(axes, looks, strict=True)]
        kernels.append(tuple(1 if is_flat(a, len(kernels)) else looks[a] for a in axes))
        strides.append(tuple(2 if a in halved else 1 for a in axes))
        now = [math.ceil(now[a] / 2) if a in halved else now[a] for a in axes]
        mm = [mm[a] * 2 if a in halved else mm[a] for a in axes]
    kernels.append((3,) * len(now))
    divisor = [math.prod(level[a] for level in strides) for a in axes]
    whole = tuple(math.ceil(n / d) * d for n, d in zip(size, divisor, strict=True))
    return Ladder(tuple(kernels), tuple(strides), whole)


def features(first: int, largest: int, levels: int) -> tuple[int, ...]:
    """Channels of each level: doubled from `first` on, at most `largest`."""
    return tuple(min(largest, first * 2**level) for level in range(levels))


def activations(size: Sequence[int], strides: Levels, channels: Sequence[int], outputs: int) -> int:
    """Values that the convolutions of a U-Net put out for one input of `size`.

    Two convolutions a level on the way down; on the way up two and a transposed one; `outputs` maps at the end.

    Source: nnU-Net's measure of memory (size of the feature maps in the network).
    """
    sizes = []
    now = list(size)
    for stride in strides:
        now = [n // s for n, s in zip(now, stride, strict=True)]
        sizes.append(math.prod(now))
    down = sum(2 * c * n for c, n in zip(channels, sizes, strict=True))
    up = sum(3 * c * n for c, n in zip(channels[:-1], sizes[:-1], strict=True))
    return down + up + outputs * sizes[0]
