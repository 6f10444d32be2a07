# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Every change of MONAI Label and its web server that is made at start-up, with its reason and its end.

Each entry names the upstream code, why it cannot stay, and the release that makes the change superfluous.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from lib.middleware.client_identity import CONNECTED


def without_cors(app: FastAPI, origins: list[str]) -> ASGIApp:
    """The application's middleware with CORS for the named origins only.

    MONAI Label 0.8.5, `monailabel/app.py`: without MONAI_LABEL_CORS_ORIGINS every origin is allowed, with credentials.
    The list is built when MONAI Label is imported, before the app's options are known. Superfluous once the default
    list is empty and can be set later; no release does that (master of December 2025 does not).
    """
    stack = app.middleware_stack or app.build_middleware_stack()
    holder: ASGIApp | None = stack
    while holder is not None:
        inner = getattr(holder, "app", None)
        if isinstance(inner, CORSMiddleware):
            holder.app = inner.app  # type: ignore[attr-defined]
        else:
            holder = inner
    if not origins:
        return stack
    return CORSMiddleware(
        stack, allow_origins=origins, allow_credentials=True, allow_methods=["*"], allow_headers=["*"], max_age=600
    )


Wrapper = Callable[[ASGIApp], ASGIApp]


def guard(app: FastAPI, origins: list[str], wrappers: list[Wrapper]) -> None:
    """Put middleware around all that the application serves, its mounts and errors included; the first is innermost.

    The application's middleware is built before MONAI Label loads this app, so it is wrapped here.
    """
    stack = without_cors(app, origins)
    for wrap in wrappers:
        stack = wrap(stack)
    app.middleware_stack = stack


def limit_heads(seconds: float) -> None:
    """Close connections whose request's head does not arrive.

    uvicorn 0.54, `H11Protocol`: only a connection that waits between two requests has a limit. An incomplete or missing
    head keeps its connection open forever. Superfluous once uvicorn limits the time of a head (requested in its issue
    2135, "Slowloris"); until then a proxy in front may do it too.
    """
    made, received, lost = H11Protocol.connection_made, H11Protocol.data_received, H11Protocol.connection_lost

    def end(self: Any) -> None:
        self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.transport.close()

    def wait(self: Any) -> None:
        # A response in progress, and a request that waits behind it, have their own limits.
        waits = self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)
        timer = self.__dict__.get("head_timer")
        if waits and timer is None and not self.transport.is_closing():
            self.head_timer = asyncio.get_running_loop().call_later(seconds, end, self)
        elif not waits and timer is not None:
            timer.cancel()
            self.head_timer = None

    def connection_made(self: Any, transport: Any) -> None:
        made(self, transport)
        wait(self)

    def data_received(self: Any, data: bytes) -> None:
        received(self, data)
        wait(self)

    def connection_lost(self: Any, error: Exception | None) -> None:
        if timer := self.__dict__.get("head_timer"):
            timer.cancel()
        lost(self, error)

    for name, method in (
        ("connection_made", connection_made),
        ("data_received", data_received),
        ("connection_lost", connection_lost),
    ):
        setattr(H11Protocol, name, method)


def keep_connected() -> None:
    """Keep the address that a connection really comes from.

    uvicorn 0.54, `ProxyHeadersMiddleware`: X-Forwarded-For of any program on this machine replaces it, and MONAI Label
    0.8.5 passes no option to turn that off. Only the app's option `forwarded_header` names a header that counts.
    Superfluous once `monailabel start_server` passes `proxy_headers`.
    """
    call = ProxyHeadersMiddleware.__call__

    async def keeping(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        scope[CONNECTED] = scope.get("client")
        await call(self, scope, receive, send)  # type: ignore[arg-type]

    ProxyHeadersMiddleware.__call__ = keeping  # type: ignore[method-assign,assignment]
