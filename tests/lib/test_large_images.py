# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Layers of windows give what whole arrays give, on disk and off it, with one slab of every class in memory."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.datastore import PartialLabelDatastore
from lib.images import ImageError, Volume
from lib.large_images import is_large, streamed_moments, window_starts
from lib.ledger import QueryLedger
from lib.models import Model
from lib.moments_cache import MomentsCache
from lib.posterior import DEEP_ENSEMBLE, Ensemble, PosteriorSpec
from lib.slabs import SlabbedMoments, has_slabs, save_slabs
from lib.training.recipe import Bundle
from lib.uncertainty import UNCERTAINTIES, Moments, score_map_of

BUNDLE = Bundle(Path(__file__).resolve().parents[2] / "bundles" / "segmentation_dynunet_3d")
PATCH = (16, 16, 16)
# Windows of 16 every 12 voxels fit exactly, so that MONAI places them where evenly spaced ones lie.
SHAPE = (16, 28, 40)


def ensemble_at(spacing=None, members=2):
    torch.manual_seed(0)
    networks = [BUNDLE.network(3, dropout=0.1) for _ in range(members)]
    return Ensemble(networks, PATCH, BUNDLE.divisor, spacing, torch.device("cpu"))


def volume_of(shape):
    return Volume(np.random.default_rng(0).normal(size=shape).astype(np.float32), np.eye(4), "x.nii.gz")


def joined(slabs, shape):
    """Sum, spread and entropy of all slabs, put together, and how thick each slab was."""
    sums, spread = np.full((4, *shape), np.nan), np.full((4, *shape), np.nan)
    entropy, thickness, at = np.full(shape, np.nan), [], 0
    for axis, start, moments in slabs:
        assert start == at
        n = moments.shape[1 + axis]
        here = tuple(slice(at, at + n) if a == axis else slice(None) for a in range(3))
        arrays = moments.to_arrays()
        assert arrays["count"] == 2
        entropy[here] = arrays["entropy"]
        for kept, name in ((sums, "sum"), (spread, "spread")):
            kept[(slice(None), *here)] = arrays[name]
        thickness.append(n)
        at += n
    return sums, spread, entropy, thickness


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


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_layers_along_the_longest_axis_equal_the_whole(axes):
    ensemble, volume = ensemble_at(), volume_of(tuple(SHAPE[a] for a in axes))
    whole = Moments.from_members(ensemble.members(volume, 0.25)).to_arrays()
    sums, spread, entropy, thickness = joined(streamed_moments(ensemble, volume, 0.25, DEEP_ENSEMBLE, 0), volume.shape)
    assert thickness == [12, 12, 16]
    np.testing.assert_allclose(sums, whole["sum"], atol=1e-5)
    np.testing.assert_allclose(spread, whole["spread"], atol=1e-5)
    np.testing.assert_allclose(entropy, whole["entropy"], atol=1e-5)


@pytest.mark.parametrize(("shape", "spacing"), [((12, 21, 30), 0.75), ((20, 35, 50), 1.25)])
def test_slabs_are_interpolated_to_the_stored_grid_without_seams(shape, spacing):
    ensemble, volume = ensemble_at([spacing] * 3), volume_of(shape)
    whole = Moments.from_members(ensemble.members(volume, 0.25)).to_arrays()
    sums, _, entropy, thickness = joined(streamed_moments(ensemble, volume, 0.25, DEEP_ENSEMBLE, 0), shape)
    assert sum(thickness) == shape[2]
    np.testing.assert_allclose(sums, whole["sum"], atol=1e-5)
    np.testing.assert_allclose(entropy, whole["entropy"], atol=1e-5)


def test_an_image_smaller_than_the_window_on_one_axis_is_filled_up_and_cut_again():
    ensemble, volume = ensemble_at(), volume_of((9, 40, 52))
    sums, _, entropy, _ = joined(streamed_moments(ensemble, volume, 0.25, DEEP_ENSEMBLE, 0), volume.shape)
    np.testing.assert_allclose(sums.sum(axis=0), 2, atol=1e-5)
    whole = Moments.from_members(ensemble.members(volume, 0.25)).to_arrays()
    np.testing.assert_allclose(entropy, whole["entropy"], atol=1e-5)


