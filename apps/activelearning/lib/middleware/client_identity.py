# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Identity of a client: the id that it sends, or else its address and user."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from monailabel.config import settings
from monailabel.endpoints.user.auth import from_token
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.ledger.records import ANONYMOUS, DERIVED
from lib.studies.request_context import CLIENT, current_client

MOST_ALIASES = 50
# Key of the address of a connection, set by `upstream_patches`.
CONNECTED = "patchwise.connected"


class Clients:
    """Ids of clients, and which of them come from one address: a download, which names no client, is one of theirs."""

    def __init__(self) -> None:
        self._aliases: dict[str, dict[str, None]] = {}
        self._lock = threading.Lock()

    def identify(self, request: Mapping[str, Any]) -> str:
        """The `client_id` of a request, or else an id derived from the connection."""
        here, given = current_client(), request.get("client_id")
        if not given:
            return here or ANONYMOUS
        if here:
            with self._lock:
                known = self._aliases.setdefault(here, {})
                known.pop(str(given), None)
                known[str(given)] = None
                if len(known) > MOST_ALIASES:
                    del known[next(iter(known))]
        return str(given)

    def here(self) -> list[str]:
        """Every id that the current connection's user and address have used, newest first."""
        here = current_client()
        with self._lock:
            return [] if here is None else [*reversed(self._aliases.get(here, {})), here]


class IdentifiedClients:
    """Record the sender of every request, so that clients without an id are distinguished.

    Args:
        header: header in which a trusted proxy sends the client's address; only the last entry, which the proxy itself
            adds, is used.
    """

    def __init__(self, app: ASGIApp, header: str | None) -> None:
        self.app = app
        self.header = header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        token = CLIENT.set(f"{DERIVED}{_user(connection)}@{self._address(connection, scope)}")
        try:
            await self.app(scope, receive, send)
        finally:
            CLIENT.reset(token)

    def _address(self, connection: HTTPConnection, scope: Scope) -> str:
        told = ",".join(connection.headers.getlist(self.header)) if self.header else ""
        # The web server itself would trust X-Forwarded-For of any program on this machine.
        client = scope.get(CONNECTED) or scope.get("client")
        found = told.rsplit(",", 1)[-1].strip()
        return found[:64] if found and found.isprintable() else str(client[0] if client else "unknown")


def is_signed_in(scope: Scope) -> bool:
    """Return whether a request carries a valid token, or needs none."""
    return not settings.MONAI_LABEL_AUTH_ENABLE or _user(HTTPConnection(scope)) != ANONYMOUS


def _user(connection: HTTPConnection) -> str:
    """Name of the user where MONAI Label's authentication is on; the routes themselves refuse a wrong token."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if not settings.MONAI_LABEL_AUTH_ENABLE or scheme.lower() != "bearer":
        return ANONYMOUS
    try:
        return from_token(token).username or ANONYMOUS
    except Exception:
        # The route reports an invalid token; here the client is just unidentified.
        return ANONYMOUS
