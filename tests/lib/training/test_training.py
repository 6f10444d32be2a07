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
from hypothesis import given
from hypothesis import strategies as st

from lib.models.loss_head import fresh_head
from lib.models.preprocessing import TrainingCase, crop, network_image, network_label, network_shape, normalise, to_grid
from lib.models.recipe import Bundle, RecipeError
from lib.partial_labels import UNLABELLED
from lib.prediction.posterior import Ensemble
from lib.storage.volumes import Volume
from lib.training.augmentation import Augmentation, Changes, changed, draw_changes, rotation
from lib.training.networks import SpaceToDepth
from lib.training.pipeline import training_splits
from lib.training.trainer import CropStream, Replica, TrainingDivergedError, learning_rate, train_member

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "segmentation_dynunet_3d"
CPU = torch.device("cpu")


class_sets = st.frozensets(st.integers(1, 3))


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), class_sets, min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_every_split_keeps_every_class_found_twice_and_folds_cover_all(cases, members, folds, seed):
    splits = training_splits(cases, members, folds, np.random.default_rng(seed))
    everything = frozenset().union(*cases.values())
    assert len(splits) == members
    for split in splits:
        assert split
        assert set(split) <= set(cases)
        assert frozenset().union(*(cases[c] for c in split)) == everything
    again = training_splits(dict(reversed(list(cases.items()))), members, folds, np.random.default_rng(seed))
    assert again == splits


def test_each_case_is_left_out_by_one_member_of_k():
    cases = {f"c{i}": frozenset({1, 2}) for i in range(10)}
    splits = training_splits(cases, 5, 5, np.random.default_rng(0))
    left_out = [set(cases) - set(split) for split in splits]
    assert [len(out) for out in left_out] == [2, 2, 2, 2, 2]
    assert set().union(*left_out) == set(cases)


def test_normalisation_is_blind_to_scale_and_single_wild_voxels():
    image = np.random.default_rng(0).normal(100, 10, (20, 20, 20)).astype(np.float32)
    wild = image.copy()
    wild[0, 0, 0] = 1e6
    assert normalise(image).mean() == pytest.approx(0, abs=1e-5)
    assert normalise(image).std() == pytest.approx(1, abs=1e-5)
    assert np.abs(normalise(wild) - normalise(image))[1:].max() < 0.01
    assert normalise(wild)[0, 0, 0] < 4
    np.testing.assert_allclose(normalise(image * 1000), normalise(image), atol=1e-3)
    assert np.all(normalise(np.full((4, 4, 4), 7, np.float32)) == 0)


def test_resampling_goes_to_the_wanted_spacing_and_back():
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None], (12, 10, 6)).copy()
    assert network_shape((12, 10, 6), (1, 1, 3), (1, 1, 1)) == (12, 10, 18)
    image = network_image(Volume(ramp, affine, "x"), (1, 1, 1))
    assert tuple(image.shape) == (1, 12, 10, 18)
    assert tuple(to_grid(image, (12, 10, 6)).shape) == (1, 12, 10, 6)
    mask = np.full((12, 10, 6), UNLABELLED, np.uint8)
    mask[:, :, 2] = 1
    label = network_label(mask, (1, 1, 3), (1, 1, 1))
    assert set(label.unique().tolist()) == {1, UNLABELLED}
    assert int((label == 1).sum()) == 12 * 10 * 3


def test_plain_crop_pads_with_zero_and_unlabelled():
    image = torch.ones(1, 4, 4, 4)
    label = torch.ones(4, 4, 4, dtype=torch.uint8)
    cut, mask = crop(image, label, (-1, 2, 0), (6, 4, 4))
    assert cut[0, 1:5, :2].eq(1).all()
    assert float(cut.sum()) == 4 * 2 * 4
    assert int((mask == UNLABELLED).sum()) == 6 * 4 * 4 - 32


def batch_of(image, label, start, patch, how, seed):
    """One crop, changed, as the trainer does it."""
    changes = draw_changes(1, how, np.random.default_rng(seed))
    margin = changes.margin(patch)
    block, mask = crop(image, label, np.subtract(start, margin), np.add(patch, np.multiply(2, margin)))
    return changed(block[None], mask[None], patch, changes, torch.Generator().manual_seed(seed))


