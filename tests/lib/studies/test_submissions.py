# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The label after every save equals the one built from the raw answers, also with concurrent saves."""

from __future__ import annotations

import gzip
import multiprocessing
import tempfile
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.partial_labels import UNLABELLED
from lib.regions import Region
from lib.studies.merged_labels import MergedLabels
from lib.studies.submissions import SubmissionStore

CLASSES = {"anterior": 1, "posterior": 2}
INFO = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]
SHAPE = (6, 5, 4)
AFFINE = np.eye(4)


def write(path, array_xyz):
    nib.save(nib.Nifti1Image(array_xyz, AFFINE), path)
    return path


class World:
    """One image and its annotations in a folder."""

    def __init__(self, folder, shape=SHAPE):
        self.folder, self.shape = folder, shape
        (folder / "final").mkdir(exist_ok=True)
        self.annotations = SubmissionStore(
            folder / "state", folder / "final", CLASSES, QueryLedger(folder / "state" / "ledger.sqlite")
        )
        if not (folder / "a.nii.gz").exists():
            write(folder / "a.nii.gz", np.zeros(shape, np.float32))

    def ask(self, region, batch):
        (query,) = self.annotations.ledger.ask(batch, "random", 0, [Asked(region, "patch", None, {})])
        return query.id

    def save(self, label_xyz, query, client="ann", **info):
        self.annotations.ledger.leases.lease([query], client, 60)
        with tempfile.TemporaryDirectory() as folder:
            sent = write(Path(folder) / "label.nii.gz", label_xyz)
            told = {"queries": [query], "label_info": INFO, "client_id": client, **info}
            return self.annotations.save("a", self.folder / "a.nii.gz", sent, told)

    def on_disk(self):
        path = self.folder / "final" / "a.nii.gz"
        return np.asarray(nib.load(path).dataobj) if path.exists() else np.full(self.shape, UNLABELLED, np.uint8)

    def geometry(self, image):
        return self.shape, AFFINE


@st.composite
def regions(draw):
    start = [draw(st.integers(0, n - 1)) for n in SHAPE]
    return Region("a", tuple(start), tuple(draw(st.integers(1, n - s)) for n, s in zip(SHAPE, start, strict=True)))


steps = st.one_of(
    st.tuples(st.just("save"), regions(), st.integers(0, 99)),
    st.tuples(st.just("switch"), st.integers(0, 9)),
    st.tuples(st.just("damage")),
    st.tuples(st.just("restart")),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(steps, min_size=1, max_size=8))
def test_the_label_kept_up_to_date_is_the_one_made_anew(script):
    with tempfile.TemporaryDirectory() as folder:
        world, answers = World(Path(folder)), []
        for number, (what, *values) in enumerate(script):
            if what == "save":
                label_xyz = np.random.default_rng(values[1]).choice(np.array([0, 1, 2, 255], np.uint8), SHAPE)
                answers.append(world.save(label_xyz, world.ask(values[0], f"b{number}")))
            elif what == "switch" and answers:
                found = world.annotations.ledger.answers.get(answers[values[0] % len(answers)])
                change = world.annotations.withdraw if found.active else world.annotations.restore
                change(found.id, world.geometry, "ann")
            elif what == "damage" and answers and (world.folder / "final" / "a.nii.gz").exists():
                # The next save overwrites a manual edit of the file.
                write(world.folder / "final" / "a.nii.gz", np.ones(SHAPE, np.uint8))
                continue
            elif what == "restart":
                world = World(Path(folder))
                continue
            if answers:
                assert np.array_equal(world.on_disk(), world.annotations.rebuilt("a", SHAPE))


def test_a_save_reads_no_earlier_answer(tmp_path):
    world = World(tmp_path)
    ones, twos = np.full(SHAPE, 1, np.uint8), np.full(SHAPE, 2, np.uint8)
    world.save(ones, world.ask(Region("a", (0, 0, 0), (3, 5, 4)), "b1"))
    for raw in (tmp_path / "state" / "raw" / "a").iterdir():
        raw.unlink()
    world.save(twos, world.ask(Region("a", (2, 0, 0), (4, 5, 4)), "b2"))
    assert world.on_disk()[:, 0, 0].tolist() == [1, 1, 2, 2, 2, 2]


