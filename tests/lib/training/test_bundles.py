# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Every bundle by name: networks, training on phantoms, features, plans that stay, a network of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lib.errors import PatchwiseError
from lib.models.loss_head import tapped
from lib.models.plan import PlanError
from lib.models.recipe import Bundle
from lib.planning.fingerprint import Fingerprint, Grey
from lib.planning.planner import Budget, make_plan
from lib.prediction.features import bottleneck_features, gradient_embeddings
from lib.prediction.posterior import Ensemble, PosteriorSpec
from lib.storage.volumes import Volume, load_image
from lib.training.networks import AnisotropicUNet, Slicewise, SpaceToDepth
from tests.lib.training.studies import World

ROOT = Path(__file__).resolve().parents[3]
BUNDLES = sorted(path.name for path in (ROOT / "bundles").glob("segmentation_*"))
CPU = torch.device("cpu")


def planned(name: str, shape=(48, 60, 12), spacing=(1.0, 1.0, 4.0)) -> Bundle:
    grey = Grey(0, 1, 0, 1, 0, 1)
    pool = Fingerprint((shape,) * 9, (spacing,) * 9, "other", "told", (grey,), grey, None)
    bundle = Bundle(ROOT / "bundles" / name)
    return bundle.planned(make_plan(pool, Budget("cpu", 4.0), bundle.configuration))


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize(("shape", "spacing"), [((48, 60, 12), (1.0, 1.0, 4.0)), ((160, 150, 30), (1.0, 1.0, 6.0))])
def test_networks_follow_their_plan_and_name_their_layers(name, shape, spacing):
    bundle = planned(name, shape, spacing)
    network = bundle.network(2, dropout=0.1).eval()
    with torch.no_grad():
        assert tuple(network(torch.zeros(1, 1, *bundle.recipe({}).patch)).shape[1:]) == (3, *bundle.recipe({}).patch)
    for what in ("loss_taps", "bottleneck", "bottleneck_weights", "last_decoder", "decoder"):
        for layer in bundle.layers(what):
            network.get_submodule(layer)
    assert len(bundle.layers("decoder")) == 2 * (len(bundle.plan.strides) - 1)
    assert network.get_submodule(bundle.layers("bottleneck_weights")[0]).weight.requires_grad


def test_a_plan_that_mirrors_does_so_in_training_and_predictions_unless_asked_otherwise():
    large, small = (planned("segmentation_dynunet_3d", shape, (1.0,) * 3) for shape in ((200, 200, 90), (40, 40, 40)))
    found = large.recipe({"recipe": "quick"})
    assert (found.mirror, found.mirror_predictions) == ((0, 1, 2), True)
    assert (small.recipe({}).mirror, small.recipe({}).mirror_predictions) == ((), False)
    asked = large.recipe({"mirror": [2], "mirror_predictions": False})
    assert (asked.mirror, asked.mirror_predictions) == ((2,), False)


@pytest.mark.parametrize("name", BUNDLES)
def test_features_and_gradients_work_with_every_bundle(name):
    torch.manual_seed(0)
    bundle = planned(name)
    network = bundle.network(2, dropout=0.1)
    ensemble = Ensemble([network], bundle.recipe({}).patch, bundle.divisor, bundle.plan.spacing, CPU)
    volume = Volume(np.random.default_rng(0).normal(size=(48, 60, 12)).astype(np.float32), np.diag([1.0, 1, 4, 1]), "x")
    boxes = [((0, 0, 0), (16, 16, 4)), ((20, 30, 6), (16, 16, 4)), ((8, 9, 3), (16, 16, 4))]
    (layer,) = bundle.layers("bottleneck")
    features = bottleneck_features(ensemble, layer, volume, boxes)
    assert features.shape == (3, bundle.plan.features[-1])
    for row, box in zip(features, boxes, strict=True):
        np.testing.assert_allclose(bottleneck_features(ensemble, layer, volume, [box])[0], row, atol=1e-4)
    gradients = gradient_embeddings(ensemble, bundle.layers("last_decoder"), volume, boxes)
    assert gradients.shape[0] == 3
    assert np.isfinite(gradients).all()
    assert np.abs(gradients[0] - gradients[1]).max() > 0
    passes = list(ensemble.members(volume, spec=PosteriorSpec(ensemble=False, passes=2, dropout=0.5)))
    assert passes[0].shape == (3, 48, 60, 12)
    assert np.abs(passes[0] - passes[1]).max() > 1e-4


def test_space_to_depth_may_leave_an_axis_alone():
    image = torch.arange(4 * 6 * 3, dtype=torch.float32).reshape(1, 1, 4, 6, 3)
    assert torch.equal(SpaceToDepth((2, 2, 1), torch.nn.Identity())(image), image)


