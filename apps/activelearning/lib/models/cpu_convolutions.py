# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Convolutions on a CPU another way than torch's own: where that is slow, and where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OneDNN(TorchFunctionMode):
    """Inside of the block, float32 convolutions (3D, without gradient) of a batch of one run through oneDNN on a CPU.

    For a batch of one with up to 20,480 values a channel plane torch falls back to an unrolled matrix product, which
    took 2 to 3 times as long for the networks of `bundles`. The results differ by rounding only.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv3d and not kwargs and len(args) == 7 and _suited(args[0]):
            image, weight, bias, stride, padding, dilation, groups = args
            if not isinstance(padding, str):
                return torch.ops.aten.mkldnn_convolution(
                    image, weight, bias, _triple(padding), _triple(stride), _triple(dilation), groups
                )
        return func(*args, **(kwargs or {}))


class FullWhereShort(TorchFunctionMode):
    """Inside of the block, convolutions whose kernel is longer than its image along an axis run in full precision.

    oneDNN's gradient of their bfloat16 weights reads and writes outside of its memory on CPUs with AVX-512 BF16 but
    without AMX (seen with torch 2.13 on AMD Zen 4: NaN, wrong values, a corrupted heap). The lowest level of a network
    with small crops is such an image, and its cost is negligible in either precision. For use under autocast on a CPU.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _CONVOLUTIONS and len(args) > 1 and _short(args[0], args[1]):
            image, weight, *rest = (a.float() if isinstance(a, Tensor) else a for a in args)
            with torch.autocast("cpu", enabled=False):
                return func(image, weight, *rest, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})


def _short(image: Tensor, weight: Tensor) -> bool:
    axes = weight.ndim - 2
    return any(size < kernel for size, kernel in zip(image.shape[-axes:], weight.shape[-axes:], strict=True))


def _suited(image: Tensor) -> bool:
    return (
        image.device.type == "cpu"
        and image.dtype == torch.float32
        and image.shape[0] == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _triple(value: int | Sequence[int]) -> list[int]:
    return [value] * 3 if isinstance(value, int) else list(value)
