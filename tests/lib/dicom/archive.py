# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A DICOMweb server in memory: the parts of QIDO-RS, WADO-RS and STOW-RS that the app uses."""

from __future__ import annotations

import io
import threading
import time
from email.parser import BytesParser

import pydicom
import uvicorn
from fastapi import FastAPI, Request, Response
from pydicom.dataset import Dataset

from eval.runner.server import free_port


class Archive:
    """Objects by UID, served on the loopback address; a `status` other than 200 is the response to every request."""

    def __init__(self) -> None:
        self.objects: dict[str, Dataset] = {}
        self.status = 200
        self.page: int | None = None
        self.retrieved: list[str] = []
        self.url = f"http://127.0.0.1:{free_port()}/dicom-web"
        config = uvicorn.Config(self._app(), port=int(self.url.split(":")[2].split("/")[0]), log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def add(self, *items: Dataset) -> None:
        self.objects |= {str(item.SOPInstanceUID): item for item in items}

    def _of(self, series: str) -> list[Dataset]:
        return [item for item in self.objects.values() if item.SeriesInstanceUID == series]

    def _app(self) -> FastAPI:
        app = FastAPI()
        base = "/dicom-web/studies/{study}/series/{series}"

        @app.middleware("http")
        async def refuse(request: Request, call_next):
            return await call_next(request) if self.status == 200 else Response(status_code=self.status)

        @app.get("/dicom-web/series")
        def list_series(request: Request):
            query = request.query_params
            wanted = query.get("Modality")
            found = {str(i.SeriesInstanceUID): i for i in self.objects.values() if wanted in (None, i.Modality)}
            first = int(query.get("offset", 0))
            end = first + self.page if self.page else None
            return [self._listed(item) for item in list(found.values())[first:end]]

        @app.get(f"{base}/instances")
        def list_instances(series: str):
            return [{"00080018": {"vr": "UI", "Value": [str(item.SOPInstanceUID)]}} for item in self._of(series)]

        @app.get(f"{base}/metadata")
        def metadata(series: str):
            headers = []
            for item in self._of(series):
                header = Dataset()
                header.update({e.tag: e for e in item if e.keyword != "PixelData"})
                headers.append(header.to_json_dict())
            return headers

        @app.get(base)
        def retrieve_series(series: str):
            self.retrieved.append(series)
            return _multipart(self._of(series))

        @app.get(f"{base}/instances/{{instance}}")
        def retrieve_instance(instance: str):
            self.retrieved.append(instance)
            return _multipart([self.objects[instance]])

        @app.post("/dicom-web/studies")
        async def store(request: Request):
            head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
            for part in BytesParser().parsebytes(head + await request.body()).get_payload():
                self.add(pydicom.dcmread(io.BytesIO(part.get_payload(decode=True))))
            return Response(b'<?xml version="1.0"?><NativeDicomModel/>', media_type="application/dicom+xml")

        return app

    def _listed(self, item: Dataset) -> dict:
        listed = Dataset()
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "PatientID", "StudyDate", "StudyTime"):
            setattr(listed, keyword, item.get(keyword))
        listed.NumberOfSeriesRelatedInstances = len(self._of(item.SeriesInstanceUID))
        return listed.to_json_dict()


def _multipart(items: list[Dataset]) -> Response:
    body = io.BytesIO()
    for item in items:
        body.write(b"--part\r\nContent-Type: application/dicom\r\n\r\n")
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, item, write_like_original=False)
        body.write(stream.getvalue() + b"\r\n")
    body.write(b"--part--\r\n")
    return Response(body.getvalue(), media_type='multipart/related; type="application/dicom"; boundary=part')
