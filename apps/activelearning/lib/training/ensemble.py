# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Members of an ensemble, trained side by side in processes of their own: one start-up for all of them.

A job is everything a member needs. Where several members train at once it is written to a folder, cases included, and
worker processes (`lib.training.worker`) map it into memory, so that they share one copy.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.models.checkpoints import ModelStore
from lib.models.loss_head import fresh_head
from lib.models.plan import Plan
from lib.models.preprocessing import TrainingCase
from lib.models.recipe import Bundle, Recipe
from lib.randomness import child_seed
from lib.storage.atomic_files import write_atomic, write_json
from lib.training.trainer import CHECKPOINT_SECONDS, Progress, Replica, train_member

APP = Path(__file__).resolve().parents[2]
WORKER = "lib.training.worker"
Report = Callable[[int, Progress], None]


class WorkerError(RuntimeError):
    """A process that trained members ended before they were done."""


@dataclass(frozen=True)
class Job:
    """One training of an ensemble.

    `splits` holds the cases of each member; `start` is the digest of a finished training that provides the initial
    weights. Row k of `sets` marks the classes that a voxel of value C + k may have (see `lib.training.loss`). `plan` is
    the plan of the bundle.
    """

    bundle: Path
    store: Path
    classes: int
    recipe: Recipe
    digest: str
    seed: int
    round: int
    splits: list[list[str]]
    start: tuple[str, int] | None = None
    sets: list[list[bool]] | None = None
    plan: dict[str, Any] | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def save(self, folder: Path, cases: Sequence[TrainingCase]) -> None:
        """Write the job and its cases; the text file last, so that it only exists when everything else does."""
        folder.mkdir(parents=True, exist_ok=True)
        images = np.concatenate([case.image_cxyz.numpy().ravel() for case in cases])
        labels = np.concatenate([case.label_xyz.numpy().ravel() for case in cases])
        write_atomic(folder / "images.npy", lambda stream: np.save(stream, images))
        write_atomic(folder / "labels.npy", lambda stream: np.save(stream, labels))
        facts = {**asdict(self), "recipe": self.recipe.model_dump(mode="json")}
        facts |= {"bundle": str(self.bundle), "store": str(self.store)}
        facts["cases"] = [[case.name, *case.image_cxyz.shape] for case in cases]
        write_json(folder / "job.json", facts)

    @classmethod
    def load(cls, folder: Path) -> tuple[Job, list[TrainingCase]]:
        """The job of a folder and its cases, mapped from the files rather than read."""
        facts = json.loads((folder / "job.json").read_text())
        images, labels = (
            # Copy-on-write: torch wants writable memory, and nothing ever writes to it.
            torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
            for name in ("images", "labels")
        )
        cases, position = [], 0
        for name, channels, x, y, z in facts.pop("cases"):
            voxels = x * y * z
            image = images[position * channels : (position + voxels) * channels].view(channels, x, y, z)
            cases.append(TrainingCase(name, image, labels[position : position + voxels].view(x, y, z)))
            position += voxels
        facts |= {"bundle": Path(facts["bundle"]), "store": Path(facts["store"])}
        facts["recipe"] = Recipe.model_validate(facts["recipe"])
        facts["start"] = tuple(facts["start"]) if facts["start"] else None
        return cls(**facts), cases


def train_one(
    job: Job,
    cases: Sequence[TrainingCase],
    member: int,
    device: torch.device,
    report: Callable[[Progress], None],
    replica: Replica | None = None,
) -> None:
    """Train one member of a job and store it; continue from its checkpoint if an earlier process left one."""
    bundle, recipe = Bundle(job.bundle), job.recipe
    if job.plan:
        bundle = bundle.planned(Plan.model_validate(job.plan))
    store = ModelStore(job.store.parent, job.store.name)
    weights_seed, crops_seed = child_seed(job.seed, job.round, "member", member).spawn(2)
    chosen = set(job.splits[member])
    # Networks draw weights and dropout from torch's global generator; forking keeps the process as it was.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(weights_seed.generate_state(1, np.uint64)[0]) >> 1)
        network = bundle.network(job.classes, recipe.dropout or None, recipe.deep_supervision)
        taps = bundle.layers("loss_taps") if recipe.learning_loss else []
        head = fresh_head(network, taps, bundle.divisor) if recipe.learning_loss else None
        if job.start:
            digest, members = job.start
            path = store.member_path(digest, member % members)
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        weights = train_member(
            network,
            [case for case in cases if case.name in chosen],
            recipe,
            crops_seed,
            device,
            report,
            head,
            taps,
            sets=None if job.sets is None else torch.tensor(job.sets),
            checkpoint=store.checkpoint_path(job.digest, member),
            checkpoint_seconds=job.checkpoint_seconds,
            replica=replica,
        )
    if replica is None or replica.rank == 0:
        store.save_member(job.digest, member, weights, head.cpu().state_dict() if head else None)
        store.checkpoint_path(job.digest, member).unlink(missing_ok=True)