def test_augmented_crops_keep_an_annotated_voxel_and_only_known_values():
    image = torch.randn(1, 20, 20, 20, generator=torch.Generator().manual_seed(0))
    label = torch.full((20, 20, 20), UNLABELLED, dtype=torch.uint8)
    label[0, 0, 0] = 1
    for seed in range(50):
        cut, mask = batch_of(image, label, (0, 0, 0), (8, 8, 8), Augmentation(), seed)
        assert tuple(cut.shape) == (1, 1, 8, 8, 8)
        assert set(mask.unique().tolist()) == {1, UNLABELLED}


def test_an_unchanged_warp_is_the_plain_crop():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 9, 8, 7, generator=generator)
    label = torch.randint(0, 3, (9, 8, 7), generator=generator).to(torch.uint8)
    still = Augmentation(rotation=1e-9, scale=0, mirror=(), contrast=0, noise=0, probability=1)
    warped, mask = batch_of(image, label, (2, 1, 3), (5, 6, 4), still, 0)
    plain, truth = crop(image, label, (2, 1, 3), (5, 6, 4))
    torch.testing.assert_close(warped[0], plain, atol=1e-4, rtol=0)
    assert torch.equal(mask[0], truth)


def test_each_crop_of_a_batch_gets_its_own_change():
    image = torch.randn(1, 10, 12, 14, generator=torch.Generator().manual_seed(2))
    label = torch.arange(10 * 12 * 14).reshape(10, 12, 14).remainder(7).to(torch.uint8)
    matrix = np.stack([np.eye(3), np.diag([-1, 1, 1]), rotation((0, 0, 90))]).astype(np.float32)
    numbers = {name: np.asarray(v, np.float32) for name, v in [("gain", (1, 2, 1)), ("shift", (0, 0, 3))]}
    changes = Changes(matrix, numbers["gain"], numbers["shift"], np.zeros(3, np.float32))
    patch, margin = (6, 6, 6), changes.margin((6, 6, 6))
    block, mask = crop(image, label, np.subtract((2, 3, 4), margin), np.add(patch, np.multiply(2, margin)))
    cuts, masks = changed(
        block.expand(3, -1, -1, -1, -1), mask.expand(3, -1, -1, -1), patch, changes, torch.Generator()
    )
    plain, truth = crop(image, label, (2, 3, 4), patch)
    expected = [plain, 2 * plain.flip(1), torch.rot90(plain, 1, (2, 1)) + 3]
    for cut, wanted in zip(cuts, expected, strict=True):
        torch.testing.assert_close(cut, wanted, atol=1e-4, rtol=0)
    for found, wanted in zip(masks, [truth, truth.flip(0), torch.rot90(truth, 1, (1, 0))], strict=True):
        assert torch.equal(found, wanted)


def test_replicas_share_the_batches_of_one_process():
    cases = [TrainingCase("a", torch.randn(1, 9, 9, 9), torch.zeros(9, 9, 9, dtype=torch.uint8))]
    recipe = Bundle(BUNDLE).recipe({"patch": [4, 4, 4], "batch": 4, "augment": False})
    whole = CropStream(cases, recipe, np.random.default_rng(3))
    halves = [CropStream(cases, recipe, np.random.default_rng(3), replica=Replica(rank, 2)) for rank in range(2)]
    for _ in range(3):
        images, _ = whole.next()
        parts = [half.next()[0] for half in halves]
        assert torch.equal(images[0::2], parts[0])
        assert torch.equal(images[1::2], parts[1])


def test_space_to_depth_loses_no_voxel():
    image = torch.arange(4 * 6 * 8, dtype=torch.float32).reshape(1, 1, 4, 6, 8)
    assert torch.equal(SpaceToDepth(2, torch.nn.Identity())(image), image)
    assert torch.equal(SpaceToDepth(1, torch.nn.Identity())(image), image)


def test_the_learning_rate_rises_then_falls_to_almost_nothing():
    recipe = Bundle(BUNDLE).recipe({"steps": 100, "learning_rate": 1.0, "warmup": 0.1})
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx((1 - 45 / 90) ** 0.9)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.03


