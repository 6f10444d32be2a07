# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Layers of windows equal whole arrays, on disk and in memory, with one slab of every class in memory."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.ledger.queries import QueryLedger
from lib.models.checkpoints import Model
from lib.models.recipe import Bundle
from lib.prediction.moments_archive import ArchivedMoments
from lib.prediction.moments_cache import MomentsCache
from lib.prediction.posterior import DEEP_ENSEMBLE, Ensemble, PosteriorSpec
from lib.prediction.tiled import is_large, streamed_moments, window_starts
from lib.storage.volumes import ImageError, Volume
from lib.studies.datastore import PartialLabelDatastore
from lib.training.trainer import autocast_type
from lib.uncertainty import Moments, score_map_of
from tests.lib.models.facts import facts

BUNDLE = Bundle(Path(__file__).resolve().parents[3] / "bundles" / "segmentation_dynunet_3d")
PATCH = (16, 16, 16)
# Windows of 16 every 12 voxels fit exactly, so that MONAI places them where evenly spaced ones lie.
SHAPE = (16, 28, 40)


def ensemble_at(spacing=None, members=2):
    torch.manual_seed(0)
    networks = [BUNDLE.network(3, dropout=0.1) for _ in range(members)]
    # Equality holds in float32: the rounding of reduced precision depends on the number of windows per pass.
    return Ensemble(networks, PATCH, BUNDLE.divisor, spacing, torch.device("cpu"), precision="full")


def volume_of(shape):
    return Volume(np.random.default_rng(0).normal(size=shape).astype(np.float32), np.eye(4), "x.nii.gz")


def streamed(ensemble, volume, spec=DEEP_ENSEMBLE, seed=0, working_bytes=1 << 30):
    return streamed_moments(ensemble, volume, 0.25, spec, seed, 4, working_bytes)


def joined(slabs, shape):
    """Sum, spread and entropy of all slabs, put together; every voxel comes up once."""
    arrays = {"sum": np.zeros((4, *shape)), "spread": np.zeros((4, *shape)), "entropy": np.zeros(shape)}
    seen, boxes = np.zeros(shape, int), []
    for box, moments in slabs:
        here = tuple(slice(*ends) for ends in box)
        seen[here] += 1
        found = moments.to_arrays()
        assert found["count"] == 2
        for name, kept in arrays.items():
            kept[(..., *here)] = found[name]
        boxes.append(box)
    assert (seen == 1).all()
    return arrays, boxes


@pytest.mark.parametrize(
    ("size", "window", "overlap", "starts"),
    [
        (40, 16, 0.25, [0, 12, 24]),
        (41, 16, 0.25, [0, 8, 17, 25]),
        (16, 16, 0.25, [0]),
        (10, 16, 0.5, [0]),
        (17, 16, 0.9, [0, 1]),
    ],
)
def test_windows_are_evenly_spaced_and_overlap_enough(size, window, overlap, starts):
    assert window_starts(size, window, overlap) == starts


def test_what_counts_as_large():
    assert not is_large(3, (40, 56, 40))
    assert is_large(16, (512, 512, 600))
    assert is_large(2, (5, 5, 5), limit=999)
    assert not is_large(2, (5, 5, 5), limit=1000)


@pytest.mark.parametrize("working_bytes", [1 << 30, 1 << 18])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_layers_along_the_longest_axis_equal_the_whole(axes, working_bytes):
    ensemble, volume = ensemble_at(), volume_of(tuple(SHAPE[a] for a in axes))
    whole = Moments.from_members(ensemble.members(volume, 0.25)).to_arrays()
    found, boxes = joined(streamed(ensemble, volume, working_bytes=working_bytes), volume.shape)
    along = [box[axes.index(2)] for box in boxes]
    assert along[:3] == [(0, 12), (12, 24), (24, 40)]
    # A slice takes 4 x 4 x 16 x 28 bytes, and 16 + 3 x 12 + 3 x 5 of them are needed: 480 kB, so two stripes.
    assert len(boxes) == (3 if working_bytes == 1 << 30 else 6)
    for name, values in found.items():
        np.testing.assert_allclose(values, whole[name], atol=1e-5)


