# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Kinds of faults, each a function of the world and a generator; afterwards the server is restarted and checked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tests.faults.world import BUNDLE, World

Fault = Callable[[World, np.random.Generator], None]


def kill_server(world: World, rng: np.random.Generator) -> None:
    world.kill()


def kill_server_alone(world: World, rng: np.random.Generator) -> None:
    world.child("train", {"members": 1, "steps": 100_000, "patch": [16, 16, 16]}, f"/train/{BUNDLE}")
    time.sleep(float(rng.uniform(0, 3 * world.trouble)))
    world.kill(alone=True)


def kill_trainer(world: World, rng: np.random.Generator) -> None:
    request = {"members": 1, "steps": int(rng.integers(1, 100)), "patch": [16, 16, 16]}
    _kill_child(world, rng, "train", request, f"/train/{BUNDLE}")


def kill_scorer(world: World, rng: np.random.Generator) -> None:
    _kill_child(world, rng, "scoring", {}, "/scoring/predictive_entropy")


def _kill_child(world: World, rng: np.random.Generator, kind: str, request: dict, path: str) -> None:
    process = world.child(kind, request, path)
    time.sleep(float(rng.uniform(0, 3 * world.trouble)))
    # A short one may have ended by itself.
    if process.is_running():
        process.kill()


def fill_disk(world: World, rng: np.random.Generator) -> None:
    with world.full():
        time.sleep(float(rng.uniform(0.2, world.trouble)))
        if rng.random() < 0.5:
            world.kill()


def make_read_only(world: World, rng: np.random.Generator) -> None:
    final = world.studies / "labels" / "final"
    choices = [
        [world.state / "ledger.sqlite"],
        [world.state / "journal.jsonl"],
        [world.state / "raw"],
        [final],
        world.label_files(),
    ]
    with world.read_only(choices[int(rng.integers(len(choices)))]):
        time.sleep(float(rng.uniform(0.2, world.trouble)))


def cut_datastore_file(world: World, rng: np.random.Generator) -> None:
    """The file of the class that this project's datastore takes the place of, as an earlier server may have left it."""
    path = world.studies / "datastore_v2.json"
    path.write_text('{"name": "new-dataset", "description": "", "objects": {}}')
    _cut(path, rng)


def cut_label(world: World, rng: np.random.Generator) -> None:
    _cut_one(world, rng, world.label_files)


def cut_checkpoint(world: World, rng: np.random.Generator) -> None:
    _cut_one(world, rng, lambda: (world.state / "models").rglob("*.pt"))


def cut_model_pointer(world: World, rng: np.random.Generator) -> None:
    _cut_one(world, rng, lambda: (world.state / "models").rglob("current.json"))


def cut_moments(world: World, rng: np.random.Generator) -> None:
    _cut_one(world, rng, lambda: (world.state / "moments").rglob("*.npz"))


def cut_write_ahead_log(world: World, rng: np.random.Generator) -> None:
    """As a power cut does: the machine stops, and the end of the file was never on the disk."""
    world.kill()
    _cut(world.state / "ledger.sqlite-wal", rng)


def freeze_server(world: World, rng: np.random.Generator) -> None:
    os.killpg(world.pid, signal.SIGSTOP)
    time.sleep(float(rng.uniform(0.2, 5 * world.trouble)))
    os.killpg(world.pid, signal.SIGCONT)


def stop_clock(world: World, rng: np.random.Generator) -> None:
    """Stop the time of day, which jumps when it continues."""
    world.clock.touch()
    try:
        time.sleep(world.standstill)
    finally:
        world.clock.unlink()


def kill_referee(world: World, rng: np.random.Generator) -> None:
    assert world.referee is not None, "this fault needs a study beside the annotators"
    world.told.failures += world.referee.strike(rng)


def _cut_one(world: World, rng: np.random.Generator, files: Callable[[], Iterable[Path]]) -> None:
    found = sorted(files())
    if not found:
        world.restore_models()
        found = sorted(files())
    assert found, "there is nothing to cut"
    if rng.random() < 0.5:
        world.kill()
    _cut(found[int(rng.integers(len(found)))], rng)
    time.sleep(0.2)


def _cut(path: Path, rng: np.random.Generator) -> None:
    os.truncate(path, int(path.stat().st_size * rng.uniform(0, 1)))


# Frequency of each in percent, similar to that in hospitals.
FAULTS: dict[Fault, int] = {
    kill_server: 20,
    kill_server_alone: 6,
    kill_trainer: 8,
    kill_scorer: 8,
    fill_disk: 10,
    make_read_only: 8,
    cut_datastore_file: 4,
    cut_label: 8,
    cut_checkpoint: 5,
    cut_model_pointer: 3,
    cut_moments: 5,
    cut_write_ahead_log: 7,
    freeze_server: 4,
    stop_clock: 4,
}
# A study beside the annotators doubles the cost, so only long runs have it.
LONG_FAULTS: dict[Fault, int] = {**FAULTS, kill_referee: 5}