def test_bad_recipes_are_refused_in_a_sentence(tmp_path):
    bundle = Bundle(BUNDLE)
    with pytest.raises(RecipeError, match="stepz"):
        bundle.recipe({"stepz": 3})
    with pytest.raises(RecipeError, match=r"steps.*-1"):
        bundle.recipe({"steps": -1})
    with pytest.raises(RecipeError, match="known bundles are segmentation_aunet_3d, segmentation_dynunet_2d, segm"):
        Bundle(BUNDLE.parent / "missing")
    assert bundle.divisor == (8, 8, 8)


def ball_case(seed, annotated=None):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(24),) * 3, indexing="ij"), -1)
    truth = (np.linalg.norm(grid - rng.uniform(9, 14, 3), axis=-1) < 5).astype(np.uint8)
    image = truth * 2.0 + rng.normal(0, 0.5, truth.shape)
    label = truth.copy()
    if annotated is not None:
        label[:] = UNLABELLED
        label[annotated] = truth[annotated]
    return image.astype(np.float32), truth, label


def test_a_member_learns_from_partial_labels_and_is_reproducible():
    bundle = Bundle(BUNDLE)
    recipe = bundle.recipe({"steps": 150, "patch": [16, 16, 16], "learning_rate": 0.01})
    cases = []
    for seed in range(3):
        image, _, label = ball_case(seed, (slice(0, 20), slice(2, 22), slice(4, 24)))
        volume = Volume(image, np.eye(4), "x")
        cases.append(TrainingCase(str(seed), network_image(volume, None), torch.from_numpy(label)))

    def train(steps):
        torch.manual_seed(0)
        network = bundle.network(1)
        chosen = recipe.model_copy(update={"steps": steps})
        return network, train_member(network, cases, chosen, np.random.SeedSequence(5), CPU)

    (_, first), (_, again) = train(20), train(20)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    network, _ = train(150)
    image, truth, _ = ball_case(99)
    probs = Ensemble([network], recipe.patch, bundle.divisor, None, CPU).mean(Volume(image, np.eye(4), "x"))
    assert probs.shape == (2, 24, 24, 24)
    np.testing.assert_allclose(probs.sum(axis=0), 1, atol=1e-5)
    predicted = probs.argmax(axis=0)
    assert 2 * (predicted * truth).sum() / (predicted.sum() + truth.sum()) > 0.85


def test_windows_cover_small_images_whole_and_large_ones_in_parts():
    ensemble = Ensemble([torch.nn.Identity()], (32, 40, 32), (8, 8, 8), None, CPU)
    assert ensemble.window((36, 50, 35)) == (40, 56, 40)
    assert ensemble.window((512, 512, 200)) == (32, 40, 32)
    assert ensemble.window((512, 512, 20)) == (32, 40, 24)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "dropout": 0.2, "learning_loss": 0.5}])
