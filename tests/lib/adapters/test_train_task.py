# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import shutil
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.adapters import train_task as task_module
from lib.errors import PatchwiseError
from lib.prediction.segmentation import segment
from lib.storage.atomic_files import write_json
from lib.storage.volumes import load_image
from lib.training import pipeline as pipeline_module
from tests.lib.training.studies import World

NAME = "segmentation_dynunet_3d"


@pytest.fixture
def world(folders, tmp_path):
    return World(tmp_path, folders["hippocampus"], NAME)


def weights(world):
    model = world.trainer.store.current()
    return torch.load(world.trainer.store.member_path(model.digest, 0), weights_only=True)


def test_fine_tuning_goes_on_from_the_last_training_and_can_be_repeated(world):
    first = world.train(round=0)
    before = weights(world)
    # A step of almost no length, so that the weights stay the initial ones.
    small = {"steps": 1, "learning_rate": 1e-9, "weight_decay": 0.0, "ema": 0.0}
    tuned = world.train(round=1, start="last", **small)
    assert tuned["model"] != first["model"]
    assert world.trainer.store.current().facts.start == (first["model"], 1)
    for name, value in before.items():
        torch.testing.assert_close(weights(world)[name], value, atol=1e-5, rtol=0)
    assert world.train(round=1, start="last", **small)["model"] == tuned["model"]
    assert any(not torch.equal(value, before[name]) for name, value in _scratch(world).items())


def _scratch(world):
    world.train(round=1, steps=1, learning_rate=1e-9)
    return weights(world)


def test_fine_tuning_with_other_classes_is_refused(world):
    world.train()
    world.trainer.classes = {"anterior": 1, "posterior": 2, "tail": 3}
    with pytest.raises(PatchwiseError, match="has other classes") as refused:
        world.train(start="last", round=1)
    assert refused.value.status == 409


def test_what_is_known_of_classes_that_were_not_drawn_reaches_the_loss(world, tmp_path, monkeypatch):
    image = sorted(world.store.list_images())[2]
    source = nib.load(world.store.image_path(image))
    label = np.zeros(source.shape, np.uint8)
    label[:4] = 1
    path = tmp_path / "upload" / "label.nii.gz"
    path.parent.mkdir()
    nib.save(nib.Nifti1Image(label, source.affine), path)
    world.store.save_label(image, str(path), "final", {"whole": True, "annotated_classes": ["anterior"]})
    jobs = []
    train = task_module.train_members

    def record(job, cases, *rest):
        jobs.append((job, {case.name: case for case in cases}))
        train(job, cases, *rest)

    monkeypatch.setattr(task_module, "train_members", record)
    world.train()
    ((job, cases),) = jobs
    # Value 3, the first above the classes: not anterior, but background or posterior.
    assert job.sets == [[True, False, True]]
    assert cases[image].label_xyz.unique().tolist() == [1, 3]
    assert image in job.splits[0]


def test_the_size_of_lesions_and_the_shifts_reach_the_segmentation(world, tmp_path, monkeypatch):
    folder = tmp_path / "upload"
    folder.mkdir()
    for image, side in zip(sorted(world.store.list_images()), (4, 0, 3), strict=True):
        scan = load_image(world.store.image_path(image))
        label = np.zeros(scan.shape, np.uint8)
        label[:2] = 1
        label[5 : 5 + side, 5 : 5 + side, 5 : 5 + side] = 2
        nib.save(nib.Nifti1Image(label, scan.affine), folder / "label.nii.gz")
        world.store.save_label(image, str(folder / "label.nii.gz"), "final", {"whole": True})
    world.train(smallest=0.5)
    voxel_mm3 = float(np.prod(scan.spacing))
    # Every image holds class 1; of class 2 the third image, whose voxels `scan` has, holds the smallest: 3 x 3 x 3.
    assert world.trainer.store.current().facts.smallest_mm3 == pytest.approx({"posterior": 27 * voxel_mm3})
    ensemble = world.segmenter.ensemble()
    assert ensemble.smallest_mm3 == pytest.approx({2: 13.5 * voxel_mm3})
    probs = np.zeros((3, *scan.shape), np.float32)
    probs[0] = 0.4
    probs[2, :1, :1, :13] = probs[2, 10:11, 10:11, 10:24] = probs[1, 20, 20, 20] = 0.6
    monkeypatch.setattr(ensemble, "mean", lambda volume, overlap, mirrored: probs)
    assert np.bincount(segment(ensemble, scan, 3, tmp_path).ravel())[1:].tolist() == [1, 14]
    assert ensemble.shifts == 4
    world.train(smallest=0, shifts=2)
    assert world.segmenter.ensemble().smallest_mm3 == {2: 0}
    assert world.segmenter.ensemble().shifts == 2


@pytest.mark.slow
def test_a_training_killed_inside_a_member_goes_on_from_its_checkpoint(folders, tmp_path, monkeypatch):
    whole, stopped = (World(tmp_path / n, folders["hippocampus"], NAME) for n in ("whole", "stopped"))
    monkeypatch.setattr(pipeline_module, "Job", partial(pipeline_module.Job, checkpoint_seconds=0.0))
    expected = whole.train(steps=6)
    steps = []
    report = task_module.ProgressLog.report

    def stop(board, member, progress):
        steps.append(progress.step)
        report(board, member, progress)
        if len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(task_module.ProgressLog, "report", stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(steps=6)
    assert stopped.trainer.store.current() is None
    assert stopped.train(steps=6)["model"] == expected["model"]
    assert steps == [1, 2, 3, 4, 4, 5, 6]
    for name, value in weights(whole).items():
        assert torch.equal(weights(stopped)[name], value), name
    shutil.rmtree(tmp_path / "whole")


def test_unknown_recipes_and_options_are_refused_in_a_sentence(world):
    for request, sentence in [
        ({"recipe": "slow"}, "default, quick"),
        ({"stepz": 3}, "unknown training option stepz"),
        ({"learning_loss": 1.0, "compiled": True}, "compiled=false"),
    ]:
        with pytest.raises(PatchwiseError, match=sentence) as refused:
            world.train(**request)
        assert refused.value.status == 400


def test_the_form_that_clients_show_can_be_sent_back_and_changes_nothing(world):
    form = world.trainer.config()
    assert form == {"recipe": ["default", "quick"], "members": 1, "seed": 0}
    sent = {key: value[0] if isinstance(value, list) else value for key, value in form.items()}
    assert world.trainer.parse({**sent, "client_id": "user-xyz"}) == world.trainer.parse({})
    assert world.trainer.info()["recipe"]["steps"] == world.trainer.parse({})[1].steps


def test_the_bar_of_a_running_training_shows_per_cent(world):
    trainer = world.trainer
    trainer.store.folder.mkdir(parents=True, exist_ok=True)
    write_json(trainer.store.folder / "train_stats.json", {"members": 1, "total_time": 7.5})
    assert trainer.stats() == {"members": 1, "total_time": 7.5}
    write_json(trainer.progress_file, {"fraction": 0.254})
    assert trainer.stats() == {"members": 1, "epoch": 25, "total_epochs": 100}
    write_json(trainer.progress_file, {"fraction": 1.0})
    assert trainer.stats() == {"members": 1, "total_time": 7.5}