@pytest.mark.parametrize("working_bytes", [1 << 30, 1 << 18])
@pytest.mark.parametrize(("shape", "spacing"), [((12, 21, 30), 0.75), ((20, 35, 50), 1.25)])
def test_slabs_are_interpolated_to_the_stored_grid_without_seams(shape, spacing, working_bytes):
    ensemble, volume = ensemble_at([spacing] * 3), volume_of(shape)
    whole = Moments.from_members(ensemble.members(volume, 0.25)).to_arrays()
    found, boxes = joined(streamed(ensemble, volume, working_bytes=working_bytes), shape)
    assert len({box[1] for box in boxes}) == (1 if working_bytes == 1 << 30 else 2 if spacing < 1 else 4)
    for name, values in found.items():
        np.testing.assert_allclose(values, whole[name], atol=1e-5)


@pytest.mark.skipif(autocast_type(torch.device("cpu")) is None, reason="this CPU has no native bf16")
def test_reduced_precision_changes_no_more_than_its_rounding():
    ensemble, volume = ensemble_at(), volume_of(SHAPE)
    exact, _ = joined(streamed(ensemble, volume), SHAPE)
    ensemble.half = autocast_type(ensemble.device)
    rounded, _ = joined(streamed(ensemble, volume), SHAPE)
    assert 1e-5 < np.abs(rounded["sum"] - exact["sum"]).max() / 2 < 0.02


def test_an_image_smaller_than_the_window_on_one_axis_is_filled_up_and_cut_again():
    ensemble, volume = ensemble_at(), volume_of((9, 40, 52))
    whole = Moments.from_members(ensemble.members(volume, 0.25)).to_arrays()
    for working_bytes in (1 << 30, 1 << 18):
        found, _ = joined(streamed(ensemble, volume, working_bytes=working_bytes), volume.shape)
        for name, values in found.items():
            np.testing.assert_allclose(values, whole[name], atol=1e-5)


def test_dropout_is_drawn_from_the_seed_and_off_afterwards():
    ensemble, volume = ensemble_at(members=1), volume_of(SHAPE)
    spec = PosteriorSpec(passes=2, dropout=0.5)
    once, again, other = (joined(streamed(ensemble, volume, spec, seed), SHAPE)[0]["sum"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 1e-3
    assert not any(m.training for m in ensemble.networks[0].modules())


def test_views_of_a_large_image_are_refused_by_name():
    with pytest.raises(ImageError, match=r"x.nii.gz: the image is too large for test-time augmentation"):
        next(streamed(ensemble_at(), volume_of(SHAPE), PosteriorSpec(tta=True, flips=True)))


def test_the_cache_stores_large_images_in_slabs_and_gives_them_back(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.prediction.moments_cache.is_large", lambda classes, shape: (classes, shape) == (4, SHAPE))
    volume = volume_of(SHAPE)
    (tmp_path / "studies").mkdir()
    nib.save(nib.Nifti1Image(volume.array_xyz, volume.affine), tmp_path / "studies" / "a.nii.gz")
    ledger = QueryLedger(tmp_path / "ledger.sqlite")
    store = PartialLabelDatastore(tmp_path / "studies", {"one": 1, "two": 2, "three": 3}, ledger)
    model = Model(tmp_path, facts("d" * 64, classes={"one": 1, "two": 2, "three": 3}))
    cache, ensemble = MomentsCache(tmp_path / "moments", store.image_path, store.image_digest), ensemble_at()
    assert cache.fill(model, lambda: ensemble, store.digests(store.image_files()), lambda done, total: None) == 1
    found = cache.load(model, "a")
    assert isinstance(found, ArchivedMoments)
    whole = Moments.from_members(ensemble.members(volume, 0.25))
    np.testing.assert_allclose(score_map_of("bald", found), whole.mutual_information(), atol=2e-3)
    assert cache.fill(model, lambda: ensemble, store.digests(store.image_files()), lambda done, total: None) == 0
