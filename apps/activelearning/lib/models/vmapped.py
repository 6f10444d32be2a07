# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Several networks of one shape in a single pass, for devices that small networks keep waiting for launches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state


def stacked(networks: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """f(images (B, 1, X, Y, Z)) -> logits (B, M C, X, Y, Z) of all M networks, those of the first network first.

    Their weights are stacked and the pass is mapped over them, so M convolutions become one with M groups. It is not
    faster on a CPU.

    Raises:
        RuntimeError: from the returned function, for networks whose operations cannot be mapped.
    """
    weights, buffers = stack_module_state(list(networks))
    shape = copy.deepcopy(networks[0]).to("meta")

    def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(shape, (weights, buffers), (images,))
        return logits

    def run(images: Tensor) -> Tensor:
        logits_mbcxyz = torch.vmap(one, in_dims=(0, 0, None))(weights, buffers, images)
        return logits_mbcxyz.movedim(0, 1).flatten(1, 2)

    return run
