# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Sources of predictions: ensemble members, dropout passes and augmented views, streamed one at a time."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from lib.models.cpu_convolutions import OneDNN
from lib.models.loss_head import LossHead, tapped
from lib.models.plan import Normalisation
from lib.models.precision import autocast_type
from lib.models.preprocessing import network_image, to_grid
from lib.models.vmapped import stacked
from lib.prediction.test_time_augmentation import View, flip, identity, moved, views
from lib.regions import Triple
from lib.storage.volumes import Volume

logger = logging.getLogger(__name__)

# An image up to this many times the training crop goes through the network whole: one window instead of overlapping
# ones, which for small scans saves most of the work.
WHOLE_IMAGE_FACTOR = 4.0


@dataclass(frozen=True)
class PosteriorSpec:
    """Which predictions a posterior is made of: a product of its factors.

    `ensemble` takes every member (otherwise the first), `passes` repeats each with dropout of rate `dropout`, and test
    time augmentation adds mirrored and turned views.
    """

    ensemble: bool = True
    passes: int = 0
    dropout: float = 0.0
    tta: bool = False
    flips: bool = False
    rotations: int = 0
    noise: float = 0.0

    @classmethod
    def of(cls, factors: Sequence[str], options: Mapping[str, Any]) -> PosteriorSpec:
        """From the factors of a method ("ensemble", "mc_dropout", "tta", "single") and its options."""
        dropout, tta = "mc_dropout" in factors, "tta" in factors
        return cls(
            ensemble="ensemble" in factors,
            passes=int(options["passes"]) if dropout else 0,
            dropout=float(options["dropout"]) if dropout else 0.0,
            tta=tta,
            flips=bool(options["flips"]) if tta else False,
            rotations=int(options["rotations"]) if tta else 0,
            noise=float(options["noise"]) if tta else 0.0,
        )


DEEP_ENSEMBLE = PosteriorSpec()


