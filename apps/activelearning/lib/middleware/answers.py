# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Responses, sent independently of their worker thread: a client that does not read occupies only a connection."""

from __future__ import annotations

import asyncio
from typing import BinaryIO

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.types import Message, Send

# A response is sent in pieces of this size, so that progress on a slow connection is visible.
_PIECE = 2**18
# Bytes by which a streaming route may be ahead of its client.
_AHEAD_BYTES = 2**22


class AnswerError(OSError):
    """The client of an answer has stopped to read it."""


class Answer:
    """One answer on its way from a worker thread to the server's loop, where `send_all` sends it.

    Args:
        server: loop of the server.
        send: of the connection.
        idle_seconds: longest time that a client may take for one piece.
        disk: limits the threads that read files.
    """

    def __init__(
        self, server: asyncio.AbstractEventLoop, send: Send, idle_seconds: float, disk: CapacityLimiter
    ) -> None:
        self.server = server
        self.send = send
        self.idle_seconds = idle_seconds
        self.disk = disk
        self._waiting: asyncio.Queue[Message | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._ahead = 0
        self._failed = False

    async def put(self, message: Message) -> None:
        """Accept a message of the worker's loop; wait only if a route streams far ahead of its client."""
        if self._failed:
            raise AnswerError("the client does not read its answer")
        if message["type"] == "http.response.pathsend":
            # Opened here: the route may delete the file as soon as this returns.
            message = {**message, "stream": open(message["path"], "rb")}  # noqa: SIM115
        self.server.call_soon_threadsafe(self._take, message)
        if self._ahead > _AHEAD_BYTES and message.get("more_body", False):
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._has_room(), self.server))

    def end(self) -> None:
        """On the server's loop: nothing follows."""
        self._waiting.put_nowait(None)

    async def send_all(self) -> None:
        """Send until `end`; the response of a client that does not read ends early."""
        while (message := await self._waiting.get()) is not None:
            try:
                if not self._failed:
                    await self._send(message)
            except AnswerError:
                self._failed = True
            finally:
                self._ahead -= len(message.get("body", b""))
                self._room.set()
                if "stream" in message:
                    message["stream"].close()

    def _take(self, message: Message) -> None:
        self._ahead += len(message.get("body", b""))
        self._waiting.put_nowait(message)

    async def _has_room(self) -> None:
        while self._ahead > _AHEAD_BYTES and not self._failed:
            self._room.clear()
            await self._room.wait()

    async def _send(self, message: Message) -> None:
        if "stream" in message:
            await self._send_file(message["stream"])
            return
        body = message.get("body", b"")
        for start in range(0, len(body) - _PIECE, _PIECE):
            await self._within({"type": message["type"], "body": body[start : start + _PIECE], "more_body": True})
        if len(body) > _PIECE:
            message = {**message, "body": body[(len(body) - 1) // _PIECE * _PIECE :]}
        await self._within(message)

    async def _send_file(self, stream: BinaryIO) -> None:
        while piece := await anyio.to_thread.run_sync(stream.read, _PIECE, limiter=self.disk):
            await self._within({"type": "http.response.body", "body": piece, "more_body": True})
        await self._within({"type": "http.response.body", "body": b""})

    async def _within(self, message: Message) -> None:
        try:
            await asyncio.wait_for(self.send(message), self.idle_seconds)
        except asyncio.TimeoutError:
            raise AnswerError("the client does not read its answer") from None
