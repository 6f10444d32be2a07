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
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.uncertainty import UNCERTAINTIES, Moments, RunningMoments, distance_to_uniform, mixed_entropy


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return (e / e.sum(axis=axis, keepdims=True)).astype(np.float32)


def members(seed: int = 0, m: int = 4, c: int = 3, shape: tuple[int, int, int] = (5, 4, 3)) -> np.ndarray:
    return softmax(np.random.default_rng(seed).normal(0, 3, (m, c, *shape)), 1)


def test_published_maps(reference: Path) -> None:
    golden = np.load(reference / "nnactive/uncertainty.npz")
    probs = golden["probs"]
    moments = Moments.from_members(iter(probs))
    entropy = moments.predictive_entropy()
    for mine, published in (
        (moments.predictive_entropy(), golden["pred_entropy"]),
        (moments.expected_entropy(), golden["exp_entropy"]),
        (moments.mutual_information(), np.maximum(golden["mutual_information"], 0)),
        (entropy, golden["class_pred_entropy"][-1]),
        *((entropy * moments.mean_of(c), golden["class_pred_entropy"][c]) for c in (0, 1, 2)),
    ):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, published, atol=4e-7)
        assert mine.min() >= 0
    np.testing.assert_allclose(moments.mean, probs.mean(0), atol=1e-6)


def test_a_hand_computed_voxel() -> None:
    probs = np.array([[0.5, 0.5], [1.0, 0.0]], np.float32).reshape(2, 2, 1, 1, 1)
    moments = Moments.from_members(probs)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert moments.predictive_entropy().item() == pytest.approx(entropy, abs=1e-6)
    assert moments.expected_entropy().item() == pytest.approx(np.log(2) / 2, abs=1e-6)
    assert moments.mutual_information().item() == pytest.approx(entropy - np.log(2) / 2, abs=1e-6)
    assert moments.mean_std().item() == pytest.approx(0.25)  # ddof 0: |1 - 0.5| / 2 for both classes
    assert moments.mean_variance().item() == pytest.approx(0.125)  # ddof 1: 0.5^2 / 2
    assert moments.least_confidence().item() == pytest.approx(0.25)
    assert moments.margin().item() == pytest.approx(0.5)
    assert mixed_entropy(moments).item() == pytest.approx((entropy + np.log(2) / 2) / 2, abs=1e-6)
    assert distance_to_uniform(moments).item() == pytest.approx(0.5)
    assert moments.variance_of(1).item() == pytest.approx(0.125)  # (0.25^2 + 0.25^2) / 1
    assert moments.variance_of(1, ddof=0).item() == pytest.approx(0.0625)
    assert moments.class_variance(ddof=3).ravel().tolist() == pytest.approx([0.125, 0.125])  # divided by one at least


def test_mean_variance_is_the_published_mean_std(reference: Path) -> None:
    golden = np.load(reference / "alunet/dropout_scores.npz")
    probs = softmax(golden["logits"].astype(np.float64), 2)  # T N C H W
    for i in range(probs.shape[1]):
        moments = Moments.from_members(probs[:, i, :, :, :, None])
        assert moments.mean_variance().mean() == pytest.approx(golden["mcd_score"][i], abs=1e-6)
        assert moments.mutual_information().mean() / np.log(2) == pytest.approx(golden["bald_score"][i], abs=1e-6)
        np.testing.assert_allclose(
            moments.class_variance().mean(axis=(1, 2, 3)), golden["usim_var_per_class"][i], atol=1e-6
        )
        one = Moments.from_members(probs[:1, i, :, :, :, None])
        assert one.predictive_entropy().mean() / np.log(2) == pytest.approx(golden["entropy_score"][i], abs=1e-6)


def test_true_and_mixed_divergence(reference: Path) -> None:
    golden = np.load(reference / "stochastic_batches/divergence.npz")
    for n, probs in enumerate(golden["p"]):
        moments = Moments.from_members(probs[..., None])
        np.testing.assert_allclose(moments.mutual_information()[..., 0], golden["true_jsd"][n], atol=1e-6)
        np.testing.assert_allclose(mixed_entropy(moments)[..., 0], golden["code_weighted_jsd_alpha05"][n], atol=1e-6)
    same = Moments.from_members(golden["identical_p"][0][..., None])
    assert same.mutual_information().max() == 0
    assert mixed_entropy(same).max() == pytest.approx(np.log(2), abs=1e-6)


def test_burmeister_scores(reference: Path) -> None:
    golden = np.load(reference / "active_segmentation/uncertainty.npz")
    probs = golden["P"]  # N C H W
    pixels = probs[0, 0].size
    for i, p in enumerate(probs):
        moments = Moments.from_members([p[..., None]])
        assert distance_to_uniform(moments).sum() == pytest.approx(golden["distance"][i], rel=1e-5)
        published = golden["entropy"][i]  # smallest first: ours is its negative, shifted by C/e a pixel
        shifted = p.shape[0] * pixels / np.e - UNCERTAINTIES["burmeister_entropy"](moments).sum()
        assert shifted == pytest.approx(published, rel=1e-5)
        assert moments.predictive_entropy().sum() == pytest.approx(golden["textbook_entropy"][i], rel=1e-5)


