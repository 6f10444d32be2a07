# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Hand-crafted descriptors of regions, over which a first batch is spread while there is no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lib.models.preprocessing import normalise
from lib.regions import Box

COARSE = 4
PERCENTILES = (5, 25, 50, 75, 95)


def describe(image_xyz: NDArray[np.float32], boxes: Sequence[Box]) -> NDArray[np.float32]:
    """One vector a box, (N, 75): intensity statistics, strength of edges, place in the image, a 4 x 4 x 4 thumbnail.

    Intensities are normalised per image, so that scanners do not make clusters.
    """
    normalised = normalise(image_xyz)
    edges = ndimage.gaussian_gradient_magnitude(normalised, 1.0)
    shape = np.array(image_xyz.shape, dtype=np.float64)
    return np.array([_one(normalised, edges, shape, box) for box in boxes], dtype=np.float32).reshape(len(boxes), -1)


def _one(
    image: NDArray[np.float32], edges: NDArray[np.float32], shape: NDArray[np.float64], box: Box
) -> NDArray[np.float32]:
    start, size = box
    cut = tuple(slice(s, s + d) for s, d in zip(start, size, strict=True))
    values = image[cut]
    place = (np.array(start) + np.array(size) / 2) / shape
    thumbnail = ndimage.zoom(values, [COARSE / n for n in values.shape], order=1, grid_mode=True, mode="nearest")
    statistics = [values.mean(), values.std(), *np.percentile(values, PERCENTILES), edges[cut].mean()]
    # The thumbnail has 64 entries; divided by 8 it weighs as much as one statistic in a Euclidean distance.
    return np.concatenate([statistics, place, thumbnail.ravel() / np.sqrt(COARSE**3)])
