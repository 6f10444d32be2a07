# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Posteriors of images too large for one array a class: layer by layer along the longest axis, each window once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor, nn
from torch.nn import functional

from lib.fast_convolution import OneDNN
from lib.images import ImageError, Volume
from lib.posterior import Ensemble, PosteriorSpec, dropout
from lib.regions import Triple
from lib.training.cases import network_image
from lib.training.trainer import autocast_type
from lib.uncertainty import Moments

# Above this, sums of an image and what they are made of would take several times as much memory.
LARGE_BYTES = 1 << 30
_BYTES_A_PROBABILITY = 4
_SIGMA = 0.125  # of the Gaussian that weights a window, as a share of its size: MONAI's default


class Slab(NamedTuple):
    """Moments of the voxels from `start` on along `axis` of the stored image."""

    axis: int
    start: int
    moments: Moments


class Prediction(NamedTuple):
    """One network, and the state it runs in."""

    network: nn.Module
    state: Callable[[], AbstractContextManager[None]]


def is_large(classes: int, shape: Sequence[int], limit: int = LARGE_BYTES) -> bool:
    """Whether probabilities (C, X, Y, Z) in float32 are more than `limit` bytes."""
    return classes * math.prod(shape) * _BYTES_A_PROBABILITY > limit


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced first voxels of windows that cover `size`, neighbours overlapping by at least `overlap`."""
    if window >= size:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [round(place) for place in np.linspace(0, size - window, count)]


def streamed_moments(
    ensemble: Ensemble, volume: Volume, overlap: float, spec: PosteriorSpec, seed: int
) -> Iterator[Slab]:
    """Moments of `volume`, a slab at a time, equal to those of whole arrays but for the places of the windows.

    Windows are taken in layers along the longest axis. What a layer says beyond the start of the next one is carried
    over, so that no window is computed twice: memory holds the image, a layer of logits, and for each prediction what
    it carries over, C x (window - step) slices. Whoever calls holds the ensemble's lock.

    Raises:
        ImageError: the posterior has test-time augmentation, whose views need the whole image.
    """
    if spec.tta:
        raise ImageError(
            f"{volume.path}: the image is too large for test-time augmentation; use an ensemble or dropout"
        )
    image = network_image(volume, ensemble.spacing, ensemble.normalisation).to(ensemble.device)
    predictions = list(_predictions(ensemble, spec, seed))
    layers = _Layers(ensemble, image, overlap)
    grids = [_Regrid(layers.axis, tuple(image.shape[1:]), volume.shape) for _ in predictions]
    carried: list[Tensor | None] = [None] * len(predictions)
    for number in range(len(layers.starts)):
        slab: Moments | None = None
        start = grids[0].done
        for index, prediction in enumerate(predictions):
            with prediction.state():
                logits, carried[index] = layers.run(number, prediction.network, carried[index])
            ready = grids[index].add(logits, last=number == len(layers.starts) - 1)
            del logits
            if ready is not None:
                probs = torch.softmax(ready, dim=0)
                slab = slab or Moments(probs.shape)
                slab.add(probs)
        layers.advance(number)
        if slab is not None:
            yield Slab(layers.axis, start, slab)


def _predictions(ensemble: Ensemble, spec: PosteriorSpec, seed: int) -> Iterator[Prediction]:
    for number, network in enumerate(ensemble.networks if spec.ensemble else ensemble.networks[:1]):
        for pass_ in range(max(1, spec.passes)):
            if spec.passes:
                yield Prediction(network, _Dropout(network, spec.dropout, seed + 1000 * number + pass_))
            else:
                yield Prediction(network, nullcontext)


class _Dropout:
    """Dropout switched on for one layer after the other: each draws anew, and the same in every run."""

    def __init__(self, network: nn.Module, rate: float, seed: int) -> None:
        self.network, self.rate, self.seed, self.layer = network, rate, seed, 0

    def __call__(self) -> AbstractContextManager[None]:
        self.layer += 1
        return dropout(self.network, self.rate, self.seed + 1_000_003 * self.layer)


class _Layers:
    """Windows of an image in layers along its longest axis, and their Gaussian weights."""

    def __init__(self, ensemble: Ensemble, image_cxyz: Tensor, overlap: float) -> None:
        self.ensemble = ensemble
        size = tuple(int(n) for n in image_cxyz.shape[1:])
        self.axis = int(np.argmax(size))
        self.window: Triple = ensemble.window(size)
        # A short axis is filled up to the window's size, as MONAI does.
        missing = [max(0, w - n) for w, n in zip(self.window, size, strict=True)]
        pads = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        self.crop = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True))
        self.image = functional.pad(image_cxyz, pads) if any(missing) else image_cxyz
        self.size = tuple(int(n) for n in self.image.shape[1:])
        starts = [window_starts(n, w, overlap) for n, w in zip(self.size, self.window, strict=True)]
        self.starts = starts[self.axis]
        self.across = [starts[a] if a != self.axis else [0] for a in range(3)]
        self.importance = compute_importance_map(
            self.window, mode="gaussian", sigma_scale=_SIGMA, device=image_cxyz.device
        )
        self.weight_carried: Tensor | None = None
        self._weight: Tensor | None = None

    def run(self, number: int, network: nn.Module, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits (C, ...) of the slices that no later layer reaches, and the unfinished sums of the others."""
        shape = [n if a != self.axis else self.window[a] for a, n in enumerate(self.size)]
        sums: Tensor | None = None
        fresh = self._weight is None
        if fresh:
            self._weight = torch.zeros(shape, device=self.image.device)
            if self.weight_carried is not None:
                self._head(self._weight, self.weight_carried.shape[self.axis]).add_(self.weight_carried)
        assert self._weight is not None
        for place in product(*self.across):
            inside = tuple(slice(p, p + w) for p, w in zip(place, self.window, strict=True))
            found = self._forward(network, number, inside)
            if sums is None:
                sums = torch.zeros((found.shape[0], *shape), device=self.image.device)
                if carried is not None:
                    self._head(sums, carried.shape[1 + self.axis], 1).add_(carried)
            sums[(slice(None), *inside)] += found * self.importance
            if fresh:
                self._weight[inside] += self.importance
        assert sums is not None
        done = self._done(number)
        finished = sums.narrow(1 + self.axis, 0, done).div_(self._weight.narrow(self.axis, 0, done))
        rest = sums.narrow(1 + self.axis, done, self.window[self.axis] - done).clone()
        alone = len(self.starts) == 1
        crop = (c if a != self.axis or alone else slice(None) for a, c in enumerate(self.crop))
        return finished[(slice(None), *crop)], rest

    def advance(self, number: int) -> None:
        """The weights of the next layer begin with what this one leaves."""
        assert self._weight is not None
        done = self._done(number)
        self.weight_carried = self._weight.narrow(self.axis, done, self.window[self.axis] - done).clone()
        self._weight = None

    def _done(self, number: int) -> int:
        """Slices of a layer that the next one does not reach; all of the last one."""
        if number + 1 == len(self.starts):
            return self.window[self.axis]
        return self.starts[number + 1] - self.starts[number]

    def _head(self, values: Tensor, slices: int, channels: int = 0) -> Tensor:
        return values.narrow(channels + self.axis, 0, slices)

    def _forward(self, network: nn.Module, number: int, inside: tuple[slice, ...]) -> Tensor:
        first = self.starts[number]
        place = [first + s.start if a == self.axis else s.start for a, s in enumerate(inside)]
        cut = tuple(slice(p, p + w) for p, w in zip(place, self.window, strict=True))
        half = autocast_type(self.ensemble.device)
        with (
            torch.inference_mode(),
            torch.autocast(self.ensemble.device.type, dtype=half or torch.bfloat16, enabled=half is not None),
            OneDNN(),
        ):
            logits: Tensor = network(self.image[(slice(None), *cut)][None])[0].float()
        return logits