@dataclass(frozen=True)
class Layout:
    """Division of a machine among members: groups of processes, each group training one member at a time.

    `groups` holds the devices of each group; a group of several devices trains its member on all of them (DDP).
    `threads` are the CPU threads of the whole training.
    """

    groups: tuple[tuple[str, ...], ...]
    threads: int

    @classmethod
    def of(cls, members: int, devices: Sequence[str], threads: int, workers: int) -> Layout:
        """Limit to `workers` processes per device and one group per member; spare devices join a group.

        Args:
            members: members of the whole training, also those that are done already.
            devices: permitted devices, e.g. ("cpu",) or ("cuda:0", "cuda:1").
        """
        slots = [device for _ in range(workers) for device in devices]
        if members >= len(devices):
            return cls(tuple((device,) for device in slots[:members]), threads)
        groups = tuple(tuple(devices[i::members]) for i in range(members))
        return cls(groups, threads)

    @property
    def processes(self) -> int:
        return sum(len(group) for group in self.groups)

    def threads_of(self, member: int, members: int) -> int:
        """CPU threads of one member, a function of the arguments only. The order of floating-point sums depends on the
        number of threads, so a resumed training must use the same number for each member.
        """
        side_by_side = len(self.groups)
        rest = members % side_by_side
        if rest and member >= members - rest:
            side_by_side = rest
        return max(1, self.threads // (side_by_side * len(self.groups[0])))


def train_members(
    job: Job, cases: Sequence[TrainingCase], pending: Sequence[int], layout: Layout, folder: Path, report: Report
) -> None:
    """Train the `pending` members of a job; where the layout has more than one group, the others work in `folder`.

    This process is the first group (unless that has several devices), so its first step does not wait for another
    process to start.

    Raises:
        WorkerError: a worker ended early; members that were done stay done.
    """
    groups = layout.groups[: max(1, len(pending))]
    local = groups[0][0] if len(groups[0]) == 1 else None
    remote = groups[1:] if local else groups
    crew = _Crew(job, list(pending), layout, report)
    if remote:
        job.save(folder, cases)
    workers = [_Group(folder, devices) for devices in remote]
    threads = [threading.Thread(target=crew.work, args=(group.train,), daemon=True) for group in workers]
    before = torch.get_num_threads()
    first = crew.next() if local else None
    try:
        for thread in threads:
            thread.start()
        if local:
            crew.work(partial(_train_here, job, cases, torch.device(local)), first)
        for thread in threads:
            thread.join()
        crew.check()
    finally:
        for group in workers:
            group.end()
        torch.set_num_threads(before)
        shutil.rmtree(folder, ignore_errors=True)


def _train_here(
    job: Job, cases: Sequence[TrainingCase], device: torch.device, member: int, threads: int, report: Report
) -> None:
    torch.set_num_threads(threads)
    train_one(job, cases, member, device, partial(report, member))


class _Crew:
    """The members still to train, and the workers that take them one by one."""

    def __init__(self, job: Job, pending: list[int], layout: Layout, report: Report) -> None:
        self.members = len(job.splits)
        self.pending, self.layout = pending, layout
        self._report = report
        self._lock = threading.Lock()
        self._failed: Exception | None = None

    def work(self, train: Callable[[int, int, Report], None], first: int | None = None) -> None:
        """Train members until none is left; any failure ends the work of all groups."""
        try:
            member = self.next() if first is None else first
            while member is not None:
                train(member, self.layout.threads_of(member, self.members), self.report)
                member = self.next()
        except Exception as error:
            with self._lock:
                self._failed = self._failed or error
            if threading.current_thread() is threading.main_thread():
                raise

    def next(self) -> int | None:
        """The next member to train; None when there is none left or the work has ended."""
        with self._lock:
            return self.pending.pop(0) if self.pending and not self._failed else None

    def report(self, member: int, progress: Progress) -> None:
        self.check()
        with self._lock:
            self._report(member, progress)

    def check(self) -> None:
        """Raise the error that ended the work of another group."""
        if self._failed:
            raise self._failed


class _Group:
    """Worker processes that train one member at a time together. They end when this process does."""

    def __init__(self, folder: Path, devices: Sequence[str]) -> None:
        port = _free_port() if len(devices) > 1 else 0
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "lib.training.worker",
                    str(folder),
                    device,
                    *map(str, (rank, len(devices), port)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=APP,
                env=_environment(os.environ),
                text=True,
            )
            for rank, device in enumerate(devices)
        ]

    def train(self, member: int, threads: int, report: Report) -> None:
        """Train a member on the processes and pass on the reports of the first of them.

        Raises:
            WorkerError: one of them ended before the member was done.
        """
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(f"{member} {threads}\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended, so the stream of the first one ends too
        speaker = self.processes[0].stdout
        assert speaker is not None
        for line in speaker:
            event = json.loads(line)
            if event.pop("done", False):
                return
            report(event.pop("member"), Progress(**event))
        code = self.processes[0].wait()
        raise WorkerError(f"a training process ended with exit code {code} before member {member + 1} was done")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {**environment, "PYTHONPATH": os.pathsep.join(p for p in (str(APP), environment.get("PYTHONPATH")) if p)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
