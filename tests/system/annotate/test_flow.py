# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""From one region to the next: drafts, empty answers, skips, second thoughts, and two people at once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest
from playwright.sync_api import expect

from lib.studies.datastore import STATE_FOLDER
from tests.system.annotate.conftest import AXIAL, Annotator, Open, ask_for, stored
from tests.system.conftest import BUNDLE
from tests.warm import WarmProcess, WarmServer


@pytest.fixture
def server(tmp_path: Path, warm: WarmProcess) -> Iterator[WarmServer]:
    studies = tmp_path / "studies"
    studies.mkdir()
    for name in "abc":
        image = np.random.default_rng(ord(name)).normal(100, 20, (30, 28, 26)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), studies / f"{name}.nii.gz")
    conf = {"models": BUNDLE, "labels": "one,two", "size": "12,12,12"}
    server = WarmServer(studies, conf, log=tmp_path / "log", threads=1, warm=warm)
    server.start()
    yield server
    server.stop()


def draw(ann: Annotator, shift: int = 0) -> None:
    middle = [a + d // 2 for a, d in zip(ann.start, ann.size, strict=True)]
    middle[1] += shift
    ann.drag([middle[0] - 3, *middle[1:]], [middle[0] + 2, *middle[1:]], AXIAL)


def queries(url: str) -> dict[int, dict]:
    found = {}
    for number in range(1, 50):
        reply = httpx.get(f"{url}/patchwise/queries/{number}")
        if reply.status_code == 404:
            return found
        found[number] = reply.json()
    return found


def test_a_draft_outlives_the_browser_and_the_server(server: WarmServer, annotator: Open) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    draw(ann)
    drawn, query = ann.label(), ann.query
    assert drawn.sum() == 6
    expect(ann.page.locator("#state")).to_have_text("draft kept", timeout=15_000)
    ann.page.context.close()
    server.stop()
    server.start()
    again = annotator(server.url)
    again.enter("ann", query)
    expect(again.page.locator("#state")).to_have_text("your draft was taken up again")
    np.testing.assert_array_equal(again.label(), drawn)
    other = annotator(server.url)
    other.enter("bob")
    assert other.query != query
    assert not other.label().any()


@pytest.mark.slow
def test_strokes_that_the_server_never_saw_are_kept_in_the_browser(server: WarmServer, annotator: Open) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    draw(ann)
    drawn, query = ann.label(), ann.query
    ann.page.evaluate("() => window.removeEventListener('beforeunload', () => null)")
    ann.page.on("dialog", lambda dialog: dialog.accept())
    ann.enter("ann", query)
    np.testing.assert_array_equal(ann.label(), drawn)


@pytest.mark.slow
def test_leaving_with_strokes_asks_first(server: WarmServer, annotator: Open) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    asked: list[str] = []
    ann.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    draw(ann)
    ann.page.close(run_before_unload=True)
    ann.page.wait_for_timeout(400)
    assert asked == ["beforeunload"]
    assert not ann.page.is_closed()


def test_an_empty_region_is_stored_only_if_the_annotator_says_so(
    server: WarmServer, annotator: Open, tmp_path: Path
) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    first = ann.query
    ann.page.keyboard.press("Enter")
    expect(ann.page.locator("#empty")).to_be_visible()
    ann.page.click("#empty button[value=no]")
    assert ann.query == first
    assert queries(server.url)[first]["status"] == "open"
    ann.page.keyboard.press("Enter")
    ann.page.click("#empty button[value=yes]")
    ann.page.wait_for_selector(f"body[data-query]:not([data-query='{first}'])")
    ann.wait_until_stored()
    done = queries(server.url)[first]
    assert done["status"] == "answered"
    box = tuple(slice(a, a + d) for a, d in zip(done["start"], done["size"], strict=True))
    label = stored(server.url, done["image"], tmp_path)
    assert not label[box].any()
    assert np.count_nonzero(label != 255) == 12**3


@pytest.mark.slow
def test_undo_redo_fill_copy_and_erase(server: WarmServer, annotator: Open) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    page = ann.page
    draw(ann)
    line = ann.label()
    page.keyboard.press("Control+z")
    assert not ann.label().any()
    page.keyboard.press("Control+y")
    np.testing.assert_array_equal(ann.label(), line)
    z = ann.size[2] // 2
    middle = [a + d // 2 for a, d in zip(ann.start, ann.size, strict=True)]
    ann.look_at([*middle[:2], middle[2] + 1])
    page.keyboard.press("c")
    np.testing.assert_array_equal(ann.label()[:, :, z + 1], line[:, :, z])
    page.keyboard.press("2")
    page.keyboard.press("f")
    page.mouse.click(*ann.at([middle[0], middle[1] + 3, middle[2] + 1], AXIAL))
    page.wait_for_timeout(100)
    filled = ann.label()[:, :, z + 1]
    assert (filled == 2).sum() == 12 * 12 - 6
    assert (ann.label()[:, :, z + 2] == 0).all()
    page.keyboard.press("e")
    ann.drag([middle[0] - 3, middle[1], middle[2] + 1], [middle[0] + 2, middle[1], middle[2] + 1], AXIAL)
    assert (ann.label()[:, :, z + 1] == 1).sum() == 0
    page.click("#clear")
    assert not ann.label().any()
    page.keyboard.press("p")
    for shift in (-2, 1):
        ann.look_at([*middle[:2], middle[2] + shift])
        ann.drag([middle[0] - 3, middle[1], middle[2] + shift], [middle[0] + 2, middle[1], middle[2] + shift], AXIAL)
    page.keyboard.press("b")
    expect(page.locator("#state")).to_have_text("12 voxels filled between axial slices")
    drawn = np.argwhere(ann.label())
    assert sorted(set(drawn[:, 2])) == [z - 2, z - 1, z, z + 1]
    assert len(drawn) == 4 * 6
    page.keyboard.press("b")
    expect(page.locator("#state")).to_contain_text("nothing to fill: draw each class on two axial slices")


@pytest.mark.slow
def test_skip_give_back_withdraw_and_restore(server: WarmServer, annotator: Open) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    first = ann.query
    ann.page.keyboard.press("s")
    ann.page.fill("#reason input", "outside of the body")
    ann.page.click("#reason button[value=yes]")
    ann.page.wait_for_selector(f"body[data-query]:not([data-query='{first}'])")
    told = queries(server.url)[first]
    assert (told["status"], told["note"]) == ("skipped", "outside of the body")
    second = ann.query
    ann.page.keyboard.press("r")
    expect(ann.page.locator("#message")).to_contain_text("The region was given back")
    assert queries(server.url)[second]["status"] == "released"
    for key in "rbs":
        ann.page.keyboard.press(key)
    expect(ann.page.locator("#message")).to_contain_text("The region was given back")
    expect(ann.page.locator("#reason")).to_be_hidden()
    ann.page.click("#message button")
    ann.wait_for()
    draw(ann)
    ann.submit()
    ann.page.click("#answers-open")
    ann.page.click("#answers .scroll button")
    expect(ann.page.locator("#answers .scroll button")).to_have_text("Restore")
    (answer,) = httpx.get(f"{server.url}/patchwise/answers").json()
    assert (answer["client"], answer["active"]) == ("ann", False)
    ann.page.click("#answers .scroll button")
    expect(ann.page.locator("#answers .scroll button")).to_have_text("Withdraw")
    assert httpx.get(f"{server.url}/patchwise/answers").json()[0]["active"] is True


@pytest.mark.slow
def test_two_people_at_once_get_different_regions(server: WarmServer, annotator: Open) -> None:
    people = [annotator(server.url) for _ in range(2)]
    for number, person in enumerate(people):
        person.enter(f"person{number}")
    for _ in range(2):
        assert people[0].query != people[1].query
        for person in people:
            draw(person)
            person.submit()
            person.wait_for()
    answered = [q["client"] for q in queries(server.url).values() if q["status"] == "answered"]
    assert sorted(answered) == ["person0", "person0", "person1", "person1"]


@pytest.mark.slow
def test_an_answer_that_a_dead_server_missed_is_stored_once_it_is_back(
    server: WarmServer, annotator: Open, tmp_path: Path
) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    draw(ann)
    drawn, query = ann.label(), ann.query
    ann.page.wait_for_timeout(500)  # the next region is fetched meanwhile
    server.stop()
    ann.page.keyboard.press("Enter")
    message = ann.page.locator("#message")
    expect(message).to_contain_text("was not stored. The server does not answer")
    expect(message).to_contain_text("kept in this browser")
    server.start()
    ann.page.click("#message button:text('Store again')")
    expect(message).to_be_hidden()
    ann.wait_until_stored()
    done = queries(server.url)[query]
    assert done["status"] == "answered"
    box = tuple(slice(a, a + d) for a, d in zip(done["start"], done["size"], strict=True))
    np.testing.assert_array_equal(stored(server.url, done["image"], tmp_path)[box], drawn)


@pytest.mark.slow
def test_keys_alone_lead_to_an_answer(server: WarmServer, annotator: Open) -> None:
    ann = annotator(server.url)
    ann.page.goto(f"{server.url}/patchwise/annotate")
    ann.page.wait_for_selector("#name[open]")
    ann.page.keyboard.type("ann")
    ann.page.keyboard.press("Enter")
    ann.wait_for()
    first = ann.query
    ann.page.keyboard.press("?")
    expect(ann.page.locator("#help")).to_be_visible()
    ann.page.keyboard.press("Escape")
    ann.page.keyboard.press("f")
    ann.page.keyboard.press("2")
    ann.page.keyboard.press("Space")
    ann.page.keyboard.press("Enter")
    ann.page.wait_for_selector(f"body[data-query]:not([data-query='{first}'])")
    ann.wait_until_stored()
    assert queries(server.url)[first]["status"] == "answered"
    assert ann.watched.errors == []


def test_a_start_from_the_prediction_is_recorded_also_after_a_crash(
    server: WarmServer, annotator: Open, tmp_path: Path
) -> None:
    box = (4, 6, 8), (10, 12, 8)
    (query,) = ask_for(server.url, "ann", ("a", *box))
    predicted = np.random.default_rng(1).integers(0, 3, box[1]).astype(np.uint8)
    folder = tmp_path / "studies" / STATE_FOLDER / "proposals"
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{query}.npz", label_xyz=predicted, model=np.array("d" * 64))
    ann = annotator(server.url)
    ann.enter("ann", query)
    ann.page.click("#from-prediction")
    expect(ann.page.locator("#state")).to_have_text("draft kept", timeout=15_000)
    ann.page.context.close()
    again = annotator(server.url)
    again.enter("ann", query)
    expect(again.page.locator("#state")).to_have_text("your draft was taken up again")
    again.submit()
    label = stored(server.url, "a", tmp_path)
    np.testing.assert_array_equal(label[4:14, 6:18, 8:16], predicted)
    page = again.page
    page.goto(f"{server.url}/patchwise/")
    expect(page.locator("#advice")).to_contain_text(
        "One answer that began with the model's own contours", timeout=20_000
    )


def test_a_lease_that_ran_out_is_renewed_by_the_next_stroke(
    annotator: Open, server: WarmServer, tmp_path: Path
) -> None:
    ann = annotator(server.url)
    ann.enter("ann")
    query = ann.query
    # The next region is fetched ahead; without waiting, that request would be given the freed region again.
    for _ in range(100):
        if len(queries(server.url)) > 1:
            break
        ann.page.wait_for_timeout(100)
    ledger = sqlite3.connect(tmp_path / "studies" / STATE_FOLDER / "ledger.sqlite")
    with ledger:
        # As after a request of anyone else once the time was up.
        ledger.execute("UPDATE queries SET status = 'expired', lease_until = 1 WHERE id = ?", (query,))
    ledger.close()
    draw(ann)
    expect(ann.page.locator("#state")).to_have_text("draft kept; the lease had run out and was renewed", timeout=15_000)
    told = queries(server.url)[query]
    assert (told["status"], told["client"]) == ("open", "ann")
    assert told["lease_until"] > datetime.now(timezone.utc).isoformat()