@pytest.mark.parametrize("refine", [0, 8])
def test_space_to_depth_in_2d_is_the_one_in_3d_on_a_single_slice(refine):
    torch.manual_seed(0)
    outputs = refine or 3
    flat = SpaceToDepth((2, 4), torch.nn.Conv2d(8, 8 * outputs, 3, padding=1), refine, 3)
    deep = SpaceToDepth(
        (2, 4, 1), torch.nn.Conv3d(8, 8 * outputs, (3, 3, 1), padding=(1, 1, 0)), refine, 3, kernel=(3, 3, 1)
    )
    deep.load_state_dict({n: v.unflatten(-1, (-1, 1)) if v.ndim == 4 else v for n, v in flat.state_dict().items()})
    image = torch.randn(2, 1, 8, 16)
    torch.testing.assert_close(deep(image[..., None])[..., 0], flat(image))
    assert flat(image).shape == (2, 3, 8, 16)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_go_through_the_network_one_by_one(axis):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.InstanceNorm2d(2))
    image = torch.randn(2, 1, 5, 6, 7)
    found = Slicewise(axis, network)(image)
    for i in range(image.shape[axis + 2]):
        torch.testing.assert_close(found.select(axis + 2, i), network(image.select(axis + 2, i)))
    wrapped = Slicewise(axis, network)
    with tapped(wrapped, ["network.0"]) as activations:
        wrapped(image)
    torch.testing.assert_close(activations[0][:, :, 1], network[0](image.select(axis + 2, 1)))


