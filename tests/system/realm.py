# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A stand-in for an OpenID realm, and a server that uses it."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from eval.runner.server import ServerProcess

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PUBLIC = KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)

# One user per role, without the roles below it, so that a route admits exactly the roles that it requires.
ROLES = {
    "guest": [],
    "user": ["monailabel-user"],
    "annotator": ["monailabel-annotator"],
    "reviewer": ["monailabel-reviewer"],
    "admin": ["monailabel-admin"],
    "ann": ["monailabel-user", "monailabel-annotator"],
}


def claims(user: str, **changes: Any) -> dict[str, Any]:
    """Claims of a user's token of the realm; a change to None leaves a claim out."""
    said = {"preferred_username": user, "realm_access": {"roles": ROLES[user]}, "exp": time.time() + 300, **changes}
    return {name: value for name, value in said.items() if value is not None}


def signed(user: str, **changes: Any) -> str:
    """A token of the realm."""
    return jwt.encode(claims(user, **changes), KEY, algorithm="RS256")


class Realm(BaseHTTPRequestHandler):
    """The parts of an OpenID realm that MONAI Label uses; every user's password is their name."""

    def do_GET(self) -> None:
        base = f"http://{self.headers['Host']}"
        self._answer(200, {"public_key": base64.b64encode(PUBLIC).decode(), "token_endpoint": f"{base}/token"})

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        user, password = form["username"][0], form["password"][0]
        if user not in ROLES or password != user:
            self._answer(401, {"error": "invalid_grant"})
            return
        self._answer(200, {"access_token": signed(user), "token_type": "bearer"})

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
    """Server that counts as started once it refuses requests without a token."""

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


@contextmanager
def guarded_server(studies: Path, conf: dict[str, Any], log: Path) -> Iterator[GuardedServer]:
    """A running server with MONAI Label's authentication on, and its realm."""
    realm = ThreadingHTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=realm.serve_forever, daemon=True).start()
    env = {
        "MONAI_LABEL_AUTH_ENABLE": "true",
        "MONAI_LABEL_AUTH_REALM_URI": f"http://127.0.0.1:{realm.server_port}",
    }
    server = GuardedServer(studies, conf, log=log, threads=1, env=env)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        realm.shutdown()
