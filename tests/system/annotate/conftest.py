# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The annotation page in headless Chromium, with real mouse and keyboard events, on a real server."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page

from lib.annotator.viewer_file import viewer_file
from tests.browser import Watched, started_browser

# WebGL 2 without a graphics card.
FLAGS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
AXIAL, CORONAL, SAGITTAL = 0, 1, 2
# Axes of the view (right, anterior, superior) within each plane, and across it.
PLANES = {AXIAL: (0, 1, 2), CORONAL: (0, 2, 1), SAGITTAL: (1, 2, 0)}


# Not for the session: Playwright runs once at a time, and tests of other pages on the same worker start their own.
@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    assert viewer_file() is not None, "run `make viewer`"
    with started_browser(*FLAGS) as found:
        yield found


@dataclass
class Annotator:
    """One person at the page."""

    page: Page
    url: str
    watched: Watched = field(init=False)

    def __post_init__(self) -> None:
        self.watched = Watched(self.page)

    def enter(self, name: str, query: int | None = None) -> None:
        """Load the page, give the name, and wait for a region."""
        self.page.goto(f"{self.url}/patchwise/annotate")
        self.page.fill("#name input[name=name]", name)
        self.page.click("#name button.main")
        self.wait_for(query)

    def wait_for(self, query: int | None = None) -> None:
        self.page.wait_for_selector("body[data-query]" if query is None else f"body[data-query='{query}']")

    @property
    def query(self) -> int:
        return int(self.page.get_attribute("body", "data-query") or 0)

    @property
    def start(self) -> list[int]:
        return self.page.evaluate("() => window.viewer.label.start")

    @property
    def size(self) -> list[int]:
        return self.page.evaluate("() => window.viewer.label.size")

    def label(self) -> NDArray[np.uint8]:
        """Label of the region in the axes of the view."""
        voxels = self.page.evaluate("() => Array.from(window.viewer.label.voxels)")
        return np.array(voxels, np.uint8).reshape(self.size, order="F")

    def at(self, voxel: Sequence[int], plane: int) -> tuple[float, float]:
        """Place on the screen of a voxel of the view, in a plane that shows it."""
        found = self.page.evaluate(
            "([voxel, plane]) => { const nv = window.viewer.nv, box = nv.canvas.getBoundingClientRect();"
            " const at = nv.frac2canvasPosWithTile(nv.vox2frac(voxel), plane);"
            " return at && [at.pos[0] / nv.uiData.dpr + box.left, at.pos[1] / nv.uiData.dpr + box.top]; }",
            [list(voxel), plane],
        )
        assert found, f"plane {plane} does not show {voxel}"
        return found[0], found[1]

    def look_at(self, voxel: Sequence[int]) -> None:
        """Put the crosshair on a voxel without drawing."""
        self.page.evaluate("voxel => window.viewer.jump(voxel)", list(voxel))
        self.page.wait_for_timeout(60)

    def drag(self, start: Sequence[int], end: Sequence[int], plane: int) -> None:
        """Press on a voxel, move to another one and let go."""
        (x, y), (u, v) = self.at(start, plane), self.at(end, plane)
        mouse = self.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.move((x + u) / 2, (y + v) / 2, steps=4)
        mouse.move(u, v, steps=4)
        mouse.up()
        self.page.wait_for_timeout(80)

    def submit(self) -> None:
        """Submit by key, and wait for the next region or the end."""
        before = self.query
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector(f"body:not([data-query='{before}'])")
        self.wait_until_stored()

    def wait_until_stored(self) -> None:
        """Wait until the server has answered for every region that was submitted."""
        self.page.wait_for_selector("body:not([data-storing])")

    def view(self) -> nib.Nifti1Image:
        """The file of the region that the page shows."""
        content = httpx.get(f"{self.url}/patchwise/regions/{self.query}/image.nii").content
        return nib.Nifti1Image.from_stream(io.BytesIO(content))


Open = Callable[..., Annotator]


@pytest.fixture
def annotator(browser: Browser) -> Iterator[Open]:
    """Make people at the page of a server; each has a browser profile of its own."""
    contexts = []

    def make(url: str, **options: Any) -> Annotator:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}, **options))
        return Annotator(contexts[-1].new_page(), url)

    yield make
    for context in contexts:
        context.close()


def ask_for(url: str, client: str, *regions: tuple[str, Sequence[int], Sequence[int]]) -> list[int]:
    """Lease given regions to a client; return the numbers of the queries."""
    told = [{"image": image, "start": list(start), "size": list(size)} for image, start, size in regions]
    reply = httpx.post(
        f"{url}/activelearning/precomputed", json={"client_id": client, "batch": len(told), "regions": told}
    )
    assert reply.status_code == 200, reply.text
    return [region["query"] for region in reply.json()["regions"]]


def stored(url: str, image: str, folder: Path) -> NDArray[np.uint8]:
    """The merged label of an image."""
    reply = httpx.get(f"{url}/datastore/label", params={"label": image, "tag": "final"})
    reply.raise_for_status()
    (folder / "stored.nii.gz").write_bytes(reply.content)
    return np.asarray(nib.load(folder / "stored.nii.gz").dataobj).astype(np.uint8)
