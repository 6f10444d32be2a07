# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.models.checkpoints import ModelStore
from lib.models.preprocessing import TrainingCase
from lib.models.recipe import Bundle
from lib.training import ensemble as members_module
from lib.training.ensemble import APP, Job, Layout, WorkerError, train_members
from lib.training.progress_log import ProgressLog
from lib.training.trainer import Progress

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "segmentation_dynunet_3d"


def make_cases(number=4):
    generator = torch.Generator().manual_seed(0)
    sizes = [(18, 20, 17), (16, 16, 16), (21, 17, 19), (17, 17, 20)]
    return [
        TrainingCase(
            f"c{i}",
            torch.randn(1, *size, generator=generator),
            torch.randint(0, 2, size, generator=generator).to(torch.uint8),
        )
        for i, size in enumerate(sizes[:number])
    ]


def make_job(folder, members, **options):
    recipe = Bundle(BUNDLE).recipe({"patch": [16, 16, 16], "steps": 4, **options})
    names = [case.name for case in make_cases()]
    splits = [[n for i, n in enumerate(names) if i != member % 4] for member in range(members)]
    return Job(BUNDLE, folder / BUNDLE.name, 1, recipe, "d" * 64, seed=3, round=1, splits=splits, checkpoint_seconds=0)


def weights_of(job, member):
    path = ModelStore(job.store.parent, job.store.name).member_path(job.digest, member)
    return torch.load(path, weights_only=True)


def run(job, layout, folder, pending=None):
    seen = []
    train_members(
        job,
        make_cases(),
        range(len(job.splits)) if pending is None else pending,
        layout,
        folder / "job",
        lambda member, progress: seen.append((member, progress.step)),
    )
    return seen


def test_a_job_comes_back_from_its_folder_as_it_was(tmp_path):
    job = replace(make_job(tmp_path, 2), start=("e" * 64, 3), sets=[[True, False]])
    cases = make_cases()
    job.save(tmp_path / "job", cases)
    found, mapped = Job.load(tmp_path / "job")
    assert found == job
    for case, copy in zip(cases, mapped, strict=True):
        assert case.name == copy.name
        assert torch.equal(case.image_cxyz, copy.image_cxyz)
        assert torch.equal(case.label_xyz, copy.label_xyz)


def test_members_side_by_side_are_the_members_one_after_another(tmp_path):
    alone, together = make_job(tmp_path / "a", 3), make_job(tmp_path / "b", 3)
    run(alone, Layout((("cpu",),), threads=1), tmp_path / "a")
    seen = run(together, Layout((("cpu",), ("cpu",)), threads=1), tmp_path / "b")
    assert sorted(seen) == [(member, step) for member in range(3) for step in range(1, 5)]
    for member in range(3):
        for name, value in weights_of(alone, member).items():
            assert torch.equal(value, weights_of(together, member)[name]), (member, name)
    left = [path.name for path in together.store.rglob("*") if path.is_file()]
    assert sorted(left) == ["member_0.pt", "member_1.pt", "member_2.pt"]
    assert not (tmp_path / "b" / "job").exists()


@pytest.mark.slow
def test_replicas_train_the_member_that_one_process_trains(tmp_path):
    # With every voxel annotated, the mean of the halves' focal losses is the loss of the batch.
    options = {"loss": "focal", "augment": False, "foreground": 0.0, "batch": 4, "learning_rate": 1e-4}
    options["precision"] = "full"  # reduced precision rounds by the size of a batch
    alone, shared = make_job(tmp_path / "a", 1, **options), make_job(tmp_path / "b", 1, **options)
    run(alone, Layout((("cpu",),), threads=1), tmp_path / "a")
    run(shared, Layout((("cpu", "cpu"),), threads=2), tmp_path / "b")
    # Result of a replica without averaged gradients: the same steps on its half of every batch.
    half = make_job(tmp_path / "c", 1, **options | {"batch": 2})
    run(half, Layout((("cpu",),), threads=1), tmp_path / "c")
    # Single weights may differ: AdamW turns a gradient of rounding errors into a step of full length, here 1e-4.
    for name, value in weights_of(alone, 0).items():
        assert float((value - weights_of(shared, 0)[name]).abs().mean()) < 5e-6, name
    apart = [float((value - weights_of(half, 0)[name]).abs().mean()) for name, value in weights_of(alone, 0).items()]
    assert np.mean(apart) > 4e-5


