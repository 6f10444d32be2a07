# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The OHIF that MONAI Label ships, in a headless browser: connect, next sample, frame of the region, segmentation."""

from __future__ import annotations

import gzip
import io
import json

import httpx
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.browser import started_browser
from tests.dicom.conftest import KEPT, until
from tests.system.conftest import BUNDLE

# The views are drawn by WebGL, on the CPU.
FLAGS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
# The three views lie between the lists at both sides, below the toolbar.
VIEWS = {"x": 286, "y": 50, "width": 830, "height": 790}


class Viewer:
    """One browser page as an annotator uses it; every step leaves a picture."""

    def __init__(self, page, server):
        self.page, self.server, self.requests, self.failed = page, server, [], []
        page.on("request", lambda r: self.requests.append((r.method, r.url.removeprefix(server))))
        page.on("response", lambda r: self.failed.append(r.url) if r.status >= 400 and server in r.url else None)
        # Leaving the page opens a dialog.
        page.on("dialog", lambda dialog: dialog.accept())
        # Fonts are all that it wants from elsewhere.
        page.route("**/*", lambda route: route.continue_() if server in route.request.url else route.abort())
        page.route(lambda url: url.startswith(("data:", "blob:")), lambda route: route.continue_())

    def open(self, study):
        self.page.goto(f"{self.server}/ohif/monai-label?StudyInstanceUIDs={study}", wait_until="load")

    def connect(self):
        self.page.wait_for_selector("text=Server:", timeout=120_000)
        self.page.wait_for_selector("text=Studies", timeout=120_000)
        self.page.wait_for_timeout(8000)
        hide = self.page.locator("text=Confirm and Hide")
        if hide.count() and hide.first.is_visible():
            hide.first.click()
        address = self.page.locator('xpath=//*[contains(text(),"Server:")]/following::input[1]')
        address.fill(f"{self.server}/")
        address.locator("xpath=ancestor::tr[1]").locator("button").click()
        self.page.wait_for_selector("text=Next Sample", timeout=60_000)
        self.page.wait_for_timeout(1500)

    def run(self, model):
        section = self.page.locator("select").filter(has_text="query_region").first
        section.select_option(model)
        with self.page.expect_response(lambda r: f"/infer/{model}" in r.url, timeout=120_000) as answer:
            self.page.locator('button:has-text("Run")').first.click()
        self.page.wait_for_timeout(6000)
        return answer.value

    def picture(self, name):
        KEPT.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(KEPT / f"{name}.png"))
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(clip=VIEWS))).convert("RGB")).astype(int)


def coloured(picture):
    """Pixels with a colour: overlays of the scan, and the marks of the views."""
    return np.ptp(picture, axis=-1) > 40


@pytest.fixture(scope="module")
def site(make_orthanc, scans, serve, tmp_path_factory):
    orthanc, state = make_orthanc(), tmp_path_factory.mktemp("ohif") / "state"
    for scan in scans[:3]:
        orthanc.send(scan.files)
    server = serve(orthanc.url, state)
    http = httpx.Client(base_url=server.url, timeout=120)
    until(lambda: http.get("/info/").json()["patchwise"]["pacs"]["fetched"] == 3, 60, "the series are fetched")
    for _ in range(2):
        answer = http.post("/activelearning/random", json={"client_id": "ann"}).json()
        label = next(scan.label_xyz for scan in scans if scan.uid == answer["id"])
        affine = nib.load(state / f"{answer['id']}.nii.gz").affine
        info = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]
        reply = http.put(
            "/datastore/label",
            params={"image": answer["id"], "tag": "final"},
            data={"params": json.dumps({"client_id": "ann", "label_info": info, "whole": True})},
            files={"label": ("label.nii.gz", _packed(label, affine))},
        )
        assert reply.status_code == 200, reply.text
    assert http.post(f"/train/{BUNDLE}", json={}).status_code == 200
    until(lambda: http.get("/train/").json()["status"] not in ("SUBMITTED", "RUNNING"), 240, "the training ends")
    assert http.get("/train/").json()["status"] == "DONE"
    return server.url, scans


def _packed(label, affine):
    return gzip.compress(nib.Nifti1Image(label, affine).to_bytes())


@pytest.fixture(scope="module")
def viewer(site, chromium):
    with started_browser(*FLAGS) as browser:
        yield Viewer(browser.new_page(viewport={"width": 1400, "height": 850}), site[0])


def test_annotator_gets_a_region_and_sees_its_frame_and_a_segmentation(site, viewer):
    _, scans = site
    viewer.open(scans[0].study)
    viewer.connect()
    viewer.picture("1-connected")
    assert ("GET", "/info/") in viewer.requests
    page = viewer.page
    for name in ("anterior", "posterior", BUNDLE):
        assert page.get_by_text(name).count()

    page.locator("select").filter(has_text="power_pe").select_option("random")
    page.locator('button:has-text("Next Sample")').click()
    page.wait_for_selector("text=Active Learning - Next Sample", timeout=60_000)
    page.wait_for_timeout(500)
    viewer.picture("2-next-sample")
    shown = page.locator("body").inner_text()
    scan = next(scan for scan in scans if scan.uid in shown)
    assert f"{scan.case}: axial" in shown
    assert scan.study in shown

    with page.expect_navigation(timeout=60_000):
        page.locator('button:has-text("OK")').click()
    assert scan.study in page.url
    viewer.connect()
    before = viewer.picture("3-opened")
    answer = viewer.run("query_region")
    assert answer.status == 200
    assert scan.uid in answer.url
    assert "output=image" in answer.url
    framed = viewer.picture("4-region")
    added = coloured(framed) & ~coloured(before)
    # Lines in the views whose slice meets the region: many pixels, but a small share of the view.
    drawn = [np.count_nonzero(view) / view.size for view in np.array_split(added, 3, axis=1)]
    assert max(drawn) > 0.002
    assert max(drawn) < 0.25

    answer = viewer.run(BUNDLE)
    assert answer.status == 200
    viewer.picture("5-segmentation")
    # 404 means that no training runs.
    assert not [url for url in viewer.failed if "check_if_running" not in url]
