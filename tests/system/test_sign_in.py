# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""MONAI Label's authentication on: content of the progress page per user, with a stand-in for the realm."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser import started_browser
from tests.system.annotate.conftest import FLAGS
from tests.system.realm import GuardedServer

# The same server, on the same worker.
pytestmark = pytest.mark.xdist_group("guarded server")


@pytest.fixture
def url(guarded: GuardedServer) -> str:
    return guarded.url


def token(url: str, user: str) -> dict[str, str]:
    reply = httpx.post(f"{url}/auth/token", data={"username": user, "password": user})
    return {"Authorization": f"Bearer {reply.json()['access_token']}"}


def test_only_the_empty_page_is_open_to_everybody(url: str) -> None:
    page = httpx.get(f"{url}/patchwise/")
    assert page.status_code == 200
    assert "secret_project" not in page.text
    for path in ("progress", "queries/1", "queries/1/picture.png"):
        assert httpx.get(f"{url}/patchwise/{path}").status_code == 401
        assert httpx.get(f"{url}/patchwise/{path}", headers=token(url, "guest")).status_code == 403
    assert httpx.get(f"{url}/patchwise/progress", headers={"Authorization": "Bearer forged"}).status_code == 401
    told = httpx.get(f"{url}/patchwise/progress", headers=token(url, "ann"))
    assert told.json()["project"] == "secret_project"


@pytest.mark.usefixtures("chromium")
def test_the_page_signs_in(url: str) -> None:
    with started_browser() as browser:
        page = browser.new_page()
        page.goto(f"{url}/patchwise/")
        page.wait_for_selector("#login")
        assert "secret_project" not in page.content()

        def sign_in(user: str, password: str) -> None:
            page.fill("[name=username]", user)
            page.fill("[name=password]", password)
            page.click("#login button")

        refused = page.locator("#refused")
        sign_in("ann", "wrong")
        expect(refused).to_contain_text("not accepted")
        sign_in("guest", "guest")
        expect(refused).to_contain_text("lacks")
        sign_in("ann", "ann")
        page.wait_for_selector("#content")
        assert page.text_content("#project") == "secret_project"
        assert page.is_hidden("#login")
        page.goto(f"{url}/patchwise/")
        expect(page.locator("#project")).to_have_text("secret_project")


@pytest.mark.slow
@pytest.mark.usefixtures("chromium")
def test_the_page_to_annotate_on_signs_in(url: str) -> None:
    with started_browser(*FLAGS) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{url}/patchwise/annotate")
        page.fill("#name [name=name]", "ann")
        page.click("#name button")
        password = page.locator("#name [name=password]")
        expect(password).to_be_visible()
        password.fill("wrong")
        page.click("#name button")
        expect(page.locator("#refused")).to_contain_text("not accepted")
        password.fill("ann")
        page.click("#name button")
        page.wait_for_selector("body[data-query]")
        query = page.get_attribute("body", "data-query")
        held = httpx.get(f"{url}/patchwise/queries/{query}", headers=token(url, "ann")).json()
        assert (held["status"], held["client"]) == ("open", "ann")
