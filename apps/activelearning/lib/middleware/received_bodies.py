# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Requests are received before a worker thread is taken: one that does not arrive holds a connection and no more."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NoReturn

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.errors import PatchwiseError, refuse
from lib.middleware.request_bodies import check_length

# Larger bodies are buffered on disk.
_IN_MEMORY = 2**20
_PIECE = 2**18
# The body of a refused request is received up to here; otherwise the sender sees a broken connection, not the error.
_READ_ON_BYTES = 2**26


def allow_connections() -> None:
    """As many open connections as the system lets this process have: many systems begin with 1,024 or 256 files."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = 65_536 if most == resource.RLIM_INFINITY else min(most, 65_536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class ReceivedBodies:
    """Receive the body of a request, then pass the request on.

    Args:
        limit: limit of the body of a request in bytes; raises if the head already shows an error.
        idle_seconds: longest time between two pieces of a body.
        total_seconds: longest time from the head to the last piece.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[Scope], int], idle_seconds: float, total_seconds: float) -> None:
        self.app = app
        self.limit = limit
        self.idle_seconds = idle_seconds
        self.total_seconds = total_seconds
        # Writing to a blocked disk must not block the server's loop, nor the threads of requests.
        self._disk, self._heads = CapacityLimiter(4), CapacityLimiter(16)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="patchwise-") as body:
            try:
                if not await self._receive(scope, receive, body):
                    return
            except PatchwiseError as refused:
                await self._refuse(refused, scope, receive, send)
                return
            body.seek(0)
            await self.app(scope, _given_out(body, receive), send)

    async def _receive(self, scope: Scope, receive: Receive, body: IO[bytes]) -> bool:
        """Return whether the whole body has arrived; its sender may have disconnected before."""
        limit = await anyio.to_thread.run_sync(self.limit, scope, limiter=self._heads) if _has_body(scope) else 0
        end, length = time.monotonic() + self.total_seconds, 0
        while True:
            patience = min(self.idle_seconds, end - time.monotonic())
            try:
                message = await asyncio.wait_for(receive(), max(patience, 0))
            except asyncio.TimeoutError:
                self._too_slow(length, end)
            if message["type"] != "http.request":
                return False
            piece = message.get("body", b"")
            length += len(piece)
            check_length(length, limit)
            if length > _IN_MEMORY:
                await anyio.to_thread.run_sync(body.write, piece, limiter=self._disk)
            else:
                body.write(piece)
            if not message.get("more_body", False):
                return True
            if time.monotonic() > end:
                self._too_slow(length, end)

    def _too_slow(self, length: int, end: float) -> NoReturn:
        allowed = (
            f"a pause of at most {self.idle_seconds:g} s"
            if time.monotonic() < end
            else f"all of it within {self.total_seconds:g} s"
        )
        refuse(f"the request did not arrive: expected {allowed}, got {length:,} bytes; send it again", 408)

    async def _refuse(self, refused: PatchwiseError, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a whole answer at once, and end it when the sender has: until then a client may not look for it."""
        answer = JSONResponse({"detail": str(refused)}, refused.status, headers={"Connection": "close"})
        head = {"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers}
        await send(head)
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        if refused.status != 408:
            await self._read_on(receive)
        await send({"type": "http.response.body", "body": b""})

    async def _read_on(self, receive: Receive) -> None:
        dropped, end = 0, time.monotonic() + self.idle_seconds
        while dropped < _READ_ON_BYTES:
            try:
                message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0))
            except asyncio.TimeoutError:
                return
            dropped += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return


def _has_body(scope: Scope) -> bool:
    """Return whether a body follows the head; a request without one passes without a thread."""
    told = {name.lower(): value for name, value in scope["headers"]}
    return told.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in told


def _given_out(body: IO[bytes], receive: Receive) -> Receive:
    """The buffered body piece by piece, then the messages of the connection."""
    ended = False

    async def call() -> Message:
        nonlocal ended
        if ended:
            return await receive()
        piece = body.read(_PIECE)
        ended = len(piece) < _PIECE
        return {"type": "http.request", "body": piece, "more_body": not ended}

    return call
