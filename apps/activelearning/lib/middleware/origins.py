# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Which web pages may reach the server, and under which names: none but its own, until options name others."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from monailabel.config import settings
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.errors import PatchwiseError, refuse

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_PORTS = {"http": 80, "https": 443}
# Pages without data: a link on another page may open them in a window of their own.
_PAGES = re.compile(r"/?|/docs/?|/patchwise/?|/patchwise/annotate/?|/logs/?|/ohif(/.*)?|/favicon\.ico")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.\-]*[a-z0-9_])?")


class OriginGuard:
    """Refuse requests of other web pages, and requests under a name that is not the server's.

    A browser sends `Origin` with every request that changes data or whose response a script could read. It sends
    `Sec-Fetch-Site` over TLS or on loopback. Programs send neither and pass. Names are checked because a page may
    resolve its own name to this server (DNS rebinding), so that both have one origin for the browser.

    Args:
        origins: other origins whose pages may use the server, as `scheme://host[:port]`.
        hosts: additional names of the server, beside those of loopback, its addresses and the machine.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], hosts: Sequence[str]) -> None:
        self.app = app
        self.origins = frozenset(filter(None, map(_origin, origins)))
        machine = socket.gethostname().lower()
        self.hosts = frozenset(_host_name(host) for host in hosts)
        self.machine = self.hosts | {machine, f"{machine}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self.check(scope)
        except PatchwiseError as refused:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            # The body is not read; the connection is closed after the response.
            answer = JSONResponse({"detail": str(refused)}, refused.status, headers={"Connection": "close"})
            await answer(scope, receive, _sealed(send, False))
            return
        await self.app(scope, receive, _sealed(send, self._is_named(Headers(scope=scope).get("origin"))))

    def check(self, scope: Scope) -> None:
        """End a request that another page has caused, or that names another server.

        Raises:
            PatchwiseError: 403, and 421 for the name.
        """
        headers = Headers(scope=scope)
        host = self._check_host(headers.getlist("host"), scope.get("server"))
        method, path = scope.get("method", "GET"), scope["path"].removeprefix(settings.MONAI_LABEL_API_STR)
        asked = ", ".join(headers.getlist("origin")) if "origin" in headers else None
        source = headers.get("referer") if asked is None else asked
        site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
        if self._is_named(source):
            return
        own = source is None or _is_same(source, host)
        if own and site in (None, "same-origin", "none"):
            return
        is_link = method == "GET" and asked is None and _PAGES.fullmatch(path) is not None
        if is_link and (site is None or (mode == "navigate" and headers.get("sec-fetch-dest") == "document")):
            return
        named = repr(source[:80]) if source else f"another site (Sec-Fetch-Site {site!r:.20})"
        what = "read" if method in _SAFE else "changed"
        refuse(
            f"nothing is {what} for a page of {named}: expected a page of this server; add its origin with "
            "--conf origins where it is trusted",
            403,
        )

    def _is_named(self, source: str | None) -> bool:
        return source is not None and _origin(source) in self.origins

    def _check_host(self, sent: Sequence[str], server: tuple[str, int | None] | None) -> str:
        host = sent[0] if len(sent) == 1 else ""
        name, address = _host_name(host), _address(_host_name(host))
        here = _address(server[0]) if server else None
        on_loopback = server is None or (here is not None and here.is_loopback)
        is_loopback = name == "localhost" or (address is not None and address.is_loopback)
        if is_loopback or (name and name in self.hosts):
            return host
        if on_loopback or not (address is not None or name in self.machine):
            refuse(
                f"this server is not called {host[:80]!r}: expected "
                f"{'localhost or 127.0.0.1' if on_loopback else 'its address or its own name'}; "
                "add other names with --conf hosts",
                421,
            )
        return host


def _origin(text: str) -> str | None:
    """The origin of an address as browsers write it; None where there is none, as for `null`."""
    try:
        parts = urlsplit(text.strip())
        default, port = _PORTS[parts.scheme], parts.port
    except (ValueError, KeyError):
        return None
    name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{name}" + (f":{port}" if port and port != default else "") if name else None


def _is_same(source: str, host: str) -> bool:
    """Return whether an origin or address is the server's own under the name in the request.

    A proxy may end TLS in front of the server, so the scheme is the source's.
    """
    found = _origin(source)
    return found is not None and found == _origin(f"{found.partition(':')[0]}://{host}")


def _host_name(host: str) -> str:
    """The name in a Host header, without its port; "" where it holds no name."""
    try:
        parts = urlsplit(f"//{host.strip()}")
        parts.port  # noqa: B018  (reading it checks it)
    except ValueError:
        return ""
    name = (parts.hostname or "").rstrip(".")
    return (
        name if "@" not in host and parts.netloc == host.strip() and (_address(name) or _NAME.fullmatch(name)) else ""
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _sealed(send: Send, is_named: bool) -> Send:
    """`send` with the headers that keep other pages from embedding an answer."""

    async def call(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Cross-Origin-Resource-Policy"] = "cross-origin" if is_named else "same-origin"
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("X-Frame-Options", "SAMEORIGIN")
            headers.setdefault("Cross-Origin-Opener-Policy", "same-origin")
            headers.add_vary_header("Origin")
        await send(message)

    return call