def test_a_member_starts_from_the_last_training(tmp_path):
    job = make_job(tmp_path, 1, steps=3)
    run(job, Layout((("cpu",),), threads=1), tmp_path)
    # One step of almost no length: the weights of the second training are those of the first.
    tuned = replace(job, digest="f" * 64, start=(job.digest, 1), recipe=job.recipe.model_copy(
        update={"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
    ))  # fmt: skip
    run(tuned, Layout((("cpu",),), threads=1), tmp_path)
    for name, value in weights_of(job, 0).items():
        torch.testing.assert_close(value, weights_of(tuned, 0)[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_and_its_member_goes_on_later(tmp_path, monkeypatch):
    whole, broken = make_job(tmp_path / "a", 2, steps=6), make_job(tmp_path / "b", 2, steps=6)
    run(whole, Layout((("cpu",),), threads=1), tmp_path / "a")
    groups = []
    start = members_module._Group.__init__

    def remember(self, *given):
        start(self, *given)
        groups.append(self)

    monkeypatch.setattr(members_module._Group, "__init__", remember)

    def kill(member, progress):
        if member == 1 and progress.step == 3:
            groups[0].processes[0].kill()

    layout = Layout((("cpu",), ("cpu",)), threads=1)
    with pytest.raises(WorkerError, match="exit code -9"):
        train_members(broken, make_cases(), [0, 1], layout, tmp_path / "b" / "job", kill)
    assert all(process.poll() is not None for group in groups for process in group.processes)
    store = ModelStore(broken.store.parent, broken.store.name)
    assert store.member_path(broken.digest, 0).is_file()
    assert store.checkpoint_path(broken.digest, 1).is_file()
    assert not store.member_path(broken.digest, 1).is_file()
    run(broken, layout, tmp_path / "b", [1])
    for member in range(2):
        for name, value in weights_of(whole, member).items():
            assert torch.equal(value, weights_of(broken, member)[name]), (member, name)


@pytest.mark.slow
def test_workers_end_with_a_training_that_is_killed(tmp_path):
    job = make_job(tmp_path, 2, steps=100_000)
    job.save(tmp_path / "job", make_cases())
    script = (
        "import sys, time; from pathlib import Path; from lib.training.ensemble import _Group\n"
        f"group = _Group(Path({str(tmp_path / 'job')!r}), ['cpu'])\n"
        "group.processes[0].stdin.write('0 1\\n'); group.processes[0].stdin.flush()\n"
        "print(group.processes[0].pid, flush=True); print(group.processes[0].stdout.readline(), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(APP)}
    )
    worker = int(parent.stdout.readline())
    deadline = time.monotonic() + 300
    while not list(job.store.rglob("*.unfinished.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("members", "devices", "workers", "groups"),
    [
        (5, ["cpu"], 2, (("cpu",), ("cpu",))),
        (1, ["cpu"], 2, (("cpu",),)),
        (5, ["cuda:0", "cuda:1"], 2, (("cuda:0",), ("cuda:1",), ("cuda:0",), ("cuda:1",))),
        (1, ["cuda:0", "cuda:1"], 4, (("cuda:0", "cuda:1"),)),
        (2, ["cuda:0", "cuda:1", "cuda:2"], 1, (("cuda:0", "cuda:2"), ("cuda:1",))),
    ],
)
def test_layouts(members, devices, workers, groups):
    assert Layout.of(members, devices, 8, workers).groups == groups


def test_threads_follow_from_the_numbers_alone():
    layout = Layout.of(5, ["cpu"], 4, 2)
    assert [layout.threads_of(member, 5) for member in range(5)] == [2, 2, 2, 2, 4]
    assert [Layout.of(4, ["cpu"], 2, 2).threads_of(member, 4) for member in range(4)] == [1, 1, 1, 1]


def test_the_time_left_leaves_out_what_an_earlier_process_did(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    board = ProgressLog(4, [0, 1], tmp_path / "progress.json")
    board.report(2, Progress(50, 100, 1.0))
    assert '"seconds_left": null' in board.path.read_text()
    now[0] += 30
    board.report(2, Progress(100, 100, 1.0))
    # Half a member took 30 s and one member is left.
    assert '"seconds_left": 60.0' in board.path.read_text()
    assert '"fraction": 0.75' in board.path.read_text()


def test_cases_are_mapped_not_copied(tmp_path):
    job = make_job(tmp_path, 1)
    job.save(tmp_path / "job", make_cases())
    stored = np.load(tmp_path / "job" / "images.npy", mmap_mode="r")
    assert stored.size == sum(case.image_cxyz.numel() for case in make_cases())
    _, mapped = Job.load(tmp_path / "job")
    assert mapped[1].image_cxyz.storage_offset() == make_cases()[0].image_cxyz.numel()
