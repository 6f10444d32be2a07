# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A stand-in for the server's HTTP surface, for tests of the referee: without training of a network.

Its responses to the referee depend on the requests. Like the real server, it keeps its persistent state in the studies
folder.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from pathlib import Path
from typing import ClassVar

import numpy as np
import uvicorn
from fastapi import FastAPI, Form, HTTPException, Request, Response, UploadFile

from eval.protocol.oracle import from_nifti, to_nifti
from eval.protocol.volumes import read_volume
from eval.runner.server import free_port


class StandIn:
    """Stand-in for `eval.runner.server.ServerProcess`; class attributes define the failures and their time."""

    fail_on: str | None = None  # "route count": that call of a route is refused
    calls: ClassVar[list[str]] = []
    minutes_each: float | None = None  # minutes in its ledger for query 1; twice that for query 2

    def __init__(self, studies: Path, conf: dict, *, log: Path, threads: int, env=None, port=None) -> None:
        self.studies, self.conf, self.threads = studies, conf, threads
        self.port = port or free_port()
        self.note = studies / "standin.json"
        self.url = f"http://127.0.0.1:{self.port}"
        self.sessions: dict[str, bytes] = {}
        self.saved: dict[int, tuple[np.ndarray, dict]] = {}
        self.tasks: list[dict] = []
        self._server: uvicorn.Server | None = None

    def start(self, seconds: float = 10) -> None:
        self.memory = json.loads(self.note.read_text()) if self.note.exists() else {"queries": {}, "answered": []}
        self._server = uvicorn.Server(uvicorn.Config(self._app(), port=self.port, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join()
            self._server = None

    def _count(self, route: str) -> None:
        StandIn.calls.append(route)
        if self.fail_on == f"{route} {StandIn.calls.count(route)}":
            raise HTTPException(400, f"the stand-in refuses {route}")

    def _images(self) -> list[str]:
        return sorted(p.name.removesuffix(".nii.gz") for p in self.studies.glob("*.nii.gz"))

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/info/")
        def info():
            methods = {"random": {"posterior": None}, "power_pe": {"posterior": "ensemble"}}
            model = {"digest": str(len(self.memory["answered"]))}
            return {"models": {"net": {}}, "trainers": {"net": {}}, "patchwise": {"model": model, "methods": methods}}

        @app.get("/datastore/")
        def datastore():
            return {"objects": {image: {} for image in self._images()}}

        @app.get("/datastore/image")
        def image(image: str):
            return Response((self.studies / f"{image}.nii.gz").read_bytes(), media_type="application/gzip")

        @app.post("/train/{model}")
        def train(model: str, request: dict):
            self._count("train")
            assert model == "net"
            self.tasks.append({"id": str(uuid.uuid4()), "status": "DONE", "request": request})
            return {**self.tasks[-1], "status": "RUNNING"}

        @app.get("/train/")
        def trained():
            return self.tasks

        @app.post("/scoring/{name}")
        def score(name: str, request: dict):
            self._count("score")
            return {}

        @app.post("/activelearning/{method}")
        def query(method: str, request: dict):
            self._count("query")
            known = self.memory["queries"]
            if request["request_id"] not in known:
                words = f"{method} {request['seed']} {request['round']}".encode()
                rng = np.random.default_rng(list(words))
                first = sum(len(v) for v in known.values())
                regions = []
                for i in range(request["batch"]):
                    image = rng.choice(self._images())
                    shape = read_volume(self.studies / f"{image}.nii.gz")[0].shape
                    start = [int(rng.integers(n - d + 1)) for n, d in zip(shape, request["size"], strict=True)]
                    found = {"query": first + i + 1, "image": image, "start": start, "size": request["size"]}
                    regions.append({**found, "unit": "patch", "score": float(rng.random())})
                known[request["request_id"]] = regions
                self.note.write_text(json.dumps(self.memory))
            return {"id": "x", "regions": known[request["request_id"]]}

        @app.get("/patchwise/queries/{number}")
        def asked(number: int):
            known = {"query": number, "state": "submitted", "seconds": 1.0, "elapsed_minutes": 99.0}
            return known if self.minutes_each is None else {**known, "minutes": number * self.minutes_each}

        @app.put("/datastore/label")
        async def save(image: str, label: UploadFile, params: str = Form("{}")):
            self._count("save")
            sent = json.loads(params)
            if sent.get("whole"):
                self.memory.setdefault("whole", {})[image] = from_nifti(await label.read())[0].tolist()
                self.note.write_text(json.dumps(self.memory))
                return {}
            for number in sent["queries"]:
                self.saved[number] = (from_nifti(await label.read())[0], sent)
                await label.seek(0)
            self.memory["answered"] = sorted({*self.memory["answered"], *sent["queries"]})
            self.note.write_text(json.dumps(self.memory))
            return {}

        @app.put("/session/")
        async def session(files: UploadFile):
            self._count("session")
            name = str(uuid.uuid4())
            self.sessions[name] = await files.read()
            return {"session_id": name}

        @app.get("/session/{name}")
        def held(name: str):
            if name not in self.sessions:
                raise HTTPException(404, "no such session")
            return {}

        @app.post("/infer/{model}")
        async def infer(model: str, session_id: str, request: Request):
            self._count("infer")
            content = self.sessions[session_id]
            path = self.studies / f"session_{session_id}.tmp.nii.gz"
            path.write_bytes(content)
            image_xyz, affine, _ = read_volume(path)
            path.unlink()
            bright = image_xyz > np.quantile(image_xyz, 0.9 + 0.002 * len(self.memory["answered"]))
            half = np.arange(image_xyz.shape[1])[None, :, None] < image_xyz.shape[1] // 2
            label_xyz = np.where(bright, np.where(half, 2, 1), 0).astype(np.uint8)
            return Response(to_nifti(label_xyz, affine), media_type="application/gzip")

        return app
