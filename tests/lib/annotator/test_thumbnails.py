# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import numpy as np

from lib.annotator.thumbnails import BOX_COLOUR, slice_axis, thumbnail


def test_the_slice_lies_across_the_thinnest_share():
    assert slice_axis((10, 10, 10), ((0, 0, 0), (10, 10, 1))) == 2
    assert slice_axis((10, 10, 10), ((0, 0, 0), (2, 10, 10))) == 0
    assert slice_axis((10, 10, 10), ((0, 0, 0), (4, 4, 4))) == 2


def test_the_box_is_outlined_where_it_is_on_image_and_map():
    image = np.zeros((300, 280, 5), np.float32)
    image[:, :, 2] = np.linspace(0, 1, 300)[:, None]
    score = np.zeros_like(image)
    score[200, 200, 2] = 2.0
    rgb = thumbnail(image, score, ((10, 20, 2), (130, 140, 1)))
    assert rgb.shape == (280, 300 + 4 + 300, 3)
    # x runs to the right, y upwards: row 279 - y, column x.
    for x0 in (0, 304):
        assert tuple(rgb[279 - 20, x0 + 10]) == BOX_COLOUR
        assert tuple(rgb[279 - 159, x0 + 139]) == BOX_COLOUR
        assert tuple(rgb[279 - 40, x0 + 10]) == BOX_COLOUR
        assert tuple(rgb[279 - 40, x0 + 20]) != BOX_COLOUR
        assert tuple(rgb[279 - 19, x0 + 10]) != BOX_COLOUR
    assert tuple(rgb[279 - 200, 304 + 200]) == (255, 255, 255)
    assert rgb[0, 299, 0] > rgb[0, 150, 0] >= rgb[0, 0, 0]


def test_small_images_are_enlarged_by_whole_factors():
    rgb = thumbnail(np.random.default_rng(0).normal(size=(36, 50, 35)).astype(np.float32), None, ((0, 0, 0), (8, 8, 8)))
    assert rgb.shape == (35 * 6, 36 * 6, 3)
