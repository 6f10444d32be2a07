# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Posteriors of images too large for one array per class: stripes across, layers of windows along the longest axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lib.models.cpu_convolutions import OneDNN
from lib.models.preprocessing import network_image
from lib.prediction.posterior import Ensemble, PosteriorSpec, dropout
from lib.regions import Triple
from lib.storage.volume_headers import ImageError
from lib.storage.volumes import Volume
from lib.uncertainty import Moments, RunningMoments

# Above this, sums of an image and their terms would need several times as much memory.
LARGE_BYTES = 1 << 28
# Limit of logits, probabilities, sums and the carry-over between layers together.
WORKING_BYTES = 3 << 30
_FLOAT = 4
_SIGMA = 0.125  # of the Gaussian that weights a window, as a share of its size: MONAI's default

Range = tuple[int, int]


class Slab(NamedTuple):
    """Moments of a box of the stored image, first and last + 1 voxel along each axis."""

    box: tuple[Range, Range, Range]
    moments: Moments


class Prediction(NamedTuple):
    """One network, and the state it runs in."""

    network: nn.Module
    state: Callable[[], AbstractContextManager[None]]


def is_large(classes: int, shape: Sequence[int], limit: int = LARGE_BYTES) -> bool:
    """Return whether probabilities (C, X, Y, Z) in float32 take more than `limit` bytes."""
    return classes * math.prod(shape) * _FLOAT > limit


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced first voxels of windows that cover `size`, neighbours overlapping by at least `overlap`."""
    if window >= size:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [round(place) for place in np.linspace(0, size - window, count)]


def streamed_moments(
    ensemble: Ensemble,
    volume: Volume,
    overlap: float,
    spec: PosteriorSpec,
    seed: int,
    classes: int,
    working_bytes: int = WORKING_BYTES,
    mirrored: Sequence[int] = (),
) -> Iterator[Slab]:
    """Moments of `volume`, one slab at a time, equal to those of whole arrays except for the places of the windows.

    The image is cut into as many stripes as are needed to stay within `working_bytes`. Windows between two stripes are
    computed for both. In a stripe, windows come in layers along the longest axis; a layer's sums beyond the start of
    the next one are carried over. `classes` are those of the networks, background included. Every network also
    predicts the mirror image of each window along the axes in `mirrored`. The caller must hold `ensemble.lock`.

    Raises:
        ImageError: the posterior has test-time augmentation, whose views need the whole image.
    """
    if spec.tta:
        raise ImageError(
            f"{volume.path}: the image is too large for test-time augmentation; use an ensemble or dropout"
        )
    image = network_image(volume, ensemble.spacing, ensemble.normalisation).to(ensemble.device)
    predictions = list(_predictions(ensemble, spec, seed, mirrored))
    grid = _Grid(ensemble, image, volume.shape, overlap)
    count = grid.stripes(classes, len(predictions), working_bytes)
    cuts = [round(cut) for cut in np.linspace(0, volume.shape[grid.across], count + 1)]
    for stripe in pairwise(cuts):
        yield from _stripe_moments(grid, stripe, predictions)


def _stripe_moments(grid: _Grid, stripe: Range, predictions: Sequence[Prediction]) -> Iterator[Slab]:
    """Slabs of one stripe, from the first layer to the last."""
    layers = _Layers(grid, grid.needed(grid.across, stripe))
    carried: list[Tensor | None] = [None] * len(predictions)
    kept: list[Tensor | None] = [None] * len(predictions)
    done = first = 0
    for number in range(len(grid.starts[grid.along])):
        moments: RunningMoments | None = None
        known = layers.end(number)
        ready = grid.ready(known)
        low = grid.needed(grid.along, (ready, ready + 1))[0] if ready < grid.stored[grid.along] else known
        for index, prediction in enumerate(predictions):
            with prediction.state():
                logits, carried[index] = layers.run(number, prediction.network, carried[index])
            before = kept[index]
            held = logits if before is None else torch.cat([before, logits], dim=1 + grid.along)
            del logits, before
            # An interpolated slice may lie between two layers.
            kept[index] = held.narrow(1 + grid.along, low - first, known - low).clone() if low < known else None
            if ready > done:
                probs = grid.to_stored(held, stripe, layers.across_range[0], (done, ready), first)
                del held
                probs = probs.softmax(dim=0)
                moments = moments or RunningMoments(probs.shape)
                moments.add(probs)
        layers.advance(number)
        if moments is not None:
            ranges = {grid.along: (done, ready), grid.across: stripe}
            x, y, z = (ranges.get(axis, (0, grid.stored[axis])) for axis in range(3))
            yield Slab((x, y, z), moments.finished())
        done, first = max(done, ready), low


def _predictions(
    ensemble: Ensemble, spec: PosteriorSpec, seed: int, mirrored: Sequence[int] = ()
) -> Iterator[Prediction]:
    for number, network in enumerate(ensemble.networks if spec.ensemble else ensemble.networks[:1]):
        yield from (Prediction(_Mirrored(network, axis), nullcontext) for axis in mirrored)
        for pass_ in range(max(1, spec.passes)):
            if spec.passes:
                yield Prediction(network, _Dropout(network, spec.dropout, seed + 1000 * number + pass_))
            else:
                yield Prediction(network, nullcontext)


class _Mirrored(nn.Module):
    """A network that sees the mirror image of its window along `axis`, and answers on the window itself."""

    def __init__(self, network: nn.Module, axis: int) -> None:
        super().__init__()
        self.network, self.axis = network, axis + 2  # behind batch and channel

    def forward(self, window: Tensor) -> Tensor:
        logits: Tensor = self.network(window.flip(self.axis))
        return logits.flip(self.axis)


class _Dropout:
    """Dropout switched on for one layer after the other: each draws anew, and the same in every run."""

    def __init__(self, network: nn.Module, rate: float, seed: int) -> None:
        self.network, self.rate, self.seed, self.layer = network, rate, seed, 0

    def __call__(self) -> AbstractContextManager[None]:
        self.layer += 1
        return dropout(self.network, self.rate, self.seed + 1_000_003 * self.layer)


class _Grid:
    """Places of the windows in an image, and the mapping between its voxels and those of the stored image."""

    def __init__(self, ensemble: Ensemble, image_cxyz: Tensor, stored: Triple, overlap: float) -> None:
        self.ensemble, self.stored = ensemble, stored
        self.size = tuple(int(n) for n in image_cxyz.shape[1:])
        self.along, self.across = (int(axis) for axis in np.argsort(self.size, kind="stable")[::-1][:2])
        self.window: Triple = ensemble.window(self.size)
        # A short axis is filled up to the window's size, as MONAI does.
        missing = [max(0, w - n) for w, n in zip(self.window, self.size, strict=True)]
        pads = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        self.offset = [m // 2 for m in missing]
        self.image = functional.pad(image_cxyz, pads) if any(missing) else image_cxyz
        sizes = [n + m for n, m in zip(self.size, missing, strict=True)]
        self.starts = [window_starts(n, w, overlap) for n, w in zip(sizes, self.window, strict=True)]
        self.importance = compute_importance_map(
            self.window, mode="gaussian", sigma_scale=_SIGMA, device=image_cxyz.device
        )
        pairs = zip(self.size, stored, strict=True)
        self._neighbours = [None if n == wanted else _neighbours(n, wanted) for n, wanted in pairs]

    def stripes(self, classes: int, predictions: int, working_bytes: int) -> int:
        """Number of stripes that keep a layer, its sums and every prediction's carry-over within `working_bytes`."""
        starts = self.starts[self.along]
        step = max((b - a for a, b in pairwise(starts)), default=self.window[self.along])
        # A layer, its probabilities, their sum and spread, and the carry-over of each prediction and the present one.
        rest = self.window[self.along] - step + 1
        slices = self.window[self.along] + 3 * step + rest * (1 + predictions)
        a_slice = _FLOAT * classes * max(math.prod(self.size), math.prod(self.stored)) // self.size[self.along]
        return min(math.ceil(a_slice * slices / working_bytes), self.stored[self.across])

    def needed(self, axis: int, stored: Range) -> Range:
        """Voxels of the network's grid that a range of the stored one is made of."""
        known = self._neighbours[axis]
        return stored if known is None else (int(known[0][stored[0]]), int(known[1][stored[1] - 1]) + 1)

    def ready(self, known: int) -> int:
        """Stored slices along the longest axis that `known` slices of the network's grid are enough for."""
        neighbours = self._neighbours[self.along]
        return known if neighbours is None else int(np.searchsorted(neighbours[1], known, side="left"))

    def to_stored(self, logits: Tensor, stripe: Range, left: int, slices: Range, first: int) -> Tensor:
        """Logits on the stored grid (trilinear); theirs begin at `left` across and at `first` along."""
        other = next(axis for axis in range(3) if axis not in (self.along, self.across))
        ranges = {self.along: (slices, first), self.across: (stripe, left), other: ((0, self.stored[other]), 0)}
        for axis, ((start, stop), offset) in ranges.items():
            neighbours = self._neighbours[axis]
            if neighbours is None:
                logits = logits.narrow(1 + axis, start - offset, stop - start)
                continue
            low, high, share = (values[start:stop] for values in neighbours)
            below, above = (
                logits.index_select(1 + axis, torch.from_numpy(index - offset).to(logits.device))
                for index in (low, high)
            )
            shape = [-1 if a == axis else 1 for a in range(3)]
            logits = torch.lerp(below, above, torch.from_numpy(share).to(logits).view(shape))
        return logits