class Ensemble:
    """Members of one training and how images are put through them.

    Args:
        networks: the members, on any device.
        patch: crop of the training; the window of larger images.
        divisor: sizes of an input must be multiples of it.
        spacing: spacing in mm of the networks' input. None for the spacing of each image.
        device: device of the networks.
        heads, taps: of members trained to predict their loss, one per member, and the layers they read.
        normalisation: of intensities. None is the z-score of each image.
        mirrored: axes along which segmentations also average the prediction of the mirror image.
        shifts: number of predictions averaged by segmentations of an image without windows. Each one has the networks'
            grid one voxel further along each axis. Overlapping windows lie differently on the grid anyway.
        confidence: mean probability that a component needs to be shown (`lib.prediction.postprocessing`).
        smallest_mm3: class value -> volume in mm^3. Smaller components of the class are not shown.
        single: values of classes shown as one component, 0 for all foreground together.
        precision: "native" for reduced precision if the device supports it, "full" for float32.

    The caller must hold `lock` to run the networks: hooks, dropout and modes of a network are shared by all threads.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        patch: Triple,
        divisor: Triple,
        spacing: Sequence[float] | None,
        device: torch.device,
        heads: Sequence[LossHead] = (),
        taps: Sequence[str] = (),
        normalisation: Normalisation | None = None,
        mirrored: Sequence[int] = (),
        confidence: float = 0.0,
        smallest_mm3: Mapping[int, float] | None = None,
        precision: str = "native",
        shifts: int = 1,
        single: Collection[int] = (),
    ) -> None:
        self.half = autocast_type(device, precision)
        self.confidence = confidence
        self.smallest_mm3 = dict(smallest_mm3 or {})
        self.single = frozenset(single)
        self.lock = threading.Lock()
        self.heads = [head.to(device).eval() for head in heads]
        self.taps = list(taps)
        self.networks = [network.to(device).eval() for network in networks]
        self.patch = patch
        self.divisor = divisor
        self.spacing = spacing
        self.device = device
        self.normalisation = normalisation or Normalisation()
        self.mirrored = tuple(mirrored)
        self.shifts = shifts
        # A CPU gains nothing (`lib.models.vmapped`).
        self.batched = device.type == "cuda"
        self._together: Callable[[Tensor], Tensor] | None = None

    def members(
        self, volume: Volume, overlap: float = 0.25, spec: PosteriorSpec = DEEP_ENSEMBLE, seed: int = 0
    ) -> Iterator[Tensor]:
        """Softmax probabilities (C, X, Y, Z) of each prediction of the posterior, on the stored grid of the image.

        Sliding window with Gaussian weights; `overlap` 0.25 is nnActive's tile step of 0.75 for queries. Dropout and
        views are drawn from `seed`; every network sees the same views. They stay on the device, so that moments can be
        summed up there.
        """
        image = network_image(volume, self.spacing, self.normalisation).to(self.device)
        if spec.ensemble and not spec.passes and not spec.tta:
            for logits in self._logits_of_all(image, overlap):
                yield torch.softmax(to_grid(logits, volume.shape), dim=0)
            return
        for number, network in enumerate(self.networks if spec.ensemble else self.networks[:1]):
            for pass_ in range(max(1, spec.passes)):
                with dropout(network, spec.dropout if spec.passes else None, seed + 1000 * number + pass_):
                    yield from self._views(network, image, volume.shape, overlap, spec, seed)

    def _views(
        self, network: nn.Module, image: Tensor, shape: Triple, overlap: float, spec: PosteriorSpec, seed: int
    ) -> Iterator[Tensor]:
        rng = np.random.default_rng(seed)
        chosen: Sequence[View] = list(views(spec.flips, spec.rotations, spec.noise, rng)) if spec.tta else [identity()]
        plain: Tensor | None = None
        for view in chosen:
            logits, kept = view.inverse(self._logits(network, view.forward(image), overlap))
            probs = torch.softmax(to_grid(logits, shape), dim=0)
            plain = probs if plain is None else plain
            if kept is not None:
                # Voxels outside of a view have no prediction of it, so the prediction of the image itself is repeated
                # there.
                seen = to_grid(kept[None].float(), shape)[0] > 0.5
                probs = torch.where(seen, probs, plain)
            yield probs

    def mean(self, volume: Volume, overlap: float = 0.5, mirrored: bool = True) -> NDArray[np.float32]:
        """Mean of the members' probabilities (C, X, Y, Z), over shifts and, if requested, mirror images."""
        image = network_image(volume, self.spacing, self.normalisation).to(self.device)
        chosen = [identity(), *(flip(axis) for axis in self.mirrored if mirrored)]
        moves = self._moves(image.shape[1:])
        total = torch.zeros(())
        for view in chosen:
            for move in moves:
                for found in self._logits_of_all(move.forward(view.forward(image)), overlap):
                    logits, _ = view.inverse(move.inverse(found)[0])
                    total = total + torch.softmax(to_grid(logits, volume.shape), dim=0)
        count = len(self.networks) * len(chosen) * len(moves)
        return cast("NDArray[np.float32]", (total / count).cpu().numpy())

    def _moves(self, shape: Sequence[int]) -> list[View]:
        whole = all(w >= n for w, n in zip(self.window(shape), shape, strict=True))
        if self.shifts == 1 or not whole:
            return [identity()]
        return [moved(by, shape, self.divisor) for by in range(self.shifts)]

    def smallest_voxels(self, spacing: Sequence[float]) -> dict[int, float]:
        """Class value -> voxels of `spacing` mm that a component needs."""
        return {value: mm3 / float(np.prod(spacing)) for value, mm3 in self.smallest_mm3.items() if mm3}

    def learning_loss(self, volume: Volume) -> NDArray[np.float32] | None:
        """Predicted loss (X, Y, Z) on the stored grid, never negative; None for members without a head.

        Each window of half the training crop gets softplus of its predicted loss; overlapping windows are averaged with
        Gaussian weights, members equally.

        Source: Yoo & Kweon 2019; Gaillochet et al. 2023. The published score is one number per image; windows
        make it a map, so that every unit can be ranked by it.
        """
        if not self.heads:
            return None
        image = network_image(volume, self.spacing, self.normalisation).to(self.device)
        whole = self._whole(image.shape[1:])
        half = (max(2, math.ceil(p / 2 / d)) * d for p, d in zip(self.patch, self.divisor, strict=True))
        window = tuple(min(a, b) for a, b in zip(half, whole, strict=True))
        total = torch.zeros(volume.shape)
        for network, head in zip(self.networks, self.heads, strict=True):
            predictor = partial(_predicted_loss, network, head, self.taps)
            with torch.inference_mode():
                found = sliding_window_inference(image[None], window, 4, predictor, overlap=0.5, mode="gaussian")
            assert isinstance(found, Tensor)
            total += to_grid(found[0].float().cpu(), volume.shape)[0]
        return cast("NDArray[np.float32]", (total / len(self.heads)).numpy())

    def window(self, shape: Sequence[int]) -> Triple:
        """Input size for an image of `shape`: all of it, rounded up to the divisor, where that is small enough."""
        whole = self._whole(shape)
        if math.prod(whole) <= WHOLE_IMAGE_FACTOR * math.prod(self.patch):
            return whole
        return cast(Triple, tuple(min(p, w) for p, w in zip(self.patch, whole, strict=True)))

    def _whole(self, shape: Sequence[int]) -> Triple:
        """`shape` rounded up to the divisor, and to two voxels at the bottleneck where it would be one.

        An instance norm divides by a deviation, which one voxel has not. Axes of a crop with several voxels there are
        padded, as the network has been trained on them.
        """
        whole = [math.ceil(n / d) * d for n, d in zip(shape, self.divisor, strict=True)]
        if tuple(whole) == tuple(self.divisor):
            whole = [2 * d if p > d else d for d, p in zip(self.divisor, self.patch, strict=True)]
        if tuple(whole) == tuple(self.divisor):
            whole[0] *= 2
        return whole[0], whole[1], whole[2]

    def _logits_of_all(self, image_cxyz: Tensor, overlap: float) -> Iterator[Tensor]:
        """Logits (C, X, Y, Z) of every network; after the first from one pass, where `batched` and room allow it."""
        first, others = self.networks[0], self.networks[1:]
        logits = self._logits(first, image_cxyz, overlap)
        yield logits
        if self.batched and len(others) > 1 and self._has_room(len(others) * logits.nbytes):
            try:
                self._together = self._together or stacked(others)
                yield from self._logits(self._together, image_cxyz, overlap).chunk(len(others))
                return
            except RuntimeError as error:
                logger.warning("members run one after the other, as they cannot run together: %s", error)
                self.batched, self._together = False, None
        for network in others:
            yield self._logits(network, image_cxyz, overlap)

    def _has_room(self, size: int) -> bool:
        """Return whether logits of `size` bytes fill at most a quarter of the GPU's free memory."""
        return self.device.type != "cuda" or size <= torch.cuda.mem_get_info(self.device)[0] // 4

    def _logits(self, network: Callable[[Tensor], Tensor], image_cxyz: Tensor, overlap: float) -> Tensor:
        window = self.window(image_cxyz.shape[1:])
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None),
            OneDNN(),
        ):
            logits = sliding_window_inference(
                image_cxyz[None], window, sw_batch_size=4, predictor=network, overlap=overlap, mode="gaussian"
            )
        assert isinstance(logits, Tensor)
        return logits[0].float()


@contextmanager
def dropout(network: nn.Module, rate: float | None, seed: int) -> Iterator[None]:
    """Dropout switched on at `rate` inside of the block, drawn from `seed`; None changes nothing."""
    layers = [m for m in network.modules() if isinstance(m, nn.Dropout | nn.Dropout2d | nn.Dropout3d)]
    if rate is None:
        yield
        return
    before = [layer.p for layer in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            layer.p = rate
            layer.train()
        try:
            yield
        finally:
            for layer, p in zip(layers, before, strict=True):
                layer.p = p
                layer.eval()


def _predicted_loss(network: nn.Module, head: LossHead, taps: Sequence[str], windows: Tensor) -> Tensor:
    """Predicted loss of each window, spread over its voxels: (B, 1, X, Y, Z)."""
    with tapped(network, taps) as activations:
        network(windows)
        predicted = torch.nn.functional.softplus(head(activations))
    return predicted[:, None, None, None, None].expand(-1, 1, *windows.shape[2:]).contiguous()