@dataclass
class _Regrid:
    """Takes logits in slabs at the network's spacing and gives them in slabs on the stored grid (trilinear)."""

    axis: int
    size: tuple[int, ...]
    wanted: Triple
    done: int = 0
    _first: int = 0
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, last: bool) -> Tensor | None:
        """Slices of the stored grid that can be told now; None where there is none yet."""
        if self.size == self.wanted:
            self.done += logits.shape[1 + self.axis]
            return logits
        across = [n for a, n in enumerate(self.wanted)]
        across[self.axis] = logits.shape[1 + self.axis]
        flat = functional.interpolate(logits[None], size=across, mode="trilinear", align_corners=False)[0]
        self._kept = [torch.cat([*self._kept, flat], dim=1 + self.axis)]
        (held,) = self._kept
        known = self._first + held.shape[1 + self.axis]
        low, high, share = self._neighbours()
        ready = len(high) if last else int((high < known).sum())
        if ready <= self.done:
            return None
        chosen = slice(self.done, ready)
        weights = torch.tensor(share[chosen], dtype=held.dtype).view([-1 if a == self.axis else 1 for a in range(3)])
        below, above = (
            held.index_select(1 + self.axis, torch.tensor(index[chosen] - self._first)) for index in (low, high)
        )
        found = torch.lerp(below, above, weights.to(held))
        self.done = ready
        if not last:
            keep = int(low[ready]) - self._first
            self._kept = [held.narrow(1 + self.axis, keep, held.shape[1 + self.axis] - keep).clone()]
            self._first += keep
        return found

    def _neighbours(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each stored slice the two network slices around it and the share of the upper one."""
        n, wanted = self.size[self.axis], self.wanted[self.axis]
        place = np.maximum((np.arange(wanted) + 0.5) * n / wanted - 0.5, 0)
        low = np.minimum(place.astype(np.int64), n - 1)
        return low, np.minimum(low + 1, n - 1), np.clip(place - low, 0, 1)