def test_a_training_stopped_at_any_step_ends_in_the_same_weights(tmp_path, options):
    bundle = Bundle(BUNDLE)
    recipe = bundle.recipe({"steps": 9, "patch": [16, 16, 16], **options})
    cases = [TrainingCase("a", torch.from_numpy(ball_case(0)[0])[None], torch.from_numpy(ball_case(0)[2]))]

    def train(path, stop=None):
        torch.manual_seed(0)
        network = bundle.network(1, recipe.dropout or None)
        taps = bundle.layers("loss_taps") if recipe.learning_loss else []
        head = fresh_head(network, taps, bundle.divisor) if taps else None

        def report(progress):
            if progress.step == stop:
                raise KeyboardInterrupt

        seed = np.random.SeedSequence(7)
        return train_member(
            network, cases, recipe, seed, CPU, report, head, taps, checkpoint=path, checkpoint_seconds=0
        )

    whole = train(tmp_path / "whole.pt")
    path = tmp_path / "stopped.pt"
    for stop in (3, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            train(path, stop)
    resumed = train(path)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_training_whose_loss_is_no_number_any_more_says_so_and_stops():
    bundle = Bundle(BUNDLE)
    recipe = bundle.recipe({"steps": 40, "patch": [16, 16, 16]})
    image = torch.from_numpy(ball_case(0)[0])[None].clone()
    image[:, 12] = float("inf")
    case = TrainingCase("a", image, torch.from_numpy(ball_case(0)[2]))
    seen = []
    with pytest.raises(TrainingDivergedError, match=r"after step 1 of 40 is nan, .* below 0.\d+ or precision: full"):
        train_member(bundle.network(1), [case], recipe, np.random.SeedSequence(7), CPU, seen.append)
    assert seen == []


def test_averaged_weights_by_hand():
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self, image):
            return self.weight.view(1, 2, 1, 1, 1) * image

    seen = []
    recipe = Bundle(BUNDLE).recipe({"steps": 3, "patch": [4, 4, 4], "ema": 0.3, "augment": False})
    case = TrainingCase("a", torch.ones(1, 4, 4, 4), torch.ones(4, 4, 4, dtype=torch.uint8))
    network = Line()
    averaged = train_member(
        network, [case], recipe, np.random.SeedSequence(0), CPU, lambda _: seen.append(network.weight.detach().clone())
    )["weight"]
    expected = torch.zeros(2)
    for step, weight in enumerate(seen):
        kept = min(0.3, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(averaged, expected)
    assert not torch.equal(averaged, seen[-1])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flat_changes_leave_slices_where_they_are(axis):
    drawn = draw_changes(50, Augmentation(flat=axis, mirror=()), np.random.default_rng(0)).matrix_bij
    np.testing.assert_array_equal(drawn[:, axis], np.tile(np.eye(3)[axis], (50, 1)))
    np.testing.assert_array_equal(drawn[:, :, axis], np.tile(np.eye(3)[axis], (50, 1)))
    assert np.abs(np.linalg.det(drawn) - 1).max() > 0.1
    assert np.abs(drawn - np.eye(3)).max() > 0.1


def test_a_recipe_by_name_and_what_it_does_not_know():
    bundle = Bundle(BUNDLE)
    assert bundle.recipe({"recipe": "quick", "batch": 4}).batch == 4
    assert bundle.recipe({"recipe": "default"}) == bundle.recipe({})
    with pytest.raises(RecipeError, match=r"has default, quick, found 'slow'"):
        bundle.recipe({"recipe": "slow"})
    with pytest.raises(RecipeError, match="has 1 lower resolutions"):
        bundle.recipe({"deep_supervision": 2})


@pytest.mark.parametrize("name", ["segmentation_dynunet_3d", "segmentation_dynunet_2d"])
def test_deep_supervision_trains_heads_that_inference_does_without(name):
    bundle = Bundle(BUNDLE.parent / name)
    recipe = bundle.recipe({"steps": 2, "patch": [16, 16, 16], "deep_supervision": 1})
    network = bundle.network(1, None, recipe.deep_supervision)
    image, _, label = ball_case(0)
    cases = [TrainingCase("a", torch.from_numpy(image)[None], torch.from_numpy(label))]
    before = {k: v.clone() for k, v in network.state_dict().items() if "deep_supervision_heads" in k}
    assert network.train()(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 2, 2, 16, 16, 16)
    after = train_member(network, cases, recipe, np.random.SeedSequence(0), CPU)
    assert before
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    assert network.eval()(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same():
    bundle = Bundle(BUNDLE)
    image, _, label = ball_case(0)
    case = TrainingCase("a", torch.from_numpy(image)[None], torch.from_numpy(label))
    seen, answers = case.image_cxyz[None, :, :16, :16, :16], []
    for compiled in (False, True):
        # Reduced precision is rounded at other places in a compiled network.
        recipe = bundle.recipe({"steps": 3, "patch": [16, 16, 16], "compiled": compiled, "precision": "full"})
        torch.manual_seed(0)
        network = bundle.network(1)
        with torch.no_grad():
            before = network.eval()(seen)
        train_member(network, [case], recipe, np.random.SeedSequence(5), CPU)
        with torch.no_grad():
            answers.append(network.eval()(seen))
    # Not the weights: AdamW turns rounding errors into whole steps of a bias that the normalisation takes away again.
    assert float((answers[0] - answers[1]).abs().mean()) < 1e-3 < 0.1 < float((answers[0] - before).abs().mean())
