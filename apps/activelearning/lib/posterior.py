# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Who predicts: an ensemble of networks whose members' class probabilities are streamed, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from lib.images import Volume
from lib.regions import Triple
from lib.training.cases import network_image, to_grid
from lib.training.trainer import autocast_type

# An image up to this many times the training crop goes through the network whole: one window instead of overlapping
# ones, which for small scans saves most of the work.
WHOLE_IMAGE_FACTOR = 4.0


class Ensemble:
    """Members of one training and how images are put through them.

    Args:
        networks: the members, on any device.
        patch: crop of the training; the window of larger images.
        divisor: sizes of an input must be multiples of it.
        spacing: spacing in mm the networks work at; None for the spacing of each image.
        device: where the networks run.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        patch: Triple,
        divisor: Triple,
        spacing: Sequence[float] | None,
        device: torch.device,
    ) -> None:
        self.networks = [network.to(device).eval() for network in networks]
        self.patch = patch
        self.divisor = divisor
        self.spacing = spacing
        self.device = device

    def members(self, volume: Volume, overlap: float = 0.25) -> Iterator[NDArray[np.float32]]:
        """Softmax probabilities (C, X, Y, Z) of each member on the stored grid of the image.

        Sliding window with Gaussian weights; `overlap` 0.25 is nnActive's tile step of 0.75 for queries.
        """
        image = network_image(volume, self.spacing).to(self.device)
        for network in self.networks:
            probs = torch.softmax(to_grid(self._logits(network, image, overlap), volume.shape), dim=0)
            yield probs.cpu().numpy()

    def mean(self, volume: Volume, overlap: float = 0.5) -> NDArray[np.float32]:
        """Mean of the members' probabilities (C, X, Y, Z)."""
        total: NDArray[np.float32] | None = None
        for probs in self.members(volume, overlap):
            total = probs if total is None else total + probs
        assert total is not None, "an ensemble has at least one member"
        return total / np.float32(len(self.networks))

    def window(self, shape: Sequence[int]) -> Triple:
        """Input size for an image of `shape`: all of it, rounded up to the divisor, where that is small enough."""
        whole = tuple(math.ceil(n / d) * d for n, d in zip(shape, self.divisor, strict=True))
        if math.prod(whole) <= WHOLE_IMAGE_FACTOR * math.prod(self.patch):
            return cast(Triple, whole)
        return cast(Triple, tuple(min(p, w) for p, w in zip(self.patch, whole, strict=True)))

    def _logits(self, network: nn.Module, image_cxyz: Tensor, overlap: float) -> Tensor:
        half = autocast_type(self.device)
        window = self.window(image_cxyz.shape[1:])
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=half or torch.bfloat16, enabled=half is not None),
        ):
            logits = sliding_window_inference(
                image_cxyz[None], window, sw_batch_size=4, predictor=network, overlap=overlap, mode="gaussian"
            )
        assert isinstance(logits, Tensor)
        return logits[0].float()
