# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Every route of the server, upstream's and this project's, against every kind of token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib
import json
import pkgutil
import time
from collections.abc import Iterable, Iterator
from functools import cache
from unittest.mock import MagicMock

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.system.realm import PUBLIC, GuardedServer, claims, signed

# The same server, on the same worker.
pytestmark = pytest.mark.xdist_group("guarded server")

PEOPLE = ("guest", "user", "annotator", "reviewer", "admin")
# Pages and files that are equal for all users, and those that the sign-in needs.
OPEN = {
    "GET /",
    "GET /auth/",
    "GET /docs",
    "GET /favicon.ico",
    "GET /openapi.json",
    "GET /patchwise/",
    "GET /patchwise/annotate",
    "GET /patchwise/assets/{path:path}",
    "HEAD /docs",
    "HEAD /openapi.json",
    "POST /auth/token",
}
SIGNED_IN = {"GET /auth/token/valid"}
USER = {
    "DELETE /session/{session_id}",
    "GET /batch/infer",
    "GET /datastore/",
    "GET /datastore/image",
    "GET /datastore/image/info",
    "GET /datastore/label",
    "GET /datastore/label/info",
    "GET /proxy/dicom/qido/{path:path}",
    "GET /proxy/dicom/stow/{path:path}",
    "GET /proxy/dicom/wado/{path:path}",
    "GET /proxy/dicom/{path:path}",
    "GET /info/",
    "GET /ohif/{path:path}",
    "GET /patchwise/agreement",
    "GET /patchwise/answers",
    "GET /patchwise/progress",
    "GET /patchwise/queries/{query_id}",
    "GET /patchwise/queries/{query_id}/picture.png",
    "GET /patchwise/regions",
    "GET /patchwise/regions/{query_id}",
    "GET /patchwise/regions/{query_id}/draft",
    "GET /patchwise/regions/{query_id}/image.nii",
    "GET /patchwise/regions/{query_id}/prediction",
    "GET /scoring/",
    "GET /session/{session_id}",
    "GET /train/",
    "HEAD /datastore/image",
    "HEAD /datastore/label",
    "POST /activelearning/release",
    "POST /activelearning/renew",
    "POST /activelearning/{strategy}",
    "POST /proxy/dicom/qido/{path:path}",
    "POST /proxy/dicom/stow/{path:path}",
    "POST /proxy/dicom/wado/{path:path}",
    "POST /proxy/dicom/{path:path}",
    "POST /infer/wsi/{model}",
    "POST /infer/wsi_v2/{model}",
    "POST /infer/{model}",
    "POST /patchwise/regions/{query_id}/between",
    "PUT /session/",
}
ANNOTATOR = {
    "DELETE /scoring/",
    "GET /datastore/dataset",
    "POST /activelearning/skip",
    "POST /patchwise/answers/{answer_id}/restore",
    "POST /patchwise/answers/{answer_id}/withdraw",
    "POST /scoring/",
    "POST /scoring/{method}",
    "PUT /datastore/",
    "PUT /datastore/image",
    "PUT /datastore/image/info",
    "PUT /datastore/label",
    "PUT /datastore/label/info",
    "PUT /datastore/updatelabelinfo",
    "PUT /patchwise/regions/{query_id}/draft",
    "PUT /patchwise/regions/{query_id}/label",
}
ADMIN = {
    "DELETE /batch/infer",
    "DELETE /datastore/",
    "DELETE /datastore/image",
    "DELETE /datastore/label",
    "DELETE /model/{model}",
    "DELETE /train/",
    "GET /logs/",
    "GET /logs/gpu",
    "GET /model/info/{model}",
    "GET /model/{model}",
    "POST /batch/infer/{model}",
    "POST /reload",
    "POST /train/",
    "POST /train/{model}",
    "PUT /model/{model}",
}
CLOSED = {**dict.fromkeys(USER, "user"), **dict.fromkeys(ANNOTATOR, "annotator"), **dict.fromkeys(ADMIN, "admin")}


def routes_of(served: Iterable[object]) -> set[str]:
    return {
        f"{method} {route.path}"
        for route in served
        if getattr(route, "methods", None) and hasattr(route, "path")
        for method in route.methods
    }


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every route of the source code, those that the server's schema hides too."""
    import monailabel.app
    import monailabel.endpoints as endpoints

    from lib.routes.install import routers

    found = routes_of(monailabel.app.app.routes)
    for router in routers(MagicMock()):
        found |= routes_of(router.routes)
    for module in pkgutil.iter_modules(endpoints.__path__):
        router = getattr(importlib.import_module(f"monailabel.endpoints.{module.name}"), "router", None)
        found |= routes_of(router.routes) if router else set()
    return found


