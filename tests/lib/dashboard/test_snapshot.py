# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import time
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from lib.annotator.explanations import Explanations
from lib.annotator.predicted_regions import PredictedRegions
from lib.automation import background_tasks
from lib.automation.background_tasks import Failures, how_it_ended
from lib.dashboard.counts import Counts
from lib.dashboard.snapshot import Snapshot
from lib.ledger.queries import QueryLedger
from lib.ledger.records import SECOND, Asked
from lib.models.checkpoints import Model
from lib.options import AppOptions
from lib.prediction.moments_cache import MomentsCache
from lib.prediction.posterior import DEEP_ENSEMBLE, PosteriorSpec
from lib.regions import Region
from lib.studies.datastore import STATE_FOLDER, PartialLabelDatastore
from lib.uncertainty import Moments
from tests.lib.clock import Clock
from tests.lib.models.facts import facts

CLASSES = {"anterior": 1, "posterior": 2}
INFO = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]
SHAPE = (8, 6, 4)
MODEL = Model(None, facts("d" * 64, members=2))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), np.eye(4)),
                 folder / f"{name}.nii.gz")  # fmt: skip
    return PartialLabelDatastore(folder, CLASSES, QueryLedger(folder / STATE_FOLDER / "ledger.sqlite", clock))


@pytest.fixture
def proposals(store, tmp_path):
    return PredictedRegions(
        tmp_path / "proposals", MomentsCache(tmp_path / "moments", store.image_path, store.image_digest)
    )


@pytest.fixture
def measures(store, proposals, tmp_path):
    return Counts(tmp_path / "measures.sqlite", store, proposals)


@pytest.fixture
def failures(store):
    return Failures(store.ledger)


@pytest.fixture
def progress(store, measures, proposals, failures, tmp_path):
    trainer = SimpleNamespace(store=SimpleNamespace(current=lambda: None), progress=dict)
    return Snapshot(
        store,
        measures,
        {"net": trainer},
        proposals.cache,
        Explanations(tmp_path / "reasons"),
        AppOptions(budget_minutes=60),
        None,
        failures,
        background_tasks,
    )


def told(progress):
    progress.refresh()
    return progress._make()


def asked(*starts, image="a", size=(2, 2, 2)):
    return [Asked(Region(image, (s, 0, 0), size), "patch", 1.0, {}) for s in starts]


