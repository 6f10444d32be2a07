# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Requests of clients to one server: responses, refusals, and no change by a wrong input."""

from __future__ import annotations

import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.system.conftest import BUNDLE, Client, Start, fill

UNLABELLED = 255


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    folder = tmp_path_factory.mktemp("http") / "studies"
    fill(folder, phantoms)
    return folder


@pytest.fixture(scope="module")
def client(start_server: Start, studies: Path) -> Client:
    return start_server(studies, members=2, batch=4, size="12,12,12")[1]


@pytest.fixture(scope="module")
def trained(client: Client) -> Client:
    """After one round: eight annotated regions, two members, moments of the pool."""
    for region in client.ask("random", batch=8, seed=5).json()["regions"]:
        assert client.submit(region["image"], queries=[region["query"]]).status_code == 200
    task = client.train(members=2, steps=5, patch=[16, 16, 16], seed=1)
    assert task["status"] == "DONE", task["details"]
    scored = client.http.post("/scoring/predictive_entropy", params={"run_sync": "true"}, json={})
    assert scored.json()["computed"] == 6
    return client


def snapshot(studies: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in studies.rglob("*") if p.is_file() and "sqlite" not in p.name}


def test_info_lists_what_clients_read(client: Client) -> None:
    info = client.http.get("/info/").json()
    assert info["labels"] == ["anterior", "posterior"]
    assert list(info["models"]) == ["query_region", BUNDLE]
    assert "anterior" in info["models"]["query_region"]["labels"]
    assert info["models"][BUNDLE]["labels"] == {"anterior": 1, "posterior": 2}
    assert info["patchwise"]["options"]["members"] == {"value": 2, "description": "ensemble members per training"}
    assert info["datastore"]["total"] == 6
    assert "random" in info["strategies"]


def test_a_round_through_the_server(trained: Client, studies: Path) -> None:
    info = trained.http.get("/info/").json()
    assert info["train_stats"][BUNDLE]["members"] == 2
    assert info["patchwise"]["model"]["round"] == 0
    labels = {p.name: np.asarray(nib.load(p).dataobj) for p in (studies / "labels" / "final").glob("*.nii.gz")}
    assert sum(int((label != UNLABELLED).sum()) for label in labels.values()) == 8 * 12**3
    for name, label in labels.items():
        truth = np.asarray(nib.load(trained.phantoms / "labelsTr" / name).dataobj)
        assert np.array_equal(label[label != UNLABELLED], truth[label != UNLABELLED])


@pytest.mark.parametrize("method", ["predictive_entropy", "bald", "power_pe", "power_bald", "random_fg_predicted"])
def test_regions_are_new_inside_and_leased(trained: Client, studies: Path, method: str) -> None:
    answer = trained.ask(method, batch=2, seed=1, client_id=f"ann-{method}").json()
    assert answer["id"] == answer["regions"][0]["image"]
    assert Path(answer["path"]).is_file()
    for region in answer["regions"]:
        shape = nib.load(studies / f"{region['image']}.nii.gz").shape
        stop = [s + d for s, d in zip(region["start"], region["size"], strict=True)]
        assert region["size"] == [12, 12, 12]
        assert all(b <= n for b, n in zip(stop, shape, strict=True))
        assert region["method"] == method
        assert region["score"] >= 0
        assert region["lease_until"] > "2026"
        label = studies / "labels" / "final" / f"{region['image']}.nii.gz"
        if label.exists():
            cut = np.asarray(nib.load(label).dataobj)[tuple(slice(a, b) for a, b in zip(region["start"], stop))]  # noqa: B905
            assert np.all(cut == UNLABELLED)


# One of each kind in every run; the others take their turn among the slow ones.
@pytest.mark.parametrize(
    "method",
    [
        *("clasp_pe", "core_set", "badge", "strided"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("uss", "usim_f", "stratified", "tta_jsd")),
    ],
)
def test_methods_of_every_kind_work_live(trained: Client, method: str) -> None:
    """Score for the method's own posterior, then query with a short lease, which frees the regions."""
    options = {"passes": 2} if method == "uss" else {}
    scoring = {"query_method": method, **options}
    scored = trained.http.post("/scoring/bald", params={"run_sync": "true"}, json=scoring)
    assert scored.status_code == 200, scored.text
    request = {"batch": 2, "seed": 1, "client_id": method, "lease_minutes": 1e-4, "size": [10, 10, 10]}
    answer = trained.ask(method, **request, **options).json()
    assert len(answer["regions"]) == 2, answer
    time.sleep(0.05)


def test_a_composed_method_scores_and_asks(trained: Client) -> None:
    parts = {"posterior": "ensemble", "uncertainty": "margin", "unit": "slice", "selector": "power", "beta": 5}
    answer = trained.ask("compose", batch=1, lease_minutes=1e-4, **parts).json()
    assert answer["regions"][0]["unit"] == "slice"
    assert answer["regions"][0]["size"][2] == 1
    refused = trained.ask("compose", batch=1, **{**parts, "selector": "masked_volume"})
    assert refused.status_code == 400
    assert "volume" in refused.json()["detail"]
    time.sleep(0.05)


