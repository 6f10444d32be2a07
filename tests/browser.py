# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The system's Chromium, driven by Playwright, for tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

from tests.conftest import CHROMIUM

# Containers have no user namespaces for the sandbox.
FLAGS = ("--no-sandbox", "--disable-background-networking", "--no-first-run")


@contextmanager
def started_browser(*flags: str) -> Iterator[Browser]:
    """Headless Chromium, closed at the end of the block; without `flags` it draws on the CPU."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *(flags or ("--disable-gpu",))])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """Addresses that a page requested, and errors on its console."""

    def __init__(self, page: Page) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
