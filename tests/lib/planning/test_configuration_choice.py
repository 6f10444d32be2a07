# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
import pytest

from lib.planning.configuration_choice import choose_configuration
from lib.planning.planner import make_plan
from tests.lib.planning.test_planner import AMOS, CPU, FETAL, GPU, HIPPOCAMPUS, pool


@pytest.mark.parametrize(
    ("shape", "spacing", "gpu", "cpu"),
    [
        ((35, 50, 36), (1, 1, 1), "3d_fullres", "3d_fullres"),
        ((220, 256, 10), (1.4, 1.4, 10), "2d", "2d"),
        ((10, 256, 220), (10, 1.4, 1.4), "2d", "2d"),
        ((300, 300, 31), (0.6, 0.6, 1.8), "2d", "2d"),
        ((300, 300, 32), (0.6, 0.6, 1.8), "3d_anisotropic", "2d"),
        ((60, 60, 32), (0.6, 0.6, 1.8), "3d_anisotropic", "3d_anisotropic"),
        ((300, 300, 12), (0.6, 0.6, 1.7), "3d_fullres", "2d"),
        ((135, 189, 155), (0.8, 0.8, 0.8), "3d_fullres", "2d"),
    ],
)
def test_the_configuration_follows_thickness_slices_and_the_share_that_a_crop_shows(shape, spacing, gpu, cpu):
    images = pool((3, shape, spacing))
    assert choose_configuration(images, GPU)[0] == gpu
    assert choose_configuration(images, CPU)[0] == cpu


def test_the_median_image_decides_and_the_reason_has_its_figures():
    found, why = choose_configuration(pool((3, (200, 200, 12), (1, 1, 8)), (1, (90, 90, 90), (1, 1, 1))), GPU)
    assert found == "2d"
    assert why.startswith("slices are 8.0 times as far apart as their voxels, and the median image has 12 of them")


@pytest.mark.parametrize("images", [HIPPOCAMPUS, AMOS, FETAL])
def test_a_cpu_takes_3d_only_where_a_crop_shows_a_quarter_without_a_coarser_spacing(images):
    found, why = choose_configuration(images, CPU)
    plan = make_plan(images, CPU)
    coarser = plan.why["spacing"].endswith("so that a crop shows more of an image")
    assert (found == "2d") is coarser
    assert ("a CPU trains in time would show" in why) is coarser