def test_rounds_count_themselves_and_repeating_a_training_trains_nothing(trained: Client) -> None:
    before = trained.http.get("/info/").json()["patchwise"]["model"]
    region = trained.ask("random", batch=1, seed=71, size=[6, 6, 6]).json()["regions"][0]
    assert region["round"] == before["round"] + 1
    trained.train(members=2, steps=5, patch=[16, 16, 16], seed=1)
    assert trained.http.get("/info/").json()["patchwise"]["model"] == before


def test_a_query_tells_its_reason_and_shows_its_picture(trained: Client) -> None:
    region = trained.ask("bald", batch=1, seed=4, client_id="why", lease_minutes=1e-4).json()["regions"][0]
    told = trained.http.get(f"/patchwise/queries/{region['query']}").json()
    assert told["reason"]["uncertainty"] == "bald"
    assert told["reason"]["score"] == pytest.approx(region["score"])
    assert set(told["reason"]["predicted"]) <= {"background", "anterior", "posterior"}
    assert "step" not in told["reason"]
    steps = trained.ask("bald", batch=2, seed=5, client_id="steps", lease_minutes=1e-4, utilities=True).json()[
        "regions"
    ]
    found = [region["reason"]["step"]["utility"] for region in steps]
    assert found == sorted(found, reverse=True)
    picture = trained.http.get(told["picture"])
    assert picture.content.startswith(b"\x89PNG")
    assert trained.http.get("/patchwise/queries/999999").status_code == 404


def test_a_model_without_a_head_predicts_no_loss(trained: Client) -> None:
    reply = trained.ask("learning_loss", batch=1)
    assert reply.status_code == 409
    assert "learning_loss" in reply.json()["detail"]


def test_clients_that_ask_singly_share_a_batch_and_no_region(trained: Client) -> None:
    answers = [trained.ask("random", seed=9, client_id=f"reader{i}").json() for i in range(4)]
    queries = [answer["regions"][0]["query"] for answer in answers]
    assert all(len(answer["regions"]) == 1 for answer in answers)
    assert len(set(queries)) == 4
    assert answers[0]["PatientID"].endswith("region 1 of 4")
    assert answers[3]["PatientID"].endswith("region 4 of 4")


def test_the_same_request_id_gives_the_same_regions(trained: Client) -> None:
    first, again = (trained.ask("random", batch=2, request_id="r/1").json()["regions"] for _ in range(2))
    assert [r["query"] for r in first] == [r["query"] for r in again]


def test_query_region_draws_the_frame_of_the_clients_region(trained: Client, tmp_path: Path) -> None:
    region = trained.ask("random", batch=1, seed=31, client_id="frame").json()["regions"][0]
    reply = trained.http.post(
        "/infer/query_region",
        params={"image": region["image"], "output": "image"},
        data={"params": json.dumps({"client_id": "frame", "result_extension": ".nii.gz"})},
    )
    (tmp_path / "frame.nii.gz").write_bytes(reply.content)
    frame = np.asarray(nib.load(tmp_path / "frame.nii.gz").dataobj)
    start, size = np.array(region["start"]), np.array(region["size"])
    inside = tuple(slice(a, b) for a, b in zip(start, start + size, strict=True))
    expected = np.zeros(frame.shape, np.uint8)
    expected[tuple(slice(max(a - 1, 0), b + 1) for a, b in zip(start, start + size, strict=True))] = 1
    expected[inside] = 0
    assert np.array_equal(frame, expected)


def test_segmentation_lies_on_the_original_grid(trained: Client, studies: Path, tmp_path: Path) -> None:
    image = nib.load(next(studies.glob("*.nii.gz")))
    reply = trained.http.post(
        f"/infer/{BUNDLE}",
        params={"image": next(studies.glob("*.nii.gz")).name[:-7], "output": "image"},
        data={"params": json.dumps({"result_extension": ".nii.gz"})},
    )
    (tmp_path / "label.nii.gz").write_bytes(reply.content)
    label = nib.load(tmp_path / "label.nii.gz")
    assert label.shape == image.shape
    assert np.allclose(label.affine, image.affine, atol=1e-4)
    assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2}


def test_a_patch_larger_than_the_image_is_clipped_and_said(trained: Client, studies: Path) -> None:
    answer = trained.ask("random", batch=1, size=[400, 8, 8], seed=77, client_id="large").json()
    shape = nib.load(studies / f"{answer['id']}.nii.gz").shape
    assert answer["regions"][0]["size"] == [shape[0], 8, 8]
    assert "clipped" in answer["note"]