def _neighbours(size: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For each of `wanted` voxels the two of `size` around it and the share of the upper one (edges not aligned)."""
    place = np.maximum((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0)
    low = np.minimum(place.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), np.clip(place - low, 0, 1)


class _Layers:
    """Layers of windows over one stripe, from `across_range` of the network's grid, and their Gaussian weights."""

    def __init__(self, grid: _Grid, across_range: Range) -> None:
        self.grid, self.across_range = grid, across_range
        self.alone = len(grid.starts[grid.along]) == 1
        left, right = (at + grid.offset[grid.across] for at in across_range)
        self.left = left
        window = grid.window[grid.across]
        columns = [start for start in grid.starts[grid.across] if start < right and start + window > left]
        places = [columns if a == grid.across else [0] if a == grid.along else grid.starts[a] for a in range(3)]
        self.places = list(product(*places))
        self.shape = list(grid.image.shape[1:])
        self.shape[grid.along], self.shape[grid.across] = grid.window[grid.along], right - left
        self._weight: Tensor | None = None
        self._weight_carried: Tensor | None = None

    def end(self, number: int) -> int:
        """Slices of the image that are finished with a layer."""
        starts = self.grid.starts[self.grid.along]
        return self.grid.size[self.grid.along] if number + 1 == len(starts) else starts[number + 1]

    def run(self, number: int, network: nn.Module, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (C, ...) of the slices that no later layer reaches, and the unfinished sums of the others."""
        along, device = self.grid.along, self.grid.image.device
        fresh, sums = self._weight is None, None
        if self._weight is None:
            self._weight = _begin(torch.zeros(self.shape, device=device), self._weight_carried, along)
        for place in self.places:
            found = self._forward(network, number, place)
            if sums is None:
                sums = _begin(torch.zeros((len(found), *self.shape), device=device), carried, 1 + along)
            inside, part = self._overlap(place)
            sums[(slice(None), *inside)] += (found * self.grid.importance)[(slice(None), *part)]
            if fresh:
                self._weight[inside] += self.grid.importance[part]
        assert sums is not None, "a stripe has windows"
        done = self._done(number)
        rest = sums.narrow(1 + along, done, self.shape[along] - done).clone()
        finished = sums.narrow(1 + along, 0, done).div_(self._weight.narrow(along, 0, done))
        return finished[(slice(None), *self._crop())], rest

    def advance(self, number: int) -> None:
        """Start the weights of the next layer with the carry-over of this one."""
        assert self._weight is not None, "a layer has run"
        along, done = self.grid.along, self._done(number)
        self._weight_carried = self._weight.narrow(along, done, self.shape[along] - done).clone()
        self._weight = None

    def _done(self, number: int) -> int:
        """Slices of a layer that the next one does not reach; all of the last one."""
        starts = self.grid.starts[self.grid.along]
        return self.shape[self.grid.along] if number + 1 == len(starts) else starts[number + 1] - starts[number]

    def _crop(self) -> list[slice]:
        """Slices of the stripe without padding; across the stripe there is never any."""
        grid = self.grid
        cuts = [slice(offset, offset + n) for offset, n in zip(grid.offset, grid.size, strict=True)]
        cuts[grid.across] = slice(None)
        if not self.alone:
            cuts[grid.along] = slice(None)
        return cuts

    def _overlap(self, place: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Slices of the stripe that a window covers, and the corresponding slices of the window."""
        inside, part = [], []
        for axis, (start, window) in enumerate(zip(place, self.grid.window, strict=True)):
            start -= self.left if axis == self.grid.across else 0
            stop = min(start + window, self.shape[axis])
            inside.append(slice(max(0, start), stop))
            part.append(slice(max(0, start) - start, stop - start))
        return tuple(inside), tuple(part)

    def _forward(self, network: nn.Module, number: int, place: Sequence[int]) -> Tensor:
        grid, device = self.grid, self.grid.ensemble.device
        first = [grid.starts[axis][number] if axis == grid.along else p for axis, p in enumerate(place)]
        cut = tuple(slice(p, p + w) for p, w in zip(first, grid.window, strict=True))
        half = grid.ensemble.half
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None),
            OneDNN(),
        ):
            logits: Tensor = network(grid.image[(slice(None), *cut)][None])[0].float()
        return logits


def _begin(values: Tensor, carried: Tensor | None, axis: int) -> Tensor:
    """`values` with the carry-over of the previous layer added at their beginning."""
    if carried is not None:
        values.narrow(axis, 0, carried.shape[axis]).copy_(carried)
    return values
