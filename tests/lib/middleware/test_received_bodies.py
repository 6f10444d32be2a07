# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Requests that do not arrive and answers that are not read hold no worker thread; on a real socket."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from starlette.responses import Response

from lib.errors import refuse
from lib.middleware import worker_threads
from lib.middleware.received_bodies import ReceivedBodies
from lib.middleware.upstream_patches import limit_heads
from lib.middleware.worker_threads import Threads

IDLE, TOTAL, MOST = 0.6, 2.0, 40 * 2**20


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Port of a small application with one worker thread of each kind."""
    app, folder = FastAPI(), tmp_path_factory.mktemp("files")
    (folder / "big").write_bytes(b"0123456789abcdef" * 2**20)

    @app.post("/size")
    async def size(request: Request):
        return len(await request.body())

    @app.get("/big")
    async def big():
        return FileResponse(folder / "big")

    @app.get("/memory")
    async def memory():
        return Response(b"x" * 2**24)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_threads, "_KINDS", dict.fromkeys(worker_threads._KINDS, 1))
        app.router.middleware_stack = Threads(app.router.middleware_stack, IDLE)

        def limit(scope):
            told = dict(scope["headers"]).get(b"content-length", b"0")
            return refuse("too long", 413) if int(told) > MOST else MOST

        limit_heads(IDLE)
        config = uvicorn.Config(ReceivedBodies(app, limit, IDLE, TOTAL), port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join(20)


def connect(port, sent):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(sent)
    return connection


def rest(connection):
    found = b""
    while piece := connection.recv(2**16):
        found += piece
    return found


def post(body, length=None, close=True):
    head = f"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n"
    return head.encode() + (b"Connection: close\r\n" if close else b"") + b"\r\n" + body


HALVES = [
    b"",
    b"POST /si",
    b"POST /size HTTP/1.1\r\nHost: x\r\nConte",
    post(b"half", 100),
    post(b"", 5),
    b"POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    post(b"x" * 2**21, 2**22),
]


@pytest.mark.parametrize("half", HALVES)
def test_half_a_request_is_ended_with_408(port, half):
    begun = time.monotonic()
    with connect(port, half) as connection:
        answer = rest(connection)
    assert b"HTTP/1.1 408 " in answer
    assert time.monotonic() - begun < IDLE + 3


def test_half_a_second_request_is_ended_with_408(port):
    with connect(port, b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert b" 404 " in connection.recv(2**16)
        connection.sendall(b"GET /si")
        assert b"HTTP/1.1 408 " in rest(connection)


def test_a_request_that_drips_is_ended_with_408(port):
    begun = time.monotonic()
    with connect(port, post(b"", 1000)) as connection:
        for _ in range(40):
            try:
                connection.sendall(b"x")
            except OSError:
                break
            time.sleep(0.1)
        assert time.monotonic() - begun > TOTAL - 0.5
        assert b"HTTP/1.1 408 " in rest(connection)


def test_a_declared_length_is_refused_at_once(port):
    begun = time.monotonic()
    with connect(port, post(b"", MOST + 1)) as connection:
        assert b" 413 " in connection.recv(2**16)
    assert time.monotonic() - begun < IDLE


def test_more_than_the_limit_in_chunks(port):
    with connect(port, b"POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n") as connection:
        block = b"400000\r\n" + b"x" * 2**22 + b"\r\n"
        for _ in range(11):
            connection.sendall(block)
        assert b" 413 " in connection.recv(2**16)


def test_bodies_arrive_whole(port):
    for length in (0, 1, 2**18, 2**20, 2**20 + 1, 3 * 2**20 + 7):
        with connect(port, post(b"x" * length)) as connection:
            assert rest(connection).endswith(str(length).encode())


@pytest.mark.parametrize("path", ["/big", "/memory"])
def test_answers_that_are_not_read_hold_no_worker(port, path):
    ask = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
    unread = [connect(port, ask + b"\r\n") for _ in range(4)]
    begun = time.monotonic()
    with connect(port, post(b"body")) as connection:
        assert rest(connection).endswith(b"4")
    assert time.monotonic() - begun < IDLE
    for connection in unread:
        connection.close()
    with connect(port, ask + b"Range: bytes=0-3\r\n\r\n") as connection:
        assert len(rest(connection).partition(b"\r\n\r\n")[2]) == 2**24