def test_flat_levels_of_the_anisotropic_net_see_one_slice():
    torch.manual_seed(0)
    shape = {"kernels": [[3, 3, 1]] * 3, "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 1]], "features": [4, 8, 8]}
    network = AnisotropicUNet(1, 2, **shape, dropout=0.25).eval()
    image = torch.randn(1, 1, 16, 16, 3)
    changed = image.clone()
    changed[..., 2] += 1
    before, after = network(image), network(changed)
    assert torch.equal(before[..., :2], after[..., :2])
    assert not torch.equal(before[..., 2], after[..., 2])
    rates = [m.p for name, m in network.named_modules() if isinstance(m, torch.nn.Dropout) and "decoder" in name]
    assert rates == [0.25, 0.25]
    assert not any(m.p for n, m in network.named_modules() if isinstance(m, torch.nn.Dropout) and "encoder" in n)


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize("preset", ["hippocampus", "thick_slices"])
def test_every_bundle_trains_and_infers_by_name(folders, tmp_path, name, preset):
    world = World(tmp_path, folders[preset], name)
    world.train(learning_loss=1.0)
    np.testing.assert_allclose(world.predicted().sum(axis=0), 1, atol=1e-5)
    image = load_image(sorted(tmp_path.glob("*.nii.gz"))[2])
    assert world.segmenter.ensemble().learning_loss(image).shape == image.shape
    plan = world.trainer.plans.current()
    assert world.segmenter.store.current().facts.plan == plan
    assert plan.spacing[:2] == pytest.approx((1, 1))


def test_weights_of_another_network_are_refused_in_a_sentence(folders, tmp_path):
    world = World(tmp_path, folders["thick_slices"], "segmentation_dynunet_2d")
    world.train()
    store = world.segmenter.store
    torch.save({"network.conv.weight": torch.zeros(3)}, store.member_path(store.current().digest, 0))
    with pytest.raises(PatchwiseError, match=r"member_0.pt: its weights do not fit .*dynunet_2d.*; train again"):
        world.predicted()


def test_a_plan_stays_until_asked_for(folders, tmp_path):
    world = World(tmp_path, folders["hippocampus"], "segmentation_dynunet_3d")
    first = world.train()
    text = world.plan_file.read_text()
    for path in sorted((folders["thick_slices"] / "imagesTr").glob("*.nii.gz")):
        shutil.copy(path, tmp_path / f"thick_{path.name}")
    assert world.train()["model"] == first["model"]
    assert world.plan_file.read_text() == text
    before = world.predicted()
    other = world.train(replan=True)
    assert world.plan_file.read_text() != text
    assert other["model"] != first["model"]
    assert "10th percentile" in world.trainer.plans.current().why["spacing"]
    assert before.shape == world.predicted().shape


def test_a_changed_plan_never_meets_old_weights(folders, tmp_path):
    world = World(tmp_path, folders["hippocampus"], "segmentation_dynunet_3d")
    world.train()
    before = world.predicted()
    fields = yaml.safe_load(world.plan_file.read_text())
    world.plan_file.write_text(yaml.safe_dump({**fields, "features": [8, 16, 32]}))
    world.segmenter._loaded = None
    np.testing.assert_array_equal(world.predicted(), before)
    world.train()
    assert world.segmenter.ensemble().networks[0].network.filters == [8, 16, 32]


def test_fields_of_a_plan_file_come_first(folders, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("patch: [32, 32, 32]\nbatch: 4\n")
    world = World(tmp_path / "studies", folders["hippocampus"], "segmentation_dynunet_3d", plan=str(own))
    world.train()
    plan = world.trainer.plans.current()
    assert (plan.patch, plan.batch, plan.features) == ((32, 32, 32), 4, (24, 48, 96))
    assert plan.why["patch"] == "as in own.yaml"
    assert world.trainer.info()["recipe"]["batch"] == 4
    own.write_text("patch: [33, 32, 32]\n")
    with pytest.raises(PatchwiseError, match="multiple of"):
        World(tmp_path / "again", folders["hippocampus"], "segmentation_dynunet_3d", plan=str(own)).train()
    own.write_text("patches: [33, 32, 32]\n")
    with pytest.raises(PlanError, match="patches is not a field"):
        World(tmp_path / "again", folders["hippocampus"], "segmentation_dynunet_3d", plan=str(own))


def test_without_a_plan_the_bundle_is_as_its_folder_says(folders, tmp_path):
    world = World(tmp_path, folders["thick_slices"], "segmentation_dynunet_3d", plan="bundle")
    world.train(patch=[16, 16, 16])
    assert not world.plan_file.exists()
    assert world.segmenter.store.current().facts.plan is None
    world.predicted()
    with pytest.raises(PatchwiseError, match=r"patch.*multiples of \(8, 8, 8\), found \(16, 20, 16\)"):
        world.train(patch=[16, 20, 16])


def test_a_new_network_is_a_new_folder(folders, tmp_path):
    configs = tmp_path / "bundles" / "my_unet" / "configs"
    configs.mkdir(parents=True)
    (configs / "metadata.json").write_text(json.dumps({"description": "a plain u-net"}))
    network = {
        "_target_": "monai.networks.nets.UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "@num_classes",
        "channels": [4, 8, 16],
        "strides": [2, 2],
        "dropout": "$@dropout or 0.0",
    }
    recipe = {"learning_rate": 0.01, "weight_decay": 0, "warmup": 0.1, "clip": 12, "foreground": 0.3, "steps": 3}
    recipe |= {"patch": [16, 16, 16], "batch": 2}
    content = {"num_classes": 3, "dropout": None, "divisor": [4, 4, 4], "network_def": network, "recipe": recipe}
    (configs / "network.json").write_text(json.dumps(content))
    world = World(
        tmp_path / "studies", folders["thick_slices"], "my_unet", bundles=str(tmp_path / "bundles"), models="my_unet"
    )
    world.train()
    world.predicted()
    assert world.segmenter.store.current().facts.recipe.patch == (48, 56, 12)


def test_the_stage_at_full_resolution_sees_single_voxels_that_folding_hides():
    torch.manual_seed(0)

    class Constant(torch.nn.Module):
        def forward(self, folded):
            return folded.new_zeros(folded.shape[0], 4 * 8, *folded.shape[2:])

    network = SpaceToDepth(2, Constant(), refine=4, classes=3).eval()
    for part in (network.stem[1], network.joined, network.look[1]):
        part[0] = torch.nn.Identity()  # a norm would spread the change over the whole crop
    plain = torch.zeros(1, 1, 8, 8, 8)
    dotted = plain.clone()
    dotted[0, 0, 3, 3, 3] = 1
    with torch.no_grad():
        change = (network(dotted) - network(plain))[0].abs().amax(0)
    assert network(plain).shape == (1, 3, 8, 8, 8)
    assert change[3, 3, 3] > 0
    # Two convolutions of 3 reach two voxels.
    assert torch.count_nonzero(change[1:6, 1:6, 1:6]) == torch.count_nonzero(change)


def test_the_stage_at_full_resolution_is_as_wide_as_there_are_classes_and_absent_without_folding():
    bundle = Bundle(ROOT / "bundles" / "segmentation_dynunet_3d")
    folded, organs = bundle.network(2), bundle.network(15)
    bundle._config = {**bundle._config, "factor": [1, 1, 1]}
    assert folded.refine == 8
    # Fewer channels than classes cannot separate them: at 8, six of fifteen organs stayed at Dice 0.
    assert organs.refine == 16
    assert bundle.network(2).refine == 0


def test_a_plan_lengthens_every_recipe_but_not_what_a_request_asks_for():
    small = planned("segmentation_dynunet_3d", (40, 48, 40), (1.0,) * 3)
    large = planned("segmentation_dynunet_3d", (160, 150, 130), (1.0,) * 3)
    assert large.recipe({}).steps == 2 * small.recipe({}).steps
    assert large.recipe({"recipe": "quick"}).steps == 2 * small.recipe({"recipe": "quick"}).steps
    assert large.recipe({"recipe": "quick", "steps": 7}).steps == 7
