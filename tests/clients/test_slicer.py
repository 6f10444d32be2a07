# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""3D Slicer against the real server: its requests byte for byte, and the labels that its exports become."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import httpx
import nibabel as nib
import numpy as np
import pytest
from monailabel.client.client import MONAILabelClientException, MONAILabelUtils

from eval.runner.server import ServerProcess
from lib.ledger.queries import QueryLedger
from tests.clients.conftest import SHAPE
from tests.clients.slicer import SlicerModule, recorded
from tests.clients.wire import AUTH, get, multipart, sent
from tests.system.conftest import BUNDLE

UNLABELLED = 255
START, SIZE = (6, 5, 4), (5, 4, 3)
INSIDE = (slice(6, 11), slice(5, 9), slice(4, 7))
AROUND = (slice(5, 12), slice(4, 10), slice(3, 8))
ANTERIOR = (slice(0, 8), slice(0, 16), slice(0, 12))  # reaches out of the region
POSTERIOR = (slice(8, 10), slice(6, 20), slice(5, 6))


@pytest.fixture
def slicer(server: ServerProcess, tmp_path: Path, request: pytest.FixtureRequest) -> SlicerModule:
    """A Slicer of an annotator of their own, connected."""
    module = SlicerModule(server.url, tmp_path / "slicer", client_id=request.node.originalname)
    module.fetch_info()
    return module


