# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""MONAI Label's authentication on: what the progress page shows to whom, with a stand-in for the realm."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from eval.server import ServerProcess
from tests.browser import CHROMIUM, Browser
from tests.system.conftest import BUNDLE, fill

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ROLES = {"ann": ["monailabel-user", "monailabel-annotator"], "guest": []}


class Realm(BaseHTTPRequestHandler):
    """As much of an OpenID realm as MONAI Label asks for; every user's password is their name."""

    def do_GET(self) -> None:
        public = KEY.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        base = f"http://{self.headers['Host']}"
        self._answer(200, {"public_key": base64.b64encode(public).decode(), "token_endpoint": f"{base}/token"})

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        user, password = form["username"][0], form["password"][0]
        if user not in ROLES or password != user:
            self._answer(401, {"error": "invalid_grant"})
            return
        claims = {"preferred_username": user, "realm_access": {"roles": ROLES[user]}, "exp": time.time() + 300}
        self._answer(200, {"access_token": jwt.encode(claims, KEY, algorithm="RS256"), "token_type": "bearer"})

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


class GuardedServer(ServerProcess):
    """Counts as started when it refuses who is not signed in."""

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/info/", timeout=30).status_code == 401:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.last_lines())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("guarded")
    fill(folder / "secret_project", phantoms, 2)
    realm = ThreadingHTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=realm.serve_forever, daemon=True).start()
    env = {
        "MONAI_LABEL_AUTH_ENABLE": "true",
        "MONAI_LABEL_AUTH_REALM_URI": f"http://127.0.0.1:{realm.server_port}",
    }
    server = GuardedServer(folder / "secret_project", {"models": BUNDLE}, log=folder / "log", threads=1, env=env)
    server.start()
    yield server.url
    server.stop()
    realm.shutdown()


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


def test_a_wrong_password_is_refused_in_a_sentence(url: str) -> None:
    reply = httpx.post(f"{url}/auth/token", data={"username": "ann", "password": "wrong"})
    assert (reply.status_code, reply.json()["detail"]) == (
        401,
        "the server behind this one refused it with 401; check user, password and address",
    )


GUARDED = [
    *(("PUT", "/session/", "user"), ("GET", "/session/a", "user"), ("DELETE", "/session/a", "user")),
    *(
        ("POST", "/infer/query_region", "user"),
        ("POST", "/infer/wsi_v2/a", "user"),
        ("HEAD", "/datastore/image", "user"),
    ),
    *(("GET", "/ohif/", "user"), ("GET", "/proxy/dicom/a", "user"), ("POST", "/scoring/a", "annotator")),
    *(("PUT", "/datastore/image", "annotator"), ("PUT", "/datastore/label", "annotator")),
    *(
        ("GET", "/datastore/dataset", "annotator"),
        ("PUT", "/model/a", "annotator"),
        ("DELETE", "/model/a", "annotator"),
    ),
    *(("POST", "/train/", "admin"), ("POST", "/train/a", "admin"), ("POST", "/batch/infer/a", "admin")),
    *(("POST", "/reload", "admin"), ("GET", "/logs/", "admin"), ("GET", "/logs/gpu", "admin")),
]


@pytest.mark.parametrize(("method", "path", "role"), GUARDED)
def test_routes_answered_in_front_of_upstreams_ask_for_the_same_roles(
    url: str, method: str, path: str, role: str
) -> None:
    """Ann is a user and an annotator; whoever lacks the role learns nothing about the request."""
    assert httpx.request(method, url + path).status_code == 401
    assert httpx.request(method, url + path, headers=token(url, "guest")).status_code == 403
    ann = httpx.request(method, url + path, headers=token(url, "ann"))
    assert (ann.status_code == 403 and "role" in str(ann.json()).lower()) == (role == "admin"), ann.text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_signs_in(url: str, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"{url}/patchwise/")
        browser.wait("document.querySelector('#login') && !document.querySelector('#login').hidden")
        assert "secret_project" not in browser.run("document.documentElement.outerHTML")

        def sign_in(user: str, password: str) -> None:
            for name, value in (("username", user), ("password", password)):
                browser.run(f"document.querySelector('[name={name}]').value = {json.dumps(value)}")
            browser.run("document.querySelector('#login button').click()")

        sign_in("ann", "wrong")
        browser.wait("document.querySelector('#refused').textContent.includes('not accepted')")
        sign_in("guest", "guest")
        browser.wait("document.querySelector('#refused').textContent.includes('lacks')")
        sign_in("ann", "ann")
        browser.wait("!document.querySelector('#content').hidden")
        assert browser.run("document.querySelector('#project').textContent") == "secret_project"
        assert browser.run("document.querySelector('#login').hidden")
        browser.open(f"{url}/patchwise/")
        browser.wait("document.querySelector('#project').textContent === 'secret_project'")