def test_published_entropy_prefers_moderate_to_full_confidence() -> None:
    def score(p: float, name: str) -> float:
        probs = np.array([p, 1 - p], np.float32).reshape(1, 2, 1, 1, 1)
        return float(UNCERTAINTIES[name](Moments.from_members(probs)).item())

    assert score(0.5, "burmeister_entropy") > score(1.0, "burmeister_entropy") > score(0.87, "burmeister_entropy")
    assert score(0.5, "predictive_entropy") > score(0.87, "predictive_entropy") > score(1.0, "predictive_entropy")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.1, 5.0, 20.0, 40.0, 200.0]))
def test_every_map_is_finite_and_not_negative(seed: int, m: int, c: int, scale: float) -> None:
    probs = softmax(np.random.default_rng(seed).normal(0, scale, (m, c, 3, 4, 2)), 1)
    moments = Moments.from_members(probs)
    for name, function in UNCERTAINTIES.items():
        scores = function(moments)
        assert scores.shape == (3, 4, 2), name
        assert scores.dtype == np.float32, name
        assert np.isfinite(scores).all(), name
        assert scores.min() >= 0, name


def test_running_sums_match_plain_numpy() -> None:
    probs = members(1, m=6)
    held = Moments.from_members(iter(probs))
    np.testing.assert_allclose(held.mean_std(), probs.std(0).mean(0), atol=1e-6)
    np.testing.assert_allclose(held.mean_variance(), probs.var(0, ddof=1).mean(0), atol=1e-6)
    np.testing.assert_array_equal(held.predicted(), probs.mean(0).argmax(0))
    box = (slice(1, 4), slice(0, 2), slice(0, 3))
    shares = np.bincount(probs.mean(0).argmax(0)[box].ravel(), minlength=3) / 18
    np.testing.assert_allclose(held.predicted_fractions(box), shares)


def test_identical_members_do_not_disagree() -> None:
    same = np.repeat(members(2, m=1), 5, axis=0)
    moments = Moments.from_members(iter(same))
    assert moments.mean_std().max() < 1e-6
    assert moments.mutual_information().max() < 1e-6


def test_single_member_has_no_spread() -> None:
    moments = Moments.from_members(members(3, m=1))
    assert moments.mean_std().max() == 0
    assert moments.mean_variance().max() == 0


def test_arrays_round_trip() -> None:
    moments = Moments.from_members(members(5))
    again = Moments.from_arrays({k: np.array(v) for k, v in moments.to_arrays().items()})
    for name, function in UNCERTAINTIES.items():
        np.testing.assert_array_equal(function(again), function(Moments.from_arrays(moments.to_arrays())), err_msg=name)
    with pytest.raises(ValueError, match=r"lack .*spread"):
        Moments.from_arrays({"sum": np.zeros((1, 1, 1, 1)), "entropy": np.zeros((1, 1, 1)), "count": np.array(1)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 20.0])
def test_what_is_no_probability_is_refused(bad: float) -> None:
    probs = members(6)
    probs[2, 1, 3, 2, 1] = bad
    with pytest.raises(ValueError, match="probabilities from 0 to 1"):
        Moments.from_members(probs)


def test_a_refused_member_changes_nothing() -> None:
    probs = members(7)
    running = RunningMoments(probs.shape[1:])
    running.add(probs[0])
    before = running.finished().predictive_entropy()
    with pytest.raises(ValueError, match="not a number"):
        running.add(np.full_like(probs[0], np.nan))
    assert running.count == 1
    np.testing.assert_array_equal(running.finished().predictive_entropy(), before)


def test_wrong_shapes_and_no_members_are_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        Moments.from_members(iter([]))
    with pytest.raises(ValueError, match="four axes"):
        RunningMoments((2, 3, 4))
    with pytest.raises(ValueError, match="must have the shape"):
        Moments.from_members([members()[0], members(shape=(5, 4, 2))[0]])
    with pytest.raises(ValueError, match="found none"):
        RunningMoments((2, 3, 4, 5)).finished()


def test_members_as_tensors_give_the_moments_of_members_as_arrays():
    members = np.random.default_rng(5).dirichlet(np.ones(3), size=(4, 6, 5, 7)).transpose(0, 4, 1, 2, 3)
    members = np.ascontiguousarray(members, dtype=np.float32)
    arrays = Moments.from_members(iter(members))
    tensors = Moments.from_members(torch.from_numpy(m.copy()) for m in members)
    for name, expected in arrays.to_arrays().items():
        np.testing.assert_array_equal(tensors.to_arrays()[name], expected)
    np.testing.assert_array_equal(tensors.mutual_information(), arrays.mutual_information())


def test_stored_moments_are_whole_and_may_carry_a_predicted_loss() -> None:
    arrays = Moments.from_members(members()).to_arrays()
    with pytest.raises(ValueError, match="members predict no loss"):
        Moments.from_arrays(arrays).learning_loss()
    loss = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    np.testing.assert_array_equal(Moments.from_arrays({**arrays, "learning_loss": loss}).learning_loss(), loss)
    with pytest.raises(ValueError, match=r"lack \['entropy'\]: delete this cache entry"):
        Moments.from_arrays({name: array for name, array in arrays.items() if name != "entropy"})
    for name in ("spread", "entropy"):
        with pytest.raises(ValueError, match="disagree in shape"):
            Moments.from_arrays({**arrays, name: arrays[name][..., :1]})