def hand_out(slicer: SlicerModule, image: str, *boxes: tuple[Sequence[int], Sequence[int]]) -> list[dict[str, Any]]:
    """Regions of the test's own choice for this annotator."""
    regions = [{"image": image, "start": list(start), "size": list(size)} for start, size in boxes]
    request = {"regions": regions, "batch": len(regions), "client_id": slicer.client_id}
    reply = httpx.post(f"{slicer.url}/activelearning/precomputed", json=request, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["regions"]


def work_on(slicer: SlicerModule, studies: Path, image: str, *boxes: tuple[Sequence[int], Sequence[int]]) -> list[int]:
    """The scene after Next Sample with these regions, drawn by hand: anterior up to plane 7, posterior beside it."""
    queries = [region["query"] for region in hand_out(slicer, image, *boxes)] if boxes else []
    slicer.load({"id": image}, studies / f"{image}.nii.gz")
    if boxes:
        slicer.run()
    slicer.segments["anterior"][ANTERIOR] = True
    slicer.segments["posterior"][POSTERIOR] = True
    return queries


def drawn() -> np.ndarray:
    """Drawn segments as class ids."""
    label = np.zeros(SHAPE, np.uint8)
    label[ANTERIOR] = 1
    label[POSTERIOR] = 2
    return label


def only(label: np.ndarray, *boxes: tuple[slice, slice, slice]) -> np.ndarray:
    """A label map that is unlabelled outside of some boxes."""
    kept = np.full(SHAPE, UNLABELLED, np.uint8)
    for box in boxes:
        kept[box] = label[box]
    return kept


def final(studies: Path, image: str) -> np.ndarray:
    return np.asarray(nib.load(studies / "labels" / "final" / f"{image}.nii.gz").dataobj)


def stored(studies: Path, image: str) -> bool:
    raw = studies / ".patchwise" / "raw" / image
    return (studies / "labels" / "final" / f"{image}.nii.gz").exists() or (raw.exists() and any(raw.iterdir()))


def test_what_slicer_reads_of_the_server(server: ServerProcess, slicer: SlicerModule) -> None:
    with recorded(server.port) as requests:
        slicer.fetch_info()
    assert requests == [AUTH, get("/info/"), AUTH, get("/train/?check_if_running=true")]
    info = slicer.info
    assert not info.get("config")
    assert info["labels"] == ["anterior", "posterior"]
    assert list(info["models"]) == ["query_region", BUNDLE]
    assert {model["type"] for model in info["models"].values()} == {"segmentation"}
    assert set(info["trainers"]) == {BUNDLE}
    assert info["datastore"]["total"] == 16
    assert all(isinstance(stats.get("best_metric", 0), (int, float)) for stats in info["train_stats"].values())


def test_options_fit_the_table_in_which_slicer_shows_and_from_which_it_sends_them(slicer: SlicerModule) -> None:
    sections = ("models", "trainers", "strategies", "scoring")
    configs = [part.get("config", {}) for section in sections for part in slicer.info[section].values()]
    for value in [value for config in configs for value in config.values()]:
        choices = isinstance(value, list) and value and all(isinstance(choice, str) for choice in value)
        assert choices or isinstance(value, (bool, int, float, str)), value
    assert slicer.config("models", "query_region") == {"format": "segment"}
    assert slicer.config("models", BUNDLE) == {"mirror": True}
    assert slicer.config("trainers", BUNDLE) == {"recipe": "default", "members": 1, "seed": 0}


def test_a_region_in_slicer_from_next_sample_to_submission(
    server: ServerProcess, slicer: SlicerModule, studies: Path
) -> None:
    work_on(slicer, studies, "scan 7+8", (START, SIZE))
    frame = np.zeros(SHAPE, bool)
    frame[AROUND] = True
    frame[INSIDE] = False
    assert list(slicer.segments) == ["anterior", "posterior", "query_region"]
    assert np.array_equal(slicer.segments["query_region"], frame)
    with recorded(server.port) as requests:
        saved = slicer.submit()
    params = (
        '{"label_info": [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}, '
        '{"name": "query_region", "idx": 3}], "client_id": "' + slicer.client_id + '"}'
    )
    label = slicer.folder / "tmp8w2kq.nii.gz"
    assert requests == [
        AUTH, multipart("PUT", "/datastore/label?image=scan+7%2B8", params, label),
        AUTH, get("/info/"),
        AUTH, get("/train/?check_if_running=true"),
    ]  # fmt: skip
    assert saved["image"] == saved["label"] == "scan 7+8"
    assert saved["labelled_voxels"] == 5 * 4 * 3
    assert np.array_equal(final(studies, "scan 7+8"), only(drawn(), INSIDE))
    # By hand: anterior in planes 6 and 7, posterior in 8 and 9 of rows 6 to 8 of slice 5, nothing in plane 10.
    assert final(studies, "scan 7+8")[6:11, 6, 5].tolist() == [1, 1, 2, 2, 0]
    assert final(studies, "scan 7+8")[6:11, 5, 5].tolist() == [1, 1, 0, 0, 0]
    assert final(studies, "scan 7+8")[5, 6, 5] == UNLABELLED
    assert slicer.info["datastore"]["completed"] >= 1


def test_segments_may_be_in_any_order(slicer: SlicerModule, studies: Path) -> None:
    work_on(slicer, studies, "scan_00", (START, SIZE))
    slicer.segments = {name: slicer.segments[name] for name in ("query_region", "posterior", "anterior")}
    # Where segments overlap the later one wins, in Slicer's export as here.
    slicer.segments["anterior"][POSTERIOR] = False
    slicer.submit()
    assert np.array_equal(final(studies, "scan_00"), only(drawn(), INSIDE))


def test_a_missing_segment_and_an_empty_extra_one_shift_nothing(slicer: SlicerModule, studies: Path) -> None:
    work_on(slicer, studies, "scan_01", (START, SIZE))
    slicer.segments = {
        "Segment_1": np.zeros(SHAPE, bool),
        "posterior": slicer.segments["posterior"],
        "query_region": slicer.segments["query_region"],
    }
    slicer.submit()
    expected = drawn()
    expected[expected == 1] = 0
    assert np.array_equal(final(studies, "scan_01"), only(expected, INSIDE))


@pytest.mark.parametrize("name", ["Anterior part", "Segment_1"])
def test_a_renamed_or_extra_segment_with_voxels_is_refused_in_a_sentence(
    slicer: SlicerModule, studies: Path, name: str
) -> None:
    image = {"Anterior part": "scan_02", "Segment_1": "scan_03"}[name]
    work_on(slicer, studies, image, (START, SIZE))
    if name == "Segment_1":
        slicer.segments[name] = np.zeros(SHAPE, bool)
        slicer.segments[name][0, 0, 0] = True
    else:
        slicer.segments = {name if old == "anterior" else old: mask for old, mask in slicer.segments.items()}
    with pytest.raises(MONAILabelClientException) as refused:
        slicer.submit()
    # Slicer shows this text in its error window.
    assert "Status: 400" in refused.value.msg
    assert f"({name}) are not classes of this project; known classes are anterior, posterior" in refused.value.msg
    assert not stored(studies, image)


def test_a_segment_that_slicer_leaves_out_shifts_no_class(slicer: SlicerModule, studies: Path) -> None:
    work_on(slicer, studies, "scan_04", (START, SIZE))
    slicer.segments = {"background": np.ones(SHAPE, bool), **slicer.segments}
    slicer.submit()
    assert np.array_equal(final(studies, "scan_04"), only(drawn(), INSIDE))
    (answer,) = QueryLedger(studies / ".patchwise" / "ledger.sqlite").answers.of_image("scan_04")
    assert answer.client == slicer.client_id
    assert [entry["idx"] for entry in answer.info["label_info"]] == [1, 2, 3]
    assert [entry["idx"] for entry in answer.info["label_info_sent"]] == [2, 3, 4]


def test_a_shift_that_cannot_be_told_from_none_is_refused(slicer: SlicerModule, studies: Path) -> None:
    work_on(slicer, studies, "scan_05", (START, SIZE))
    slicer.segments = {"background": np.ones(SHAPE, bool), **slicer.segments}
    slicer.segments["anterior"][:] = False
    with pytest.raises(MONAILabelClientException) as refused:
        slicer.submit()
    assert "may mean anterior (its idx) or posterior (its place" in refused.value.msg
    assert not stored(studies, "scan_05")


def test_what_was_painted_into_the_frame_by_mistake_is_refused(slicer: SlicerModule, studies: Path) -> None:
    work_on(slicer, studies, "scan_06", (START, SIZE))
    slicer.segments["query_region"][7:10, 6, 5] = True
    with pytest.raises(MONAILabelClientException) as refused:
        slicer.submit()
    assert "3 voxels inside of the region are painted into the segment query_region" in refused.value.msg
    assert not stored(studies, "scan_06")
    # Moved to its class and submitted again, as the message requires.
    slicer.segments["query_region"][7:10, 6, 5] = False
    slicer.submit()
    assert np.array_equal(final(studies, "scan_06"), only(drawn(), INSIDE))


def test_a_second_submission_is_kept_beside_the_first_and_wins(slicer: SlicerModule, studies: Path) -> None:
    (query,) = work_on(slicer, studies, "scan_07", (START, SIZE))
    first = slicer.submit()
    slicer.segments["anterior"][6] = False
    second = slicer.submit()
    assert first["queries"] == second["queries"] == [query]
    expected = drawn()
    expected[6] = 0
    assert np.array_equal(final(studies, "scan_07"), only(expected, INSIDE))
    answers = httpx.get(f"{slicer.url}/patchwise/answers", params={"image": "scan_07"}).json()
    assert [answer["queries"] for answer in answers] == [[query], [query]]
    raw = [np.asarray(nib.load(studies / ".patchwise" / "raw" / answer["raw"]).dataobj) for answer in answers]
    assert [array[6, 5, 4] for array in raw] == [1, 0]


def test_two_regions_of_an_image_are_two_frames_and_one_submission(slicer: SlicerModule, studies: Path) -> None:
    other, there = ((14, 1, 1), (4, 3, 2)), (slice(14, 18), slice(1, 4), slice(1, 3))
    queries = work_on(slicer, studies, "scan_08", (START, SIZE), other)
    frame = np.zeros(SHAPE, bool)
    frame[AROUND] = frame[13:19, 0:5, 0:4] = True
    frame[INSIDE] = frame[there] = False
    assert np.array_equal(slicer.segments["query_region"], frame)
    assert slicer.submit()["queries"] == queries
    assert np.array_equal(final(studies, "scan_08"), only(drawn(), INSIDE, there))
    slicer.segments["posterior"][there] = True
    assert slicer.submit()["queries"] == queries
    expected = drawn()
    expected[there] = 2
    assert np.array_equal(final(studies, "scan_08"), only(expected, INSIDE, there))


def test_a_submission_without_an_open_region_is_refused(
    server: ServerProcess, slicer: SlicerModule, studies: Path, tmp_path: Path
) -> None:
    holder = SlicerModule(server.url, tmp_path / "holder", client_id="somebody_else")
    hand_out(holder, "scan_09", (START, SIZE))
    work_on(slicer, studies, "scan_09")
    with pytest.raises(MONAILabelClientException) as refused:
        slicer.submit()
    assert f"{slicer.client_id} has no open region on scan_09; ask for the next region first" in refused.value.msg
    assert not stored(studies, "scan_09")


def test_an_image_nobody_was_asked_about_is_annotated_whole(slicer: SlicerModule, studies: Path) -> None:
    work_on(slicer, studies, "scan_10")
    assert slicer.submit()["labelled_voxels"] == 20 * 16 * 12
    assert np.array_equal(final(studies, "scan_10"), drawn())


def test_a_volume_of_the_annotators_own_is_uploaded_and_annotated_whole(
    server: ServerProcess, slicer: SlicerModule, studies: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own_scan.nii.gz"
    shutil.copy(studies / "scan_10.nii.gz", own)
    with recorded(server.port) as requests:
        slicer.upload(own)
    params = json.dumps({"client_id": slicer.client_id})
    file = slicer.folder / "tmp3hx71.nii.gz"
    assert requests == [AUTH, multipart("PUT", "/datastore/?image=own_scan", params, file, "file")]
    assert (studies / "own_scan.nii.gz").read_bytes() == own.read_bytes()
    slicer.segments["anterior"][ANTERIOR] = True
    slicer.segments["posterior"][POSTERIOR] = True
    slicer.submit()
    assert np.array_equal(final(studies, "own_scan"), drawn())


def test_a_whole_volume_that_was_asked_for_has_a_frame_along_its_edges(slicer: SlicerModule, studies: Path) -> None:
    work_on(slicer, studies, "scan_11", ((0, 0, 0), SHAPE))
    assert slicer.segments["query_region"][0, 0].all()
    assert not slicer.segments["query_region"][1:-1, 1:-1, 1:-1].any()
    slicer.segments["query_region"] &= drawn() == 0  # painting takes voxels from other segments
    slicer.submit()
    assert np.array_equal(final(studies, "scan_11"), drawn())


def test_regions_as_markups_are_boxes_in_millimetres(
    server: ServerProcess, slicer: SlicerModule, studies: Path
) -> None:
    hand_out(slicer, "scan_12", (START, SIZE), ((14, 1, 1), (4, 3, 2)))
    slicer.load({"id": "scan_12"}, studies / "scan_12.nii.gz")
    # The first column of the option's choice box in the table of options.
    slicer.info["models"]["query_region"]["config"]["format"] = ["markups", "segment"]
    with recorded(server.port) as requests:
        slicer.run()
    params = '{"format": "markups", "result_extension": ".nrrd", "result_dtype": "uint8", "client_id": "%s"}'
    assert requests == [AUTH, multipart("POST", "/infer/query_region?image=scan_12", params % slicer.client_id)]
    assert "query_region" not in slicer.segments
    first, second = slicer.rois
    # Middle of voxels 6-10, 5-8, 4-6 is 8, 6.5, 5; x = -1.6 i - 0.6 j + 10, y = -1.2 i + 0.8 j - 20, z = 3 k + 5;
    # LPS negates x and y. The image is stored left-handed, so the last axis of the box is reversed.
    assert first["center"] == pytest.approx([6.7, 24.4, 20.0], abs=1e-4)
    assert first["size"] == pytest.approx([5 * 2, 4 * 1, 3 * 3], abs=1e-4)
    assert first["orientation"] == pytest.approx([0.8, 0.6, 0, 0.6, -0.8, 0, 0, 0, -1], abs=1e-6)
    assert first["name"] == "scan_12: axial 4-6, region 1 of 2"
    assert second["name"] == "scan_12: axial 1-2, region 2 of 2"
    slicer.load({"id": "scan_14"}, studies / "scan_14.nii.gz")
    slicer.run()
    assert slicer.rois == []
    assert not slicer.segments["query_region"].any()
    refused = httpx.post(
        f"{slicer.url}/infer/query_region?image=scan_12", data={"params": json.dumps({"format": "stl"})}
    )
    assert (refused.status_code, refused.json()["detail"]) == (400, "format must be segment or markups, found 'stl'")


@pytest.mark.slow
def test_training_from_slicer_is_started_watched_stopped_and_used(
    server: ServerProcess, slicer: SlicerModule, studies: Path
) -> None:
    work_on(slicer, studies, "scan_13", (START, SIZE))
    slicer.submit()
    slicer.model = BUNDLE
    with pytest.raises(MONAILabelClientException) as refused:
        slicer.run()
    assert "has not been trained yet" in refused.value.msg
    with recorded(server.port) as requests:
        started = slicer.train(BUNDLE)
        assert slicer.training_runs()
        assert slicer.training_status()["status"] in ("SUBMITTED", "RUNNING")
        stopped = slicer.stop_training()
    body = json.dumps({"recipe": "default", "members": 1, "seed": 0, "client_id": slicer.client_id}).encode()
    assert requests[1::2] == [
        sent("POST", f"/train/{BUNDLE}", "application/json", body),
        get("/train/?check_if_running=true"),
        get("/train/"),
        b"DELETE /train/ HTTP/1.1\r\nHost: SERVER\r\nAccept-Encoding: identity\r\n\r\n",
    ]
    assert requests[::2] == [AUTH] * 4
    assert {"id", "status", "start_ts"} <= started.keys()
    assert stopped["status"] == "STOPPED"
    assert not slicer.training_runs()
    slicer.train(BUNDLE)
    while (status := slicer.training_status())["status"] in ("SUBMITTED", "RUNNING"):
        time.sleep(0.5)
    assert status["status"] == "DONE", status["details"]
    slicer.fetch_info()
    slicer.run()
    assert slicer.model == BUNDLE
    assert slicer.segments["anterior"].shape == SHAPE
    assert not (slicer.segments["anterior"] & slicer.segments["posterior"]).any()
    # Slicer requests 300 lines; all servers of an app folder write into one log.
    code, log, _, _ = MONAILabelUtils.http_method("GET", server.url, "/logs/?lines=100000&text=true")
    assert code == 200
    assert b"member 1/1 step 2/2" in log


@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "download"])
def test_next_sample_runs_the_first_model_by_itself(
    server: ServerProcess, slicer: SlicerModule, studies: Path, shared: bool
) -> None:
    with recorded(server.port) as requests:
        slicer.next_sample("random", shared)
    image = slicer.sample["id"]
    region = slicer.sample["regions"][0]
    asked, shown = requests[1], requests[-1]
    who = json.dumps({"client_id": slicer.client_id}).encode()
    assert asked == sent("POST", "/activelearning/random", "application/json", who)
    assert get("/datastore/?output=all") in requests
    params = '{"format": "segment", "result_extension": ".nrrd", "result_dtype": "uint8", "client_id": "%s"}'
    path = f"/infer/query_region?image={quote_plus(image)}"
    assert shown == multipart("POST", path, params % slicer.client_id)
    # The text a radiologist reads is the name of the volume.
    first = region["start"][2]
    place = f"{image}: axial {first}-{first + 3}, region {region['rank'] + 1} of 4"
    assert slicer.volume_name == place
    box = tuple(slice(a, a + d) for a, d in zip(region["start"], region["size"], strict=True))
    assert slicer.segments["query_region"].any()
    assert not slicer.segments["query_region"][box].any()
    told = httpx.get(f"{slicer.url}/patchwise/queries/{region['query']}").json()
    assert told["opened"]
    assert told["client"] == slicer.client_id
