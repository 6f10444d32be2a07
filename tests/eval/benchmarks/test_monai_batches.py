# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.benchmarks.training import BUNDLE, monai_batches, monai_batches_alike
from lib.models.recipe import Bundle
from lib.partial_labels import UNLABELLED

SHAPE = (24, 20, 16)
BLOCK = (slice(8, 14), slice(6, 12), slice(4, 10))


@pytest.fixture(scope="module")
def recipe():
    return Bundle(BUNDLE).recipe({"patch": (16, 16, 16), "batch": 8, "mirror": [0]})


@pytest.fixture(scope="module")
def pool():
    """Images of 100 in a block of class 2 and of 50 in all other places, where the class is 0 or 1."""
    label_xyz = np.zeros(SHAPE, np.uint8)
    label_xyz[:4] = 1
    label_xyz[BLOCK] = 2
    return [np.where(label_xyz == 2, 100, 50).astype(np.float32)], [label_xyz]


def drawn(feed, recipe, pool):
    batches = feed(recipe, *pool, seed=3)
    images, labels = zip(*(batches() for _ in range(6)), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("feed", [monai_batches, monai_batches_alike])
def test_labels_go_with_their_images(recipe, pool, feed):
    images, labels = drawn(feed, recipe, pool)
    assert images.shape == labels.shape == (48, 1, 16, 16, 16)
    # Scaled by a quarter at most, the two grey values stay apart: 37.5 to 62.5, and from 75 on.
    for image, label in zip(images, labels, strict=True):
        values = [image[label == c] for c in (0, 1, 2)]
        others = torch.cat(values[:2])
        assert len(values[2]) == 0 or values[2].median() > 1.5 * others.median()


def test_outside_of_an_image_nothing_is_taught(recipe, pool):
    images, labels = drawn(monai_batches_alike, recipe, pool)
    assert set(torch.unique(labels).tolist()) == {0, 1, 2, UNLABELLED}
    # Voxels that a rotation uncovers are 0 there, before shift and noise of at most 0.25 and a few tenths.
    assert images[labels == UNLABELLED].median().abs() < 1
    # Voxels at the border are interpolated with voxels outside.
    assert (images[labels != UNLABELLED] > 30).float().mean() > 0.97


def test_left_as_it_is_outside_is_taught_as_what_lies_at_the_border(recipe, pool):
    images, labels = drawn(monai_batches, recipe, pool)
    assert set(torch.unique(labels).tolist()) == {0, 1, 2}
    assert images.min() > 30
