# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib.models.cpu_convolutions import FullWhereShort, OneDNN
from lib.models.recipe import Bundle

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "segmentation_dynunet_3d"


@pytest.fixture
def called(monkeypatch):
    seen = []
    plain = torch.ops.aten.mkldnn_convolution

    def record(*args):
        seen.append(tuple(args[0].shape))
        return plain(*args)

    monkeypatch.setattr(torch.ops.aten, "mkldnn_convolution", record)
    return seen


def test_a_network_answers_the_same_through_the_other_way(called):
    torch.manual_seed(0)
    network, image = Bundle(BUNDLE).network(2).eval(), torch.randn(1, 1, 16, 24, 16)
    with torch.inference_mode():
        expected = network(image)
        assert not called
        with OneDNN():
            found = network(image)
    assert called
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_strides_paddings_dilations_and_groups_are_kept(called):
    image = torch.randn(1, 4, 9, 10, 11)
    for options in (
        {"stride": (2, 1, 1), "padding": (1, 0, 1), "kernel_size": (3, 1, 3)},
        {"dilation": 2, "padding": "same", "kernel_size": 3},
        {"groups": 2, "kernel_size": 2, "bias": False},
    ):
        layer = torch.nn.Conv3d(4, 6, **options)
        with torch.no_grad():
            expected = layer(image)
            with OneDNN():
                torch.testing.assert_close(layer(image), expected, atol=1e-5, rtol=1e-5)
    assert len(called) == 2  # padding given as a word stays with torch


def test_gradients_batches_and_other_types_stay_with_torch(called):
    layer = torch.nn.Conv3d(1, 2, 3)
    with OneDNN():
        layer(torch.randn(1, 1, 5, 5, 5)).sum().backward()
        with torch.no_grad():
            layer(torch.randn(2, 1, 5, 5, 5))
            layer.double()(torch.randn(1, 1, 5, 5, 5, dtype=torch.float64))
    assert not called
    assert layer.weight.grad is not None


def _gradient(layer, image, way, half):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), way:
        answer = layer(image)
    layer.zero_grad()
    dirty = [torch.full((size,), float("nan")) for size in (64, 1000, 4096, 10_000, 100_000) for _ in range(3)]
    del dirty  # the buffers of the gradient reuse the memory that is freed here
    answer.float().square().sum().backward()
    return answer.dtype, layer.weight.grad.clone()


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no native bf16")
@pytest.mark.parametrize(
    ("layer", "shape", "kept"),
    [
        (torch.nn.Conv3d(16, 16, 3, padding=1), (2, 2, 2), torch.float32),
        (torch.nn.Conv3d(16, 16, 3, padding=1), (2, 8, 8), torch.float32),
        (torch.nn.Conv3d(16, 16, 3, padding=1), (3, 4, 3), torch.bfloat16),
        (torch.nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1)), (1, 4, 4), torch.bfloat16),
        (torch.nn.Conv3d(16, 16, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 4, 1), torch.float32),
        (torch.nn.Conv2d(16, 16, 3, stride=2, padding=1), (6, 1), torch.float32),
        (torch.nn.Conv2d(16, 16, 3, stride=2, padding=1), (6, 5), torch.bfloat16),
    ],
)
def test_gradients_in_bfloat16_are_those_of_full_precision_up_to_rounding(layer, shape, kept):
    image = torch.randn(2, 16, *shape, generator=torch.Generator().manual_seed(0))
    _, expected = _gradient(layer, image, FullWhereShort(), half=False)
    for _ in range(5):
        dtype, found = _gradient(layer, image, FullWhereShort(), half=True)
        assert dtype == kept
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