def test_an_answer_between_record_and_merge_is_taken_in_by_the_next_save(tmp_path):
    world = World(tmp_path)
    first = world.ask(Region("a", (0, 0, 0), (3, 5, 4)), "b1")
    raw = tmp_path / "state" / "raw" / "a"
    raw.mkdir(parents=True)
    sent = write(raw / "killed.nii.gz", np.full(SHAPE, 1, np.uint8))
    from lib.storage.atomic_files import file_digest

    ledger = world.annotations.ledger
    ledger.answers.record("a", "a/killed.nii.gz", file_digest(sent), {"label_info": INFO}, "ann", [
        (first, ledger.query(first).region)
    ])  # fmt: skip
    world.save(np.full(SHAPE, 2, np.uint8), world.ask(Region("a", (3, 0, 0), (3, 5, 4)), "b2"))
    assert world.on_disk()[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_classes_drawn_apart_are_put_together_anew(tmp_path):
    world = World(tmp_path)
    region = Region("a", (0, 0, 0), SHAPE)
    label_xyz = np.zeros(SHAPE, np.uint8)
    label_xyz[0], label_xyz[1] = 1, 2
    world.save(np.where(label_xyz == 1, 1, 0).astype(np.uint8), world.ask(region, "b1"), annotated_classes=["anterior"])
    world.save(
        np.where(label_xyz == 2, 2, 0).astype(np.uint8), world.ask(region, "b2"), annotated_classes=["posterior"]
    )
    assert np.array_equal(world.on_disk(), label_xyz)


def _save_each(folder, queries, value, failures):
    world = World(folder, (24, 4, 4))
    try:
        for query in queries:
            world.save(np.full(world.shape, value, np.uint8), query, client=f"ann{value}")
    except Exception as error:
        failures.append(error)
        raise


def slabs(world):
    return [world.ask(Region("a", (x, 0, 0), (1, 4, 4)), f"b{x}") for x in range(24)]


def test_threads_that_save_one_image_lose_nothing(tmp_path):
    world = World(tmp_path, (24, 4, 4))
    queries, failures = slabs(world), []
    threads = [
        threading.Thread(target=_save_each, args=(tmp_path, queries[k::3], k % 2 + 1, failures)) for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert world.on_disk()[:, 0, 0].tolist() == [1, 2, 1] * 8
    assert world.annotations.ledger.answers.unmerged() == []


def test_two_processes_that_save_one_image_lose_nothing(tmp_path):
    world = World(tmp_path, (24, 4, 4))
    queries = slabs(world)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_each, args=(tmp_path, queries[k::2], k + 1, [])) for k in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert world.on_disk()[:, 0, 0].tolist() == [1, 2] * 12
    assert np.array_equal(world.on_disk(), world.annotations.rebuilt("a", world.shape))


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_file_is_the_one_that_nibabel_writes(tmp_path, order):
    labels = MergedLabels(tmp_path, tmp_path / "locks")
    label_xyz = np.array(np.random.default_rng(0).integers(0, 3, SHAPE), np.uint8, order=order)
    affine = np.array([[0, -1.5, 0, 3], [1, 0, 0, 4], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    sha256 = labels.write("a", label_xyz, affine)
    nifti = nib.Nifti1Image(label_xyz, affine)
    assert gzip.decompress(labels.path("a").read_bytes()) == nifti.to_bytes()
    assert np.array_equal(labels.read("a", SHAPE, sha256), label_xyz)
    assert labels.write("a", label_xyz, affine) == sha256


@pytest.mark.parametrize("kind", ["missing", "changed", "other shape"])
def test_only_the_file_the_ledger_knows_is_read(tmp_path, kind):
    world = World(tmp_path)
    world.save(np.full(SHAPE, 1, np.uint8), world.ask(Region("a", (0, 0, 0), SHAPE), "b"))
    labels, sha256 = world.annotations.labels, world.annotations.ledger.answers.merged("a")[1]
    assert np.array_equal(labels.read("a", SHAPE, sha256), world.on_disk())
    if kind == "missing":
        labels.remove("a")
    if kind == "changed":
        write(labels.path("a"), np.full(SHAPE, 2, np.uint8))
    assert labels.read("a", (7, 5, 4) if kind == "other shape" else SHAPE, sha256) is None


@pytest.mark.parametrize("left", [0, 1, -5])
def test_a_label_that_was_cut_short_is_made_again_and_no_other(tmp_path, left):
    world = World(tmp_path)
    query = world.ask(Region("a", (1, 1, 1), (3, 2, 2)), "one")
    world.save(np.ones(SHAPE, np.uint8), query)
    path = tmp_path / "final" / "a.nii.gz"
    whole, images = path.read_bytes(), {"a": tmp_path / "a.nii.gz"}
    assert world.annotations.repair(images) == []
    path.write_bytes(whole[:left])
    assert world.annotations.repair(images) == ["a"]
    assert path.read_bytes() == whole
    assert world.annotations.repair(images) == []
