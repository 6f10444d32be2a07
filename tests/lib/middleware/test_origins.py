# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Which pages and names the server answers, request by request."""

from __future__ import annotations

import anyio
import httpx
import pytest
from fastapi import FastAPI
from monailabel.app import origins as upstream_origins
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from lib.middleware.origins import OriginGuard
from lib.middleware.upstream_patches import guard
from lib.options import OptionError, parse_options

OWN, ELSEWHERE, OHIF = "http://127.0.0.1:8000", "https://evil.example", "https://ohif.example"


def answered(
    method="GET", path="/datastore/image", server="127.0.0.1", host="127.0.0.1:8000", origins=(), hosts=(), **headers
):
    """The answer to one request, and whether a route was reached."""
    reached = []
    app = FastAPI(
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=upstream_origins,
                allow_credentials=True,
                allow_methods=["*"],
                allow_headers=["*"],
            )
        ]
    )

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    async def route(path: str):
        reached.append(path)
        return {"secret": 1}

    guard(app, list(origins), [lambda inner: OriginGuard(inner, origins, hosts)])

    async def with_address(scope, receive, send):
        await app({**scope, "server": (server, 8000)}, receive, send)

    async def main():
        transport = httpx.ASGITransport(with_address)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, path, headers={"host": host, **sent})

    answer = anyio.run(main)
    assert bool(reached) == (answer.status_code == 200)
    return answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "GET"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": ELSEWHERE},
        {"origin": "null"},
        {"origin": ""},
        {"origin": f"{OWN} {ELSEWHERE}"},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "http://localhost:8000"},
        {"origin": "http://127.0.0.1:8000.evil.example"},
        {"origin": "http://127.0.0.1:8000@evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"},
        {"origin": OWN, "sec_fetch_site": "cross-site"},
        {"referer": f"{ELSEWHERE}/page"},
        {"referer": "about:blank"},
    ],
)
def test_other_pages_neither_read_nor_change(method, headers):
    answer = answered(method, **headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "GET"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": OWN},
        {"origin": OWN, "sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
        {"referer": f"{OWN}/ohif/viewer"},
    ],
)
def test_programs_and_own_pages_pass(method, headers):
    answer = answered(method, **headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "127.0.0.1", "127.3.2.1:9", "[::1]:8000", "localhost.:8000"]
)
def test_names_of_loopback(host):
    assert answered(host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8000",
        "localhost.evil.example",
        "",
        "192.168.1.4",
        "127.0.0.1.nip.io",
        "a@localhost",
        "localhost/x",
    ],
)
def test_other_names_on_loopback(host):
    answer = answered(host=host)
    assert answer.status_code == 421
    assert "--conf hosts" in answer.json()["detail"]


def test_names_elsewhere_are_addresses_or_named():
    away = {"server": "10.1.2.3"}
    assert answered(host="10.1.2.3:8000", **away).status_code == 200
    assert answered(host="evil.example", **away).status_code == 421
    assert answered(host="scans.example", hosts=["scans.example"], **away).status_code == 200
    assert answered(host="scans.example", hosts=["Scans.example"]).status_code == 200


def test_links_open_pages_but_nothing_else():
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "referer": ELSEWHERE}
    for page in ("/", "/patchwise/", "/ohif/viewer", "/logs/"):
        assert answered(path=page, sec_fetch_dest="document", **link).status_code == 200
        assert answered(path=page, sec_fetch_dest="iframe", **link).status_code == 403
        assert answered("POST", page, sec_fetch_dest="document", **link).status_code == 403
    for data in ("/datastore/image", "/info/", "/patchwise/progress", "/proxy/dicom/wado/studies"):
        assert answered(path=data, sec_fetch_dest="document", **link).status_code == 403


def test_named_origins_pass_with_their_preflight():
    asked = {"origin": OHIF, "sec_fetch_site": "cross-site"}
    answer = answered("POST", origins=[OHIF], **asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, OHIF)
    assert answered("PUT", origins=[OHIF], origin=ELSEWHERE).status_code == 403
    flight = {"access_control_request_method": "PUT", "access_control_request_headers": "authorization"}
    assert answered("OPTIONS", origins=[OHIF], **flight, origin=ELSEWHERE).status_code == 403
    assert answered("OPTIONS", **flight, origin=OHIF).status_code == 403


def test_a_proxy_that_ends_tls():
    assert (
        answered("POST", host="scans.example", hosts=["scans.example"], origin="https://scans.example").status_code
        == 200
    )


@pytest.mark.parametrize("wrong", ["*", "null", "ohif.example", "https://ohif.example/x", "https://a@b", "file://x"])
def test_origins_that_are_none_are_refused_at_start(wrong):
    with pytest.raises(OptionError, match="origins"):
        parse_options({"origins": wrong})