def test_every_route_is_in_the_table(guarded: GuardedServer, known: set[str]) -> None:
    schema = httpx.get(f"{guarded.url}/openapi.json").json()
    told = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    templates = {route.replace(":path}", "}") for route in known}
    assert told <= templates, "a route that is served stands in neither router"
    missing = known - OPEN - SIGNED_IN - set(CLOSED)
    assert not missing, f"say in this table which role may use {sorted(missing)}"
    assert OPEN | SIGNED_IN | set(CLOSED) <= known, "the table names routes that are gone"


@pytest.fixture(scope="module")
def http(guarded: GuardedServer) -> Iterator[httpx.Client]:
    # One connection per request: the server ends one on which a route failed.
    with httpx.Client(base_url=guarded.url, timeout=60, headers={"Connection": "close"}) as client:
        yield client


def call(http: httpx.Client, route: str, token: str | None) -> int:
    """Status of a request to a route that passes the check of roles and then fails, since its content is wrong."""
    method, path = route.split(" ")
    for field in ("query_id", "answer_id"):
        path = path.replace(f"{{{field}}}", "999")
    for field in ("path:path", "strategy", "method", "model", "session_id"):
        path = path.replace(f"{{{field}}}", "no-such-thing")
    head = {"Authorization": f"Bearer {token}"} if token is not None else {}
    content = {"json": []} if method in ("POST", "PUT") else {}
    answer = http.request(method, path, headers=head, **content)
    # A route that refuses all clients returns another message; a response to HEAD has none.
    refuses_all = answer.status_code == 403 and answer.text and "is required to perform this action" not in answer.text
    return 200 if refuses_all else answer.status_code


@cache
def wrong_tokens() -> dict[str, str | None]:
    """Invalid credentials; each claims to be an administrator, if it can."""
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(PUBLIC).decode()}\n-----END PUBLIC KEY-----"
    said = claims("admin")
    head, _, signature = signed("guest").split(".")
    body = base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()
    return {
        "none": None,
        "dot": ".",
        "garbage": "garbage",
        "expired": signed("admin", exp=time.time() - 60),
        "endless": signed("admin", exp=None),
        "not yet": signed("admin", nbf=time.time() + 600),
        "another key": jwt.encode(said, stranger, algorithm="RS256"),
        "alg none": jwt.encode(said, None, algorithm="none"),
        # The public key taken as the shared secret of a symmetric signature.
        "alg HS256": symmetric(said, pem),
        "changed": f"{head}.{body}.{signature}",
        "no name": signed("admin", preferred_username=None),
        "no roles": signed("admin", realm_access=None),
        "roles no list": signed("admin", realm_access={"roles": "monailabel-admin"}),
        "roles elsewhere": signed("admin", realm_access=None, roles=["monailabel-admin"]),
    }


def symmetric(said: dict, secret: str) -> str:
    """A token signed with HS256; PyJWT itself refuses to take a public key for a secret."""
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in ({"alg": "HS256", "typ": "JWT"}, said)
    ]
    sign = hmac.new(secret.encode(), ".".join(parts).encode(), hashlib.sha256).digest()
    return ".".join([*parts, base64.urlsafe_b64encode(sign).rstrip(b"=").decode()])


@pytest.mark.parametrize("kind", list(wrong_tokens()))
def test_nobody_comes_in_with_a_wrong_token(http: httpx.Client, kind: str) -> None:
    token = wrong_tokens()[kind]
    found = {route: call(http, route, token) for route in (*CLOSED, *SIGNED_IN)}
    assert {route: status for route, status in found.items() if status != 401} == {}


@pytest.mark.parametrize("person", PEOPLE)
def test_every_role_gets_where_it_belongs_and_nowhere_else(http: httpx.Client, person: str) -> None:
    token = signed(person)
    found = {route: call(http, route, token) for route in CLOSED}
    entered = {route for route, status in found.items() if status not in (401, 403)}
    assert entered == {route for route, role in CLOSED.items() if role == person}
    assert {status for route, status in found.items() if route not in entered} <= {403}


def test_open_routes_tell_nothing_of_the_studies(guarded: GuardedServer) -> None:
    for route in sorted(OPEN):
        method, path = route.split(" ")
        if method == "GET":
            answer = httpx.get(guarded.url + path.replace("{path:path}", "annotate/main.js"))
            assert answer.status_code == 200, path
            assert "secret_project" not in answer.text, path
            assert str(guarded.studies) not in answer.text, path


def test_signing_in_with_a_wrong_password_is_refused_in_a_sentence(guarded: GuardedServer) -> None:
    answer = httpx.post(f"{guarded.url}/auth/token", data={"username": "ann", "password": "wrong"})
    assert answer.status_code == 401
    assert answer.json() == {"detail": "user and password were not accepted"}


def test_a_running_app_is_not_loaded_a_second_time(guarded: GuardedServer) -> None:
    answer = httpx.post(f"{guarded.url}/reload", headers={"Authorization": f"Bearer {signed('admin')}"})
    assert answer.status_code == 409
    assert answer.json()["detail"].startswith("the app is not loaded again while it runs")
