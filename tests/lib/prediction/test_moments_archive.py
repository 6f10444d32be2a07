# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""One contract for moments in memory and in an archive, and the same picks of every method from both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.prediction.moments_archive import ArchivedMoments, has_slabs, save_slabs
from lib.prediction.tiled import Slab
from lib.querying.registry import REGISTRY
from lib.uncertainty import UNCERTAINTIES, Moments, PosteriorMoments, score_map_of
from tests.lib.querying.test_conformance import SHAPES, Synthetic, ask, pool

CLASSES, SHAPE, MEMBERS = 4, (11, 7, 6), 5
# Half precision keeps a mean to 2^-11 of itself; entropies and their difference are kept in single precision.
EXACT = frozenset({"predictive_entropy", "expected_entropy", "bald", "mixed_entropy"})


def slabs_of(moments: Moments, width: int = 4) -> Iterator[Slab]:
    """`moments` in slabs of `width` along x, the last one narrower."""
    _, x, y, z = moments.shape
    for a in range(0, x, width):
        b = min(a + width, x)
        part = Moments(moments.total_cxyz[:, a:b], moments.spread_cxyz[:, a:b], moments.entropy_xyz[a:b], moments.count)
        yield Slab(((a, b), (0, y), (0, z)), part)


def archived(moments: Moments, path: Path) -> ArchivedMoments:
    with path.open("wb") as stream:
        save_slabs(slabs_of(moments), moments.loss_xyz, stream)
    return ArchivedMoments(path)


def probabilities() -> np.ndarray:
    logits = np.random.default_rng(3).normal(0, 2.5, (MEMBERS, CLASSES, *SHAPE))
    e = np.exp(logits - logits.max(1, keepdims=True))
    return (e / e.sum(1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=["memory", "archive"])
def moments(request, tmp_path) -> PosteriorMoments:
    loss = np.random.default_rng(4).random(SHAPE).astype(np.float32)
    in_memory = Moments.from_members(probabilities(), loss)
    return in_memory if request.param == "memory" else archived(in_memory, tmp_path / "a.npz")


def test_shape_count_and_loss(moments):
    assert (moments.shape, moments.count) == ((CLASSES, *SHAPE), MEMBERS)
    np.testing.assert_array_equal(moments.learning_loss(), np.random.default_rng(4).random(SHAPE).astype(np.float32))


def test_means_and_variances_of_classes_are_those_of_numpy(moments):
    probs = probabilities().astype(np.float64)
    for c in range(CLASSES):
        np.testing.assert_allclose(moments.mean_of(c), probs[:, c].mean(0), rtol=6e-4, atol=1e-6)
        np.testing.assert_allclose(moments.variance_of(c), probs[:, c].var(0, ddof=1), rtol=6e-4, atol=1e-6)
        np.testing.assert_allclose(moments.variance_of(c, ddof=0), probs[:, c].var(0), rtol=6e-4, atol=1e-6)
        assert moments.variance_of(c).dtype == moments.mean_of(c).dtype == np.float32
        assert moments.variance_of(c).max() > 0.01


def test_classes_and_their_shares_are_those_of_numpy(moments):
    mean = probabilities().astype(np.float64).mean(0)
    np.testing.assert_array_equal(moments.predicted(), mean.argmax(0))
    assert moments.predicted().dtype == np.uint8
    for box in ((slice(0, 11), slice(0, 7), slice(0, 6)), (slice(3, 9), slice(2, 5), slice(1, 6))):
        shares = np.bincount(mean.argmax(0)[box].ravel(), minlength=CLASSES) / mean[0][box].size
        np.testing.assert_allclose(moments.predicted_fractions(box), shares)


def test_a_map_of_every_name_is_finite_and_of_the_scan(moments):
    for name in [*UNCERTAINTIES, "learning_loss"]:
        found = score_map_of(name, moments)
        assert (found.shape, found.dtype) == (SHAPE, np.float32), name
        assert np.isfinite(found).all(), name
        assert found.max() > found.min() >= 0, name


def test_members_without_a_head_predict_no_loss(tmp_path):
    bare = Moments.from_members(probabilities())
    for moments in (bare, archived(bare, tmp_path / "a.npz")):
        with pytest.raises(ValueError, match="train with learning_loss above 0"):
            moments.learning_loss()


@pytest.mark.parametrize("name", UNCERTAINTIES)
def test_every_uncertainty_is_the_same_read_both_ways(tmp_path, name):
    in_memory = Moments.from_members(probabilities())
    on_disk = archived(in_memory, tmp_path / "a.npz")
    slack = {"rtol": 0, "atol": 0} if name in EXACT else {"rtol": 2e-3, "atol": 5e-4}
    np.testing.assert_allclose(score_map_of(name, on_disk), score_map_of(name, in_memory), **slack)


class Archived(Synthetic):
    """The evidence of the conformance tests with moments that stay on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.kept = {image: archived(Synthetic().moments(image), folder / f"{image}.npz") for image in SHAPES}

    def moments(self, image: str) -> PosteriorMoments:
        return self.kept[image]

    def features(self, image, boxes):
        return Synthetic().features(image, boxes)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Archived:
    return Archived(tmp_path_factory.mktemp("archives"))


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_picks_the_same_read_both_ways(evidence, name):
    on_disk, in_memory = ask(name, 2, pool(), evidence), ask(name, 2, pool())
    assert [(p.image, p.start, p.size) for p in on_disk] == [(p.image, p.start, p.size) for p in in_memory]
    np.testing.assert_allclose([p.score for p in on_disk], [p.score for p in in_memory], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["usim_f", "usim_c"])
def test_usim_sees_where_members_differ_on_disk(evidence, name):
    assert min(pick.score for pick in ask(name, 2, pool(), evidence)) > 1e-3


def test_archives_of_both_kinds_are_told_apart(tmp_path):
    archived(Moments.from_members(probabilities()), tmp_path / "slabs.npz")
    np.savez(tmp_path / "plain.npz", sum=np.zeros(3))
    assert has_slabs(tmp_path / "slabs.npz")
    assert not has_slabs(tmp_path / "plain.npz")
