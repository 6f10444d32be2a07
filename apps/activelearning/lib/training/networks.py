# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Network parts that MONAI does not have; bundles name them in `network_def`."""

from __future__ import annotations

from torch import Tensor, nn


class SpaceToDepth(nn.Module):
    """Runs `network` at 1/factor of the resolution, with every block of factor^3 voxels folded into channels.

    (B, C, X, Y, Z) -> (B, C f^3, X/f, Y/f, Z/f) -> network -> (B, K f^3, ...) -> (B, K, X, Y, Z). No voxel is lost,
    while the convolutions run over f^3 times fewer positions. factor 1 is the network itself.

    Args:
        factor: f; sizes of the input must be multiples of it.
        network: takes C f^3 channels and returns K f^3.
    """

    def __init__(self, factor: int, network: nn.Module) -> None:
        super().__init__()
        self.factor = factor
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        f = self.factor
        if f == 1:
            return self.network(image)
        b, c, x, y, z = image.shape
        folded = image.reshape(b, c, x // f, f, y // f, f, z // f, f).permute(0, 1, 3, 5, 7, 2, 4, 6)
        scores = self.network(folded.reshape(b, c * f**3, x // f, y // f, z // f))
        scores = scores.reshape(b, -1, f, f, f, x // f, y // f, z // f).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return scores.reshape(b, -1, x, y, z)
