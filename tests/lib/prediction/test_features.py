# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lib.models.recipe import Bundle
from lib.prediction.features import bottleneck_features, gradient_embeddings
from lib.prediction.intensity_features import describe
from lib.prediction.posterior import Ensemble, PosteriorSpec
from lib.prediction.test_time_augmentation import flip, identity, moved, rotate, rotation, views
from lib.storage.volumes import Volume

BUNDLE = Bundle(Path(__file__).resolve().parents[3] / "bundles" / "segmentation_dynunet_3d")
CPU = torch.device("cpu")
BOXES = [((0, 0, 0), (16, 16, 16)), ((4, 6, 2), (16, 16, 16)), ((2, 3, 1), (16, 16, 16))]


@pytest.fixture(scope="module")
def ensemble():
    torch.manual_seed(0)
    networks = [BUNDLE.network(2, dropout=0.1) for _ in range(2)]
    return Ensemble(networks, (16, 16, 16), BUNDLE.divisor, None, CPU)


@pytest.fixture(scope="module")
def volume():
    return Volume(np.random.default_rng(0).normal(size=(20, 22, 18)).astype(np.float32), np.eye(4), "x")


@pytest.fixture(scope="module")
def golden(reference):
    return np.load(reference / "stochastic_batches/rotation.npz")


@pytest.mark.parametrize(("name", "degrees"), [("rot_plus10", 10), ("rot_minus7", -7)])
def test_rotation_is_the_published_one(golden, name, degrees):
    planes = torch.tensor(golden["x"])
    expected = golden[name]
    flat = planes.reshape(-1, *planes.shape[-2:])
    ours = rotate(flat.permute(1, 2, 0)[None], degrees)[0].permute(2, 0, 1).reshape(planes.shape)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


def test_views_and_their_inverses():
    image = torch.arange(2 * 5 * 6 * 3, dtype=torch.float32).reshape(2, 5, 6, 3)
    for view in (identity(), flip(0), flip(1), flip(2)):
        back, kept = view.inverse(view.forward(image))
        assert torch.equal(back, image)
        assert kept is None
    shifted = moved(3, (5, 6, 3), (4, 2, 1))
    assert shifted.forward(image).shape == (2, 8, 10, 6)
    assert torch.equal(shifted.forward(image)[:, 3:, 3:-1, 3:], image)
    assert float(shifted.forward(image).sum()) == float(image.sum())
    assert torch.equal(shifted.inverse(shifted.forward(image))[0], image)
    still = rotation(0, 0.0, 1)
    back, kept = still.inverse(still.forward(image))
    assert torch.equal(back, image)
    assert kept.all()
    turned = rotation(10, 0.0, 1)
    back, kept = turned.inverse(torch.ones(1, 21, 21, 2))
    assert not kept[0, 0].any()
    assert kept[10, 10].all()
    assert len(list(views(True, 7, 0.01, np.random.default_rng(0)))) == 11


def members(networks, volume, seed=0, **spec):
    return list(networks.members(volume, 0.25, PosteriorSpec(**spec), seed))


