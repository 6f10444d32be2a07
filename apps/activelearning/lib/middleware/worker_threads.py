# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Requests are answered in threads: MONAI Label's routes block, so on its event loop each would hold up all others."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter
from monailabel.config import settings
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.middleware.answers import Answer, AnswerError

# Concurrent requests per kind; waiting requests of one kind never block another. Trainings, scorings and batch
# inference inside of the server use the networks, so they run one at a time.
_KINDS = {"activelearning": 64, "infer": 32, "heavy": 1, "other": 64}
_HEAVY = re.compile(r"/(train|scoring|batch)(/|$)")
_OWN = re.compile(r"/(activelearning|infer)(/|$)")

# Seconds for which a computing thread may keep the interpreter; Python's default of 5 ms adds up over the few switches
# of a request.
_SWITCH_SECONDS = 0.001


class Threads:
    """Serve each HTTP request on its own event loop, in a worker thread.

    A route blocks, computes, awaits, streams, reads uploads and encodes JSON there; only bytes cross over to the
    server's loop. Context variables are copied. Several threads therefore use the objects that routes share. The ledger
    opens a connection per call, the summaries one per request. Labels change under their image's lock (`MergedLabels`),
    regions are chosen and leased under the locks of the batch planner, and networks run under their ensemble's lock.
    The tables of the datastore and the clients have their own locks or replace entries as a whole. MONAI Label's table
    of tasks changes only in requests of the kind "heavy" and in the background thread; a separate lock serialises
    trainings.

    Plain `def` routes in the thread pool of the server's loop are no faster. Against this class, medians of 12
    interleaved series of a route of 5 ms with 4 clients on 2 busy cores were 1.01 times as long (1.03 beside a thread
    that computes). For `def` routes inside this class, which start one more thread per request, they were 1.08 (1.21)
    times as long. In `bench latency` with all own routes as `def` on the server's loop, medians of "next region",
    "save" and "info" were 1.3 to 2.0 times as long; two runs of this class differed by 1.3 to 1.5 times.
    """

    def __init__(self, app: ASGIApp, idle_seconds: float = 30) -> None:
        self.app = app
        self.idle_seconds = idle_seconds
        self._disk = CapacityLimiter(8)
        self._limiters: dict[str, CapacityLimiter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        server = asyncio.get_running_loop()
        # Small requests arrive in one piece: read here, they need no further switch to the server's loop.
        receive = _after(await receive(), _across(server, receive))
        answer = Answer(server, send, self.idle_seconds, self._disk)
        serve = partial(_serve, self.app, _for_worker(scope), receive, answer.put)
        kind = kind_of(scope)
        limiter = self._limiters.setdefault(kind, CapacityLimiter(_KINDS[kind]))
        sending = asyncio.ensure_future(answer.send_all())
        try:
            await anyio.to_thread.run_sync(serve, limiter=limiter)
        except AnswerError:
            pass
        finally:
            answer.end()
            await sending


def kind_of(scope: Scope) -> str:
    """Kind of a request, a key of `_KINDS`."""
    path = scope["path"].removeprefix(settings.MONAI_LABEL_API_STR)
    if scope["method"] == "POST" and _HEAVY.match(path):
        return "heavy"
    own = _OWN.match(path)
    return own[1] if own else "other"


def prefer_answers() -> None:
    """Shorten the time slices of computing threads in the process of the server."""
    sys.setswitchinterval(_SWITCH_SECONDS)


def _serve(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    async def answer() -> None:
        await app(scope, receive, send)

    asyncio.run(answer())


def _across(server: asyncio.AbstractEventLoop, work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`work`, which belongs to the loop of the server, for a caller on another loop."""

    async def on_server(*values: Any) -> Any:
        return await work(*values)

    async def call(*values: Any) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(on_server(*values), server))

    return call


def _after(first: Message, receive: Receive) -> Receive:
    """Return `first` once, then the received messages."""
    waiting = [first]

    async def call() -> Message:
        return waiting.pop() if waiting else await receive()

    return call


def _for_worker(scope: Scope) -> Scope:
    """The request for a worker: files are sent whole by the server's loop, so their routes are free at once."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"range", b"if-range")]
    return {**scope, "headers": headers, "extensions": {**scope.get("extensions", {}), "http.response.pathsend": {}}}