REFUSED = {
    "unknown method": (lambda c: c.ask("power_pi"), 404, "unknown method 'power_pi'.*power_pe"),
    "unknown option": (lambda c: c.ask("power_pe", betta=3), 400, "betta"),
    "option out of range": (lambda c: c.ask("power_pe", beta=-3), 400, "beta"),
    "size without sense": (lambda c: c.ask("random", size=[1, 2]), 400, "size"),
    "batch of none": (lambda c: c.ask("random", batch=0), 400, "batch"),
    "no hints": (lambda c: c.ask("random_fg33", batch=2), 400, "random_fg_predicted"),
    "unknown model": (lambda c: c.ask("bald", model="unet"), 404, "no model 'unet'"),
    "unknown training option": (lambda c: c.http.post(f"/train/{BUNDLE}", json={"stepz": 1}), 400, "stepz.*steps"),
    "training value": (lambda c: c.http.post(f"/train/{BUNDLE}", json={"members": 0}), 400, "members.*found 0"),
    "unknown bundle": (lambda c: c.http.post("/train/unet", json={}), 404, "no model 'unet' to train"),
    "unknown image": (lambda c: c.submit("nobody", next((c.phantoms / "labelsTr").glob("*.gz"))), 404, "no image"),
    "mirror that is neither": (
        lambda c: c.http.post(
            f"/infer/{BUNDLE}",
            params={"image": next((c.phantoms / "labelsTr").glob("*.gz")).name[:-7]},
            data={"params": '{"mirror": "maybe"}'},
        ), 400, "mirror must be true or false, found 'maybe'",
    ),
    "unknown image in infer": (lambda c: c.http.post("/infer/query_region?image=nobody"), 404, "no image 'nobody'"),
    "unknown class": (
        lambda c: c.submit("x", label_info=[{"name": "tumour", "idx": 1}]), 400, r"tumour.*known classes are anterior",
    ),
    "params without sense": (
        lambda c: c.http.put(
            "/datastore/label", params={"image": "x"}, data={"params": "{"}, files={"label": ("l.nii.gz", b"")}
        ), 400, "params must be a JSON object",
    ),
}  # fmt: skip


def settled(studies: Path) -> dict:
    """Snapshot of the folder once the server has finished what earlier requests left to its background threads."""
    while True:
        found = snapshot(studies)
        time.sleep(0.3)
        if snapshot(studies) == found:
            return found


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_are_one_sentence_and_change_nothing(trained: Client, studies: Path, name: str) -> None:
    import re

    work, status, sentence = REFUSED[name]
    image = sorted(studies.glob("*.nii.gz"))[0].name[:-7]
    original = trained.submit

    class Renamed(Client):
        def submit(self, image_id, label=None, **params):
            return original(image if image_id == "x" else image_id, label, **params)

    before, queries = settled(studies), trained.http.get("/info/").json()["patchwise"]["queries"]
    reply = work(Renamed(str(trained.http.base_url), trained.phantoms))
    assert reply.status_code == status, reply.text
    detail = reply.json()["detail"]
    assert isinstance(detail, str)
    assert re.search(sentence, detail), detail
    assert "\n" not in detail
    assert "Traceback" not in detail
    assert snapshot(studies) == before
    assert trained.http.get("/info/").json()["patchwise"]["queries"] == queries


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "nan"])
def test_an_unusable_image_in_the_pool_is_named(trained: Client, studies: Path, damage: str) -> None:
    path = studies / f"broken_{damage}.nii.gz"
    source = sorted(studies.glob("*.nii.gz"))[0]
    if damage == "truncated":
        path.write_bytes(source.read_bytes()[:5000])
    elif damage == "corrupt":
        path.write_bytes(b"no image at all")
    else:
        image = nib.load(source)
        array = np.asarray(image.dataobj).astype(np.float32)
        array[3, 3, 3] = np.nan
        nib.save(nib.Nifti1Image(array, image.affine), path)
    try:
        before = snapshot(studies)
        reply = trained.http.post("/scoring/predictive_entropy", params={"run_sync": "true"}, json={})
        assert reply.status_code == 200
        said = trained.http.get("/info/").json()["patchwise"]["left_out"]
        assert said[path.name].startswith(f"{path.name}: ")
        asked = trained.ask("random", batch=1, regions=[], size=[6, 6, 6], client_id="after").json()
        assert not asked or asked["id"] != path.name[:-7]
        assert {k: v for k, v in snapshot(studies).items() if "labels" in str(k)} == {
            k: v for k, v in before.items() if "labels" in str(k)
        }
    finally:
        path.unlink()


def test_nothing_left_to_ask_is_an_empty_answer(trained: Client) -> None:
    while trained.ask("random", batch=50, size=[24, 24, 24], client_id="last").json():
        pass
    assert trained.ask("random", batch=1, size=[24, 24, 24], client_id="last").json() == {}


def test_an_empty_pool_is_said_and_a_first_batch_needs_no_model(
    start_server: Start, tmp_path: Path, phantoms: Path
) -> None:
    fill(tmp_path / "studies", phantoms, count=0)
    server, client = start_server(tmp_path / "studies")
    reply = client.ask("random", batch=1, size=[8, 8, 8])
    assert reply.status_code == 409
    assert "the pool is empty" in reply.json()["detail"]
    fill(tmp_path / "studies", phantoms, count=4)
    first = client.ask("typiclust", batch=3, size=[12, 12, 12]).json()
    assert len(first["regions"]) == 3
    assert len({region["image"] for region in first["regions"]}) > 1
    server.stop()