def predict(proposals, label_xyz, image="a"):
    """Moments in the cache whose most probable class is `label_xyz`."""
    probs_cxyz = np.stack([np.where(label_xyz == c, 0.8, 0.1) for c in range(3)]).astype(np.float32)
    arrays = Moments.from_members([probs_cxyz, probs_cxyz]).to_arrays()
    path = proposals.cache.path(MODEL, image, DEEP_ENSEMBLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def submit(store, tmp_path, label_xyz, queries, image="a", client="ann", **info):
    store.ledger.leases.lease(queries, client, 60)
    path = tmp_path / "sent.nii.gz"
    nib.save(nib.Nifti1Image(label_xyz.astype(np.uint8), np.eye(4)), path)
    store.save_label(image, str(path), "final", {"queries": queries, "label_info": INFO, "client_id": client, **info})
    return store.ledger.answers.last(image)


def test_a_proposal_is_the_most_probable_class_inside_of_the_region(store, proposals):
    predicted = np.zeros(SHAPE, np.uint8)
    predicted[1:4, 0:2, 0:2] = 2
    predict(proposals, predicted)
    queries = store.ledger.ask("b1", "power_pe", 1, asked(0, 4), twice=[0])
    proposals.keep(queries, MODEL, PosteriorSpec(passes=3, dropout=0.1))
    proposals.wait()
    assert np.array_equal(proposals.get(queries[0].id), predicted[0:2, 0:2, 0:2])
    assert proposals.model(queries[0].id) == MODEL.digest
    # A second reading is compared with the prediction of the first.
    assert proposals.listed() == {query.id for query in queries if query.twin is None}


def test_without_moments_there_is_no_proposal(store, proposals):
    queries = store.ledger.ask("b1", "random", 0, asked(0))
    proposals.keep(queries, None)
    proposals.keep(queries, MODEL)
    proposals.wait()
    assert proposals.get(queries[0].id) is None
    assert proposals.model(queries[0].id) is None


def test_answers_are_compared_with_proposals_once_and_kept(store, proposals, measures, tmp_path):
    predict(proposals, np.ones(SHAPE, np.uint8))
    first, second = store.ledger.ask("b1", "power_pe", 1, asked(0, 4))
    proposals.keep([first, second], MODEL)
    proposals.wait()
    label = np.zeros(SHAPE, np.uint8)
    label[0:1, 0:2, 0:2] = 1
    label[1, 0, 0] = 2
    answer = submit(store, tmp_path, label, [first.id])
    measures.catch_up()
    # Of the region's 8 voxels all were proposed as anterior, 4 are; posterior was proposed nowhere, 1 is.
    assert {k: v.tolist() for k, v in measures.overlaps().items()} == {(first.id, answer): [[4, 8, 4], [0, 0, 1]]}
    assert measures.voxels() == {"a": {"background": 3, "anterior": 4, "posterior": 1}}
    only = submit(store, tmp_path, label * (label < 2), [second.id], annotated_classes=["anterior"])
    measures.catch_up()
    assert measures.overlaps()[second.id, only].tolist() == [[0, 8, 0], [0, 0, 0]]
    again = Counts(measures.path, store, proposals)
    revision = again.revision
    again.catch_up()
    assert again.revision == revision + 1
    assert again.voxels() == measures.voxels()
    assert set(again.overlaps()) == set(measures.overlaps())


def test_a_withdrawn_answer_leaves_the_counts(store, proposals, measures, progress, tmp_path):
    predict(proposals, np.ones(SHAPE, np.uint8))
    (query,) = store.ledger.ask("b1", "power_pe", 1, asked(0))
    proposals.keep([query], MODEL)
    proposals.wait()
    answer = submit(store, tmp_path, np.ones(SHAPE, np.uint8), [query.id])
    measures.catch_up()
    assert told(progress)["quality"]["batches"][0]["dice"] == 1
    store.withdraw_answer(answer, "ann")
    measures.catch_up()
    found = told(progress)
    assert (found["quality"]["batches"], found["voxels"], found["regions"]["returned"]) == ([], 0, 1)


def test_a_raw_file_that_is_gone_costs_one_region(store, proposals, measures, tmp_path):
    predict(proposals, np.ones(SHAPE, np.uint8))
    (query,) = store.ledger.ask("b1", "power_pe", 1, asked(0))
    proposals.keep([query], MODEL)
    proposals.wait()
    answer = submit(store, tmp_path, np.ones(SHAPE, np.uint8), [query.id])
    (store.studies / STATE_FOLDER / "raw" / store.ledger.answers.get(answer).raw).unlink()
    measures.catch_up()
    assert not measures.overlaps()[query.id, answer].any()


def test_the_report_adds_up(store, progress, measures, proposals, clock, tmp_path):
    ledger = store.ledger
    one, two, three, four = ledger.ask("b1", "random", 0, asked(0, 2, 4, 6))
    ledger.leases.lease([one.id, two.id, three.id], "ann", 60)
    clock.now += 120
    submit(store, tmp_path, np.ones(SHAPE, np.uint8), [one.id])
    clock.now += 30
    ledger.leases.skip(two.id, "ann", "motion")
    measures.catch_up()
    found = told(progress)
    assert found["images"] == {"total": 2, "annotated": 1}
    assert found["regions"] == {
        "answered": 1, "open": 1, "planned": 1, "returned": 0, "skipped": 1, "given up": 0,
    }  # fmt: skip
    assert found["minutes"] == {"used": pytest.approx(2.5), "budget": 60}
    (ann,) = found["annotators"]
    assert (ann["client"], ann["answered"], ann["open"], ann["skipped"], ann["voxels"]) == ("ann", 1, 1, 1, 8)
    assert ann["minutes"] == pytest.approx(2.5)
    assert found["classes"][1] == {"name": "anterior", "voxels": 8, "cases": 1, "share": 1.0}
    assert [(r["query"], r["status"]) for r in found["latest"]] == [
        (three.id, "open"), (four.id, "planned"), (one.id, "answered"),
    ]  # fmt: skip
    assert found["quality"]["advice"]["verdict"] == "too early to say"
    assert found["failures"] == []
    clock.now += 3601
    assert told(progress)["regions"]["returned"] == 1


def test_quality_is_told_batch_by_batch(store, progress, measures, proposals, clock, tmp_path):
    ledger = store.ledger
    random = ledger.ask("b0", "random", 0, asked(0))
    predict(proposals, np.ones(SHAPE, np.uint8))
    chosen = ledger.ask("b1", "power_pe", 1, asked(2, 4))
    proposals.keep(chosen, MODEL)
    proposals.wait()
    label = np.ones(SHAPE, np.uint8)
    label[4:6, 0, 0:2] = 0
    for query in (*random, *chosen):
        ledger.leases.lease([query.id], "ann", 60)
        clock.now += 60
        submit(store, tmp_path, label, [query.id])
    measures.catch_up()
    (batch,) = told(progress)["quality"]["batches"]
    assert (batch["round"], batch["known"], batch["regions"]) == (1, 1, 2)
    assert batch["minutes"] == pytest.approx(1)
    assert batch["dice"] == pytest.approx(2 * 12 / (16 + 12))
    assert batch["classes"] == (pytest.approx(2 * 12 / 28), None)


def test_answers_that_began_with_the_prediction_are_kept_apart(store, progress, measures, proposals, tmp_path):
    predict(proposals, np.ones(SHAPE, np.uint8))
    queries = store.ledger.ask("b1", "power_pe", 1, asked(0, 2, 4))
    proposals.keep(queries, MODEL)
    proposals.wait()
    half = np.ones(SHAPE, np.uint8)
    half[..., 0] = 0
    submit(store, tmp_path, half, [queries[0].id], start="nothing")
    submit(store, tmp_path, np.ones(SHAPE, np.uint8), [queries[1].id], start="prediction")
    submit(store, tmp_path, half, [queries[2].id])
    measures.catch_up()
    quality = told(progress)["quality"]
    (batch,) = quality["batches"]
    assert (quality["assisted"], batch["regions"]) == (1, 2)
    assert batch["dice"] == pytest.approx(2 * 4 / (8 + 4))
    submit(store, tmp_path, half, [queries[1].id], start="nothing")
    measures.catch_up()
    quality = told(progress)["quality"]
    assert (quality["assisted"], quality["batches"][0]["regions"]) == (0, 3)


def test_failures_are_told_until_the_next_success(progress, failures):
    failures.note("train", "x.nii.gz: not readable")
    (failure,) = told(progress)["failures"]
    assert (failure["what"], failure["sentence"], failure["retry_at"]) == ("training", "x.nii.gz: not readable", None)
    failures.note("train", None)
    assert told(progress)["failures"] == []


def test_how_a_run_ended_is_one_sentence(failures):
    log = ["[2026-01-01 10:00:00,000] [12] [MainThread] [INFO] (lib.training:7) - member 1/2 step 3/9", ""]
    task = {"status": "ERROR", "details": log}
    assert how_it_ended("train", task, failures, 0).endswith("its log ends with: member 1/2 step 3/9")
    refused = [*log, "[..] [ERROR] (main:3) - train refused: nothing is annotated yet"]
    assert how_it_ended("train", {"status": "ERROR", "details": refused}, failures, 0).endswith(
        "nothing is annotated yet"
    )
    assert how_it_ended("scoring", {"status": "STOPPED"}, failures, 0) == "the scoring was stopped by hand"
    failures.note("train", "no space left")
    assert how_it_ended("train", task, failures, 0) == "no space left"
    assert "without an error message" in how_it_ended("train", task, failures, time.time() + 60)


def test_waiting_second_readings_do_not_hold_a_round_up(store):
    ledger = store.ledger
    (first,) = ledger.ask("b1", "power_pe", 1, asked(0), twice=[0])
    (twin,) = ledger.batch("b1" + SECOND)
    assert ledger.overview.after_round(0) == (1, 0)
    ledger.leases.lease([first.id], "ann", 60)
    assert ledger.overview.planned_method(1) is None
    ledger.leases.release(first.id, "ann")
    assert (ledger.overview.after_round(0), ledger.overview.planned_method(1)) == ((0, 0), "power_pe")
    assert ledger.overview.after_round(1) == (0, 0)
    assert twin.twin == first.id
