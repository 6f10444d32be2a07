# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Two processes write, and one is killed while it writes: upstream's datastore loses data, this project's does not."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore

from lib.ledger.queries import QueryLedger
from lib.studies.datastore import PartialLabelDatastore

FORK = multiprocessing.get_context("fork")
Open = Callable[[Path], Datastore]


def upstream(folder: Path) -> LocalDatastore:
    return LocalDatastore(str(folder), extensions=["*.nii.gz"], auto_reload=False)


def ours(folder: Path) -> PartialLabelDatastore:
    return PartialLabelDatastore(folder, {"organ": 1}, QueryLedger(folder / ".patchwise" / "ledger.sqlite"))


def fill(folder: Path, count: int) -> list[str]:
    names = [f"scan_{number:03d}" for number in range(count)]
    folder.mkdir()
    for name in names:
        nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), folder / f"{name}.nii.gz")
    return names


def write_all(store: Datastore, names: list[str], side: str, start: multiprocessing.Barrier) -> None:
    start.wait()
    for name in names:
        store.update_image_info(name, {side: 1})


def kept_by_two(make: Open, folder: Path, names: list[str]) -> dict[str, int]:
    """Number of stored infos of each of two processes that both write an info about every image."""
    start = FORK.Barrier(2)
    writers = [FORK.Process(target=write_all, args=(make(folder), names, side, start)) for side in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = make(folder)
    return {side: sum(side in store.get_image_info(name) for name in names) for side in ("one", "two")}


def test_upstreams_datastore_loses_what_another_process_wrote(tmp_path: Path) -> None:
    names = fill(tmp_path / "studies", 40)
    assert min(kept_by_two(upstream, tmp_path / "studies", names).values()) < 40


def test_this_datastore_keeps_what_two_processes_write(tmp_path: Path) -> None:
    names = fill(tmp_path / "studies", 40)
    assert kept_by_two(ours, tmp_path / "studies", names) == {"one": 40, "two": 40}


def write_on(store: Datastore, names: list[str], said: int) -> None:
    """Write increasing numbers into the infos of the images, and print each number after it has been stored."""
    number = 0
    while True:
        number += 1
        store.update_image_info(names[number % len(names)], {"number": number})
        os.write(said, b"%d\n" % number)


def killed_while_writing(store: Datastore, names: list[str], seconds: float) -> int:
    """The last number that a process printed as stored before it was killed."""
    heard, said = os.pipe()
    writer = FORK.Process(target=write_on, args=(store, names, said))
    writer.start()
    os.close(said)
    first = os.read(heard, 64)
    time.sleep(seconds)
    writer.kill()
    writer.join()
    with os.fdopen(heard, "rb") as stream:
        lines = (first + stream.read()).split()
    return int(lines[-1])


def test_a_kill_while_upstream_writes_leaves_a_file_that_nobody_can_read(tmp_path: Path) -> None:
    names = fill(tmp_path / "studies", 300)
    rng = np.random.default_rng(0)
    path = tmp_path / "studies" / "datastore_v2.json"
    for _ in range(60):
        store = upstream(tmp_path / "studies")
        killed_while_writing(store, names, float(rng.uniform(0, 0.1)))
        try:
            json.loads(path.read_text())
        except json.JSONDecodeError:
            return
        path.unlink()
    pytest.fail("60 kills left a readable file: upstream writes atomically now, so the documents have to be changed")


def test_a_kill_while_this_datastore_writes_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    names = fill(tmp_path / "studies", 300)
    rng = np.random.default_rng(0)
    for _ in range(10):
        last = killed_while_writing(ours(tmp_path / "studies"), names, float(rng.uniform(0, 0.1)))
        kept = {name: ours(tmp_path / "studies").get_image_info(name)["number"] for name in names[1 : last + 1]}
        # The number after the last printed one may be stored too.
        assert kept[names[last % 300]] in (last, last + 300)
        assert all(1 <= number <= last + 1 for number in kept.values())
