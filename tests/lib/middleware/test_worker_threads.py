# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Blocking routes do not delay other requests, and all functions of a route work in its thread."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import anyio
import httpx
import pytest
from fastapi import FastAPI, File, HTTPException, UploadFile
from fastapi.background import BackgroundTasks
from fastapi.responses import FileResponse, StreamingResponse

from lib.middleware.worker_threads import Threads, kind_of

caller: ContextVar[str] = ContextVar("caller", default="nobody")


class World:
    """An application whose routes block, await, stream, take files and fail."""

    def __init__(self, folder):
        self.go, self.done = threading.Event(), []
        self.app = app = FastAPI()

        @app.post("/infer/slow")
        @app.post("/train/slow")
        @app.get("/slow")
        async def slow():
            assert self.go.wait(20)
            return threading.current_thread() is threading.main_thread()

        @app.get("/quick")
        async def quick():
            await asyncio.sleep(0)
            return {"caller": caller.get()}

        @app.get("/stream")
        async def stream():
            async def parts():
                for part in (b"a", b"b", b"c"):
                    await asyncio.sleep(0.01)
                    yield part

            return StreamingResponse(parts())

        @app.put("/file")
        async def file(background: BackgroundTasks, sent: UploadFile = File(...)):  # noqa: B008
            background.add_task(self.done.append, sent.filename)
            return len(await sent.read())

        @app.get("/file")
        async def download():
            (folder / "x.bin").write_bytes(b"0123456789" * 20_000)
            return FileResponse(folder / "x.bin")

        @app.get("/fails/{how}")
        async def fails(how: str):
            raise HTTPException(418, "no") if how == "http" else KeyError(how)

        app.router.middleware_stack = Threads(app.router.middleware_stack)

    def run(self, work):
        async def main():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                await work(client)

        anyio.run(main)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.mark.parametrize(("verb", "path"), [("GET", "/slow"), ("POST", "/infer/slow"), ("POST", "/train/slow")])
def test_a_route_that_blocks_holds_up_nobody(world, verb, path):
    async def work(client):
        waiting = [asyncio.create_task(client.request(verb, path)) for _ in range(5)]
        for _ in range(3):
            assert (await client.get("/quick")).status_code == 200
        assert not any(task.done() for task in waiting)
        world.go.set()
        assert [reply.json() for reply in await asyncio.gather(*waiting)] == [False] * 5

    world.run(work)


def test_context_goes_along(world):
    async def work(client):
        caller.set("ann")
        assert (await client.get("/quick")).json() == {"caller": "ann"}

    world.run(work)


def test_streams_uploads_downloads_and_background_work(world):
    async def work(client):
        assert (await client.get("/stream")).content == b"abc"
        for size in (10, 3_000_000):
            assert (await client.put("/file", files={"sent": ("x.bin", b"1" * size)})).json() == size
        assert world.done == ["x.bin", "x.bin"]
        assert (await client.get("/file")).content == b"0123456789" * 20_000

    world.run(work)


def test_errors_come_out_as_they_went_in(world):
    async def work(client):
        reply = await client.get("/fails/http")
        assert (reply.status_code, reply.json()) == (418, {"detail": "no"})
        assert (await client.get("/fails/other")).status_code == 500

    world.run(work)


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/train/bundle", "heavy"),
        ("GET", "/train/", "other"),
        ("DELETE", "/train/", "other"),
        ("POST", "/scoring/predictive_entropy", "heavy"),
        ("POST", "/batch/infer/bundle", "heavy"),
        ("POST", "/infer/query_region", "infer"),
        ("POST", "/activelearning/random", "activelearning"),
        ("GET", "/info/", "other"),
        ("PUT", "/datastore/label", "other"),
        ("GET", "/trainers", "other"),
    ],
)
def test_kinds(method, path, kind):
    assert kind_of({"method": method, "path": path}) == kind


def test_heavy_requests_run_one_after_the_other(world):
    running, most = [], []

    @world.app.post("/scoring/{number}")
    async def score(number: int):
        running.append(number)
        most.append(len(running))
        threading.Event().wait(0.05)
        running.remove(number)

    async def work(client):
        await asyncio.gather(*(client.post(f"/scoring/{i}") for i in range(4)))

    world.run(work)
    assert most == [1, 1, 1, 1]
