# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Parts of hostile requests, and checks afterwards."""

from __future__ import annotations

import gzip
import io
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil

from tests.system.conftest import CLASSES

MIB = 2**20
OUTSIDE = "../../outside"
UID = "0" * 8


def surroundings(place: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file around and inside of the studies; the server's log and databases may grow.

    Temporary files of an upload exist for a moment, so the temporary folder is checked at the end.
    """
    return {
        str(path.relative_to(place)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in place.rglob("*")
        if path.is_file() and path.suffix != ".log" and "sqlite" not in path.name and place / "tmp" not in path.parents
    }


def sentence_of(reply: httpx.Response) -> str:
    detail = reply.json()["detail"]
    assert isinstance(detail, str), detail
    assert "\n" not in detail
    assert "Traceback" not in detail
    return detail


def form(content: bytes, name: str = "label.nii.gz", params: Any = None, field: str = "label") -> dict[str, Any]:
    sent = {"client_id": "ann", "label_info": CLASSES} if params is None else params
    text = sent if isinstance(sent, str) else json.dumps(sent)
    return {"data": {"params": text}, "files": {field: (name, io.BytesIO(content))}}


def image(phantoms: Path) -> str:
    return sorted((phantoms / "imagesTr").glob("*.nii.gz"))[0].name.removesuffix(".nii.gz")


def label(phantoms: Path) -> bytes:
    return sorted((phantoms / "labelsTr").glob("*.nii.gz"))[0].read_bytes()


def header(shape: tuple[int, ...], kind: type = np.uint8, **fields: Any) -> bytes:
    made = nib.Nifti1Header()
    made.set_data_dtype(kind)
    made["dim"][: len(shape) + 1] = [len(shape), *shape]
    made["pixdim"][1:4], made["magic"], made["vox_offset"] = 1, b"n+1", 352
    made["srow_x"], made["srow_y"], made["srow_z"] = np.eye(4)[:3]
    made["sform_code"] = 1
    for name, value in fields.items():
        made[name] = value
    return made.binaryblock + b"\0" * 4


def zeros(head: bytes, count: int) -> bytes:
    """A file of zeros that packs to a thousandth, made without holding it."""
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as packed:
        packed.write(head)
        for _ in range(count // MIB):
            packed.write(bytes(MIB))
    return stream.getvalue()


class Watched:
    """The most memory a process has while something happens."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.most = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watched:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, self.process.memory_info().rss)


RAW = {"Content-Type": "multipart/form-data; boundary=b"}


def raw_form(field: str, name: str, content: bytes) -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--b--\r\n"
