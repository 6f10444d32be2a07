# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Segmentations of large images in slabs equal those of whole arrays, with the rules for dropped components."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from lib.prediction.postprocessing import label_map
from lib.prediction.segmentation import segment
from tests.lib.prediction.test_tiled import ensemble_at, volume_of

# Windows of 16 every 8 voxels, where MONAI places them too.
SHAPE = (16, 24, 40)
LARGE = {"limit": 1, "working_bytes": 1 << 18}


def spoilt(ensemble):
    """Bars that some components of every class fail and others pass."""
    ensemble.confidence, ensemble.smallest_mm3, ensemble.single = 0.3, {1: 3.0, 3: 40.0}, frozenset({2})
    return ensemble


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize(("spacing", "mirrored"), [(None, ()), (1.25, ()), (None, (0, 1, 2))])
def test_slabs_give_what_the_whole_gives(tmp_path, rules, spacing, mirrored):
    ensemble, volume = ensemble_at([spacing] * 3 if spacing else None), volume_of(SHAPE)
    ensemble.mirrored = mirrored
    ensemble = spoilt(ensemble) if rules else ensemble
    mean_cxyz = ensemble.mean(volume)
    whole = label_map(mean_cxyz, ensemble.confidence, ensemble.smallest_voxels(volume.spacing), ensemble.single)
    if rules:
        assert 0 < np.count_nonzero(whole != mean_cxyz.argmax(0)) < whole.size
    found = segment(ensemble, volume, 4, tmp_path, **LARGE)
    assert found.dtype == np.uint8
    top = np.sort(mean_cxyz, axis=0)
    clear = top[-1] - top[-2] > 1e-3
    # Half precision and the order of sums only decide where two classes are as good as equal.
    differing = (found != whole) & clear
    assert clear.mean() > 0.9
    assert np.count_nonzero(differing) == 0 or (rules and np.count_nonzero(differing) <= 5)
    assert np.array_equal(segment(ensemble, volume, 4, tmp_path), whole)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_where_no_rule_needs_it(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("room was asked for")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    segment(ensemble_at(), volume_of(SHAPE), 4, tmp_path, **LARGE)
    with pytest.raises(AssertionError, match="room was asked for"):
        segment(spoilt(ensemble_at()), volume_of(SHAPE), 4, tmp_path, **LARGE)


def test_a_full_disk_is_an_error_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        segment(spoilt(ensemble_at()), volume_of(SHAPE), 4, tmp_path, **LARGE)
    assert list(tmp_path.iterdir()) == []


def test_mirror_images_change_what_slabs_give(tmp_path):
    plain = segment(ensemble_at(), volume_of(SHAPE), 4, tmp_path, **LARGE)
    ensemble = ensemble_at()
    ensemble.mirrored = (0,)
    assert np.count_nonzero(segment(ensemble, volume_of(SHAPE), 4, tmp_path, **LARGE) != plain) > 0
    assert np.array_equal(segment(ensemble, volume_of(SHAPE), 4, tmp_path, mirror=False, **LARGE), plain)


def test_mirror_images_are_left_out_of_the_whole_if_asked(tmp_path):
    plain = segment(ensemble_at(), volume_of(SHAPE), 4, tmp_path)
    ensemble = ensemble_at()
    ensemble.mirrored = (0,)
    assert np.count_nonzero(segment(ensemble, volume_of(SHAPE), 4, tmp_path) != plain) > 0
    assert np.array_equal(segment(ensemble, volume_of(SHAPE), 4, tmp_path, mirror=False), plain)