def test_dropout_is_drawn_from_the_seed_and_off_afterwards():
    ensemble, volume = ensemble_at(members=1), volume_of(SHAPE)
    spec = PosteriorSpec(passes=2, dropout=0.5)
    once, again, other = (joined(streamed_moments(ensemble, volume, 0.25, spec, seed), SHAPE)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 1e-3
    assert not any(m.training for m in ensemble.networks[0].modules())


def test_views_of_a_large_image_are_refused_by_name():
    with pytest.raises(ImageError, match=r"x.nii.gz: the image is too large for test-time augmentation"):
        next(streamed_moments(ensemble_at(), volume_of(SHAPE), 0.25, PosteriorSpec(tta=True, flips=True), 0))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A large image's moments on disk, and the same in memory."""
    ensemble, volume = ensemble_at(), volume_of(SHAPE)
    stream = BytesIO()
    loss = np.random.default_rng(1).random(SHAPE).astype(np.float32)
    save_slabs(streamed_moments(ensemble, volume, 0.25, DEEP_ENSEMBLE, 0), loss, stream)
    path = tmp_path_factory.mktemp("slabs") / "x.npz"
    path.write_bytes(stream.getvalue())
    moments = Moments.from_members(ensemble.members(volume, 0.25))
    moments.loss = loss
    return SlabbedMoments(path), moments


@pytest.mark.parametrize("name", [*UNCERTAINTIES, "learning_loss"])
def test_every_map_from_disk_equals_the_one_from_memory(stored, name):
    on_disk, in_memory = stored
    np.testing.assert_allclose(score_map_of(name, on_disk), score_map_of(name, in_memory), rtol=2e-3, atol=2e-3)


def test_classes_from_disk_equal_those_from_memory(stored):
    on_disk, in_memory = stored
    assert (on_disk.shape, on_disk.count) == ((4, *SHAPE), 2)
    clear = np.sort(in_memory.mean, axis=0)
    clear = clear[-1] - clear[-2] > 1e-3
    assert clear.mean() > 0.9
    assert np.array_equal(on_disk.predicted()[clear], in_memory.predicted()[clear])
    np.testing.assert_allclose(on_disk.mean_of(2), in_memory.mean_of(2), atol=1e-3)
    for box in ((slice(0, 16), slice(3, 9), slice(5, 30)), (slice(2, 4), slice(0, 28), slice(24, 40))):
        shares = on_disk.predicted_fractions(box)
        np.testing.assert_allclose(shares, np.bincount(on_disk.predicted()[box].ravel(), minlength=4) / shares_of(box))
        np.testing.assert_allclose(shares, in_memory.predicted_fractions(box), atol=0.02)


def shares_of(box):
    return np.prod([s.stop - s.start for s in box])


def test_archives_of_both_kinds_are_told_apart(stored, tmp_path):
    np.savez(tmp_path / "plain.npz", sum=np.zeros(3))
    assert has_slabs(stored[0].path)
    assert not has_slabs(tmp_path / "plain.npz")


def test_the_cache_stores_large_images_in_slabs_and_gives_them_back(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.moments_cache.is_large", lambda classes, shape: (classes, shape) == (4, SHAPE))
    volume = volume_of(SHAPE)
    (tmp_path / "studies").mkdir()
    nib.save(nib.Nifti1Image(volume.array_xyz, volume.affine), tmp_path / "studies" / "a.nii.gz")
    ledger = QueryLedger(tmp_path / "ledger.sqlite")
    store = PartialLabelDatastore(tmp_path / "studies", {"one": 1, "two": 2, "three": 3}, ledger)
    model = Model("d" * 64, tmp_path, {"round": 0, "classes": ["one", "two", "three"]})
    cache, ensemble = MomentsCache(tmp_path / "moments", store), ensemble_at()
    assert cache.fill(model, lambda: ensemble, store.digests(store.image_files()), lambda done, total: None) == 1
    found = cache.load(model, "a")
    assert isinstance(found, SlabbedMoments)
    whole = Moments.from_members(ensemble.members(volume, 0.25))
    np.testing.assert_allclose(score_map_of("bald", found), whole.mutual_information(), atol=2e-3)
    assert cache.fill(model, lambda: ensemble, store.digests(store.image_files()), lambda done, total: None) == 0
