# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Both pages have no violation that axe-core knows, and fit small and large screens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from eval.upkeep.viewer import Package, bring
from lib.annotator.viewer_file import viewer_place
from tests.system.conftest import BUNDLE
from tests.warm import WarmProcess, WarmServer

AXE = Package(
    "axe-core",
    "4.10.3",
    "sha512-Xm7bpRXnDSX2YE2YFfBk2FnF0ep6tmG7xPh8iHee8MIcrgq762Nkce856dYtJYLkuIoYZvGfTs/PbZhideTcEg==",
    "package/axe.min.js",
)


@pytest.fixture(scope="module")
def axe() -> Path:
    place = viewer_place().with_name(f"axe-core-{AXE.version}.js")
    bring(AXE, place)
    return place


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, warm: WarmProcess) -> Iterator[str]:
    studies = tmp_path_factory.mktemp("accessible") / "studies"
    studies.mkdir()
    image = np.random.default_rng(0).normal(100, 20, (40, 40, 40)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), studies / "a.nii.gz")
    conf = {"models": BUNDLE, "labels": "one,two", "size": "12,12,12"}
    server = WarmServer(studies, conf, log=studies.parent / "log", threads=1, warm=warm)
    server.start()
    yield server.url
    server.stop()


def violations(page: Page, axe: Path) -> list[Any]:
    page.add_script_tag(path=axe)
    found = page.evaluate("() => axe.run()")["violations"]
    return [(v["id"], v["impact"], [node["html"][:120] for node in v["nodes"]]) for v in found]


@pytest.mark.slow
@pytest.mark.parametrize("screen", [(1280, 720), (3840, 2160)])
def test_nothing_stands_in_the_way_of_keyboards_and_screen_readers(
    url: str, browser: Browser, axe: Path, screen: tuple[int, int]
) -> None:
    width, height = screen
    # axe is a script of its own, which the pages' content policy refuses.
    context = browser.new_context(viewport={"width": width, "height": height}, bypass_csp=True)
    page = context.new_page()
    try:
        page.goto(f"{url}/patchwise/annotate")
        page.wait_for_selector("#name[open]")
        assert violations(page, axe) == []
        page.fill("#name input[name=name]", "ann")
        page.click("#name button.main")
        page.wait_for_selector("body[data-query]")
        assert violations(page, axe) == []
        for button in ("#submit", "#skip", "#undo", "#help-open"):
            box = page.locator(button).bounding_box()
            assert box, button
            assert 0 <= box["x"] <= width - box["width"], button
            assert 0 <= box["y"] <= height - box["height"], button
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        page.goto(f"{url}/patchwise/")
        page.wait_for_selector("#content:not([hidden])")
        assert violations(page, axe) == []
    finally:
        context.close()