def test_a_posterior_is_the_product_of_its_factors(ensemble, volume):
    plain = members(ensemble, volume)
    assert len(plain) == 2
    assert len(members(ensemble, volume, ensemble=False)) == 1
    assert len(members(ensemble, volume, passes=3, dropout=0.5)) == 6
    assert len(members(ensemble, volume, ensemble=False, tta=True, flips=True, rotations=2, noise=0.01)) == 6
    for probs in members(ensemble, volume, ensemble=False, tta=True, rotations=2, noise=0.01):
        np.testing.assert_allclose(probs.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(members(ensemble, volume, tta=True, flips=True)[0], plain[0])


def test_dropout_differs_by_pass_not_by_call_and_is_off_afterwards(ensemble, volume):
    before = members(ensemble, volume)
    state = torch.get_rng_state()
    first, again = (members(ensemble, volume, ensemble=False, passes=2, dropout=0.5, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 1e-3
    assert np.abs(first[0] - before[0]).max() > 1e-3
    np.testing.assert_array_equal(members(ensemble, volume), before)


def test_features_are_those_of_each_crop_alone(ensemble, volume):
    together = bottleneck_features(ensemble, "network.bottleneck", volume, BOXES)
    assert together.shape == (3, 2 * 96)
    for row, box in zip(together, BOXES, strict=True):
        alone = bottleneck_features(ensemble, "network.bottleneck", volume, [box])
        np.testing.assert_allclose(alone[0], row, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4


def test_gradients_are_those_of_autograd(ensemble, volume):
    layer = "network.upsamples.1.conv_block.conv2.conv"
    together = gradient_embeddings(ensemble, [layer], volume, BOXES)
    network = ensemble.networks[0]
    from lib.models.preprocessing import normalise

    image = torch.from_numpy(normalise(volume.array_xyz))[None, None]
    for row, (start, size) in zip(together, BOXES, strict=True):
        cut = image[(slice(None), slice(None), *(slice(s, s + d) for s, d in zip(start, size, strict=True)))]
        network.zero_grad()
        torch.log_softmax(network(cut), 1).amax(1).mean().backward()
        expected = network.get_submodule(layer).weight.grad.flatten().numpy()
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_no_region_has_no_features(ensemble, volume):
    assert bottleneck_features(ensemble, "network.bottleneck", volume, []).shape[0] == 0
    assert gradient_embeddings(ensemble, ["network.bottleneck.conv2.conv"], volume, []).shape == (0, 96 * 96 * 27)


def test_descriptors_tell_regions_apart_and_ignore_the_scale_of_intensities(volume):
    described = describe(volume.array_xyz, BOXES)
    assert described.shape == (3, 75)
    np.testing.assert_allclose(describe(volume.array_xyz * 1000 + 5, BOXES), described, atol=1e-3)
    assert np.abs(described[0] - described[1]).max() > 0.1
    np.testing.assert_allclose(described[1][8:11], [(4 + 8) / 20, (6 + 8) / 22, (2 + 8) / 18], atol=1e-6)
    thin = describe(volume.array_xyz, [((0, 0, 3), (20, 22, 1))])
    assert thin.shape == (1, 75)


def test_the_mean_takes_in_mirror_images(ensemble):
    both = Ensemble(ensemble.networks, ensemble.patch, ensemble.divisor, None, CPU, mirrored=(0, 2))
    volume = Volume(np.random.default_rng(3).normal(size=(16, 16, 16)).astype(np.float32), np.eye(4), "a")
    views = []
    for axis in (None, 0, 2):
        turned = volume.array_xyz if axis is None else np.flip(volume.array_xyz, axis).copy()
        probs = ensemble.mean(Volume(turned, np.eye(4), "a"))
        views.append(probs if axis is None else np.flip(probs, axis + 1))
    np.testing.assert_allclose(both.mean(volume), np.mean(views, axis=0), atol=1e-5)


class OnTheGrid(torch.nn.Module):
    """Sure of class 1 where the first axis of its input is a multiple of 4, and of background elsewhere."""

    def forward(self, image):
        logits = torch.full((image.shape[0], 2, *image.shape[2:]), -50.0)
        logits[:, 0] = 50.0
        logits[:, 0, ::4], logits[:, 1, ::4] = -50.0, 50.0
        return logits


def test_the_mean_takes_in_shifts_of_the_grid():
    volume = Volume(np.zeros((9, 8, 7), np.float32), np.eye(4), "a")
    ensemble = Ensemble([OnTheGrid()], (16, 16, 16), (4, 4, 4), None, CPU, shifts=2)
    # Without a shift x = 0, 4, 8 lie on the grid, with one the voxels before: x = 3 and 7.
    expected = np.array([0.5, 0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5], np.float32)
    np.testing.assert_allclose(ensemble.mean(volume)[1], np.broadcast_to(expected[:, None, None], (9, 8, 7)), atol=1e-6)
    ensemble.shifts = 4
    expected = np.full(9, 0.25, np.float32)
    np.testing.assert_allclose(ensemble.mean(volume)[1], np.broadcast_to(expected[:, None, None], (9, 8, 7)), atol=1e-6)


def test_shifts_and_mirror_images_are_combined():
    volume = Volume(np.zeros((9, 8, 7), np.float32), np.eye(4), "a")
    ensemble = Ensemble([OnTheGrid()], (16, 16, 16), (4, 4, 4), None, CPU, mirrored=(0,), shifts=2)
    once = np.array([0.5, 0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5])
    np.testing.assert_allclose(ensemble.mean(volume)[1, :, 0, 0], (once + once[::-1]) / 2, atol=1e-6)
    np.testing.assert_allclose(ensemble.mean(volume, mirrored=False)[1, :, 0, 0], once, atol=1e-6)


def test_an_image_that_goes_through_in_windows_is_not_shifted():
    volume = Volume(np.random.default_rng(4).normal(size=(40, 8, 8)).astype(np.float32), np.eye(4), "a")
    once = Ensemble([OnTheGrid()], (8, 8, 8), (4, 4, 4), None, CPU)
    assert once.window(volume.shape) == (8, 8, 8)
    shifted = Ensemble([OnTheGrid()], (8, 8, 8), (4, 4, 4), None, CPU, shifts=2)
    np.testing.assert_array_equal(shifted.mean(volume), once.mean(volume))
