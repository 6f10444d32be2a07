# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""After any fault, no acknowledged answer is lost, and no manual repair is needed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.faults.__main__ import deck, strike, summary
from tests.faults.kinds import FAULTS, LONG_FAULTS
from tests.faults.pool import make_pool
from tests.faults.world import World

COUNT, SEED = 16, 1


def do_harm(world: World) -> tuple[int, Path]:
    """An answer removed from ledger and journal, and a voxel changed in a label of another image."""
    with world.quiet():
        world.kill()
        lost, (image, _) = next(iter(world.told.answers.items()))
        with sqlite3.connect(world.state / "ledger.sqlite") as ledger:
            ledger.execute("DELETE FROM answered WHERE answer = ?", (lost,))
            ledger.execute("DELETE FROM answers WHERE id = ?", (lost,))
        (world.state / "journal.jsonl").unlink()
        world.restart()
        label = next(path for path in world.label_files() if image not in path.name)
        nifti = nib.load(label)
        array = np.array(nifti.dataobj)
        place = tuple(np.argwhere(array == 0)[0])
        array[place] = 1
        nib.save(nib.Nifti1Image(array, nifti.affine), label)
    return lost, label


def test_every_kind_of_fault_comes_up() -> None:
    chosen = deck(COUNT, np.random.default_rng(SEED))
    assert len(chosen) == COUNT
    assert set(chosen) == set(FAULTS)
    long = deck(500, np.random.default_rng(0), LONG_FAULTS)
    assert len(long) == 500
    assert set(long) == set(LONG_FAULTS)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [COUNT, pytest.param(40, marks=pytest.mark.slow)])
def test_after_faults_nothing_is_lost_or_wrong(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(SEED)
    images, labels = make_pool(tmp_path / "phantoms", 8)
    world = World(tmp_path / "world", images, labels)
    try:
        world.prepare()
        rows = list(strike(world, deck(count, rng), rng))
        found = summary(rows, world)
        lost, changed = do_harm(world)
        with world.quiet():
            noticed = world.problems()
        wrong = world.wrong_voxels()
    finally:
        world.close()
    assert [row for row in rows if row["problems"]] == []
    assert found["wrong_voxels"] == 0
    # Nothing of this would mean anything if real harm went unnoticed.
    assert any(line.startswith(f"answer {lost} ") and "was lost" in line for line in noticed)
    assert f"{changed}: 1 voxels differ from the rebuild from the raw answers" in noticed
    assert wrong == 1
    # The stream went on: otherwise there was nothing to lose.
    assert found["answers"] > count
