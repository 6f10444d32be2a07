# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The referee's HTTP client: MONAI Label's own routes, one method each, errors as one sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from eval.errors import RefereeError
from eval.protocol.dataset import content_digest
from eval.protocol.oracle import from_nifti

_POLL_SECONDS = 1.0
_KEPT_SECONDS = 2.0
_BUSY = ("SUBMITTED", "RUNNING")


class LabelClient:
    """Client of one MONAI Label server that runs the app; `client_id` is the id of the annotator."""

    def __init__(
        self,
        url: str,
        client_id: str = "oracle",
        *,
        timeout: float = 3600,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url
        self.client_id = client_id
        limits = httpx.Timeout(timeout, connect=30)
        # The server closes connections after 5 idle seconds; a request at that moment gets no response.
        kept = httpx.Limits(keepalive_expiry=_KEPT_SECONDS)
        self._http = httpx.Client(base_url=url, timeout=limits, limits=kept, transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def info(self) -> dict[str, Any]:
        """GET /info/."""
        result: dict[str, Any] = self._json("GET", "/info/")
        return result

    def train(self, bundle: str, request: Mapping[str, Any], watch: Callable[[], None] | None = None) -> None:
        """Train and wait for the end; raises RefereeError with the trainer's last lines when it fails."""
        self._task("train", bundle, request, watch)

    def score(self, uncertainty: str, request: Mapping[str, Any]) -> None:
        """Compute and cache the moments of the pool, inside of the server."""
        self._json("POST", f"/scoring/{uncertainty}", params={"run_sync": "true"}, json=dict(request))

    def query(self, method: str, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Regions to annotate next; empty if none is left."""
        reply = self._json("POST", f"/activelearning/{method}", json={**request, "client_id": self.client_id})
        return list(reply.get("regions", []))

    def picture(self, query: int) -> bytes | None:
        """The server's picture of a region; None if there is none."""
        reply = self._send("GET", f"/patchwise/queries/{query}/picture.png", allow=(404,))
        return reply.content if reply.status_code == 200 else None

    def minutes(self, query: int) -> float | None:
        """Minutes from the lease of a region to its answer, from the server's ledger; None if unknown."""
        reply = self._send("GET", f"/patchwise/queries/{query}", allow=(404,))
        found = reply.json().get("minutes") if reply.status_code == 200 else None
        return None if found is None else float(found)

    def save(self, image: str, label: bytes, params: Mapping[str, Any]) -> None:
        """Submit an answer as an annotator's viewer does."""
        sent = json.dumps({**params, "client_id": self.client_id})
        files = {"label": (f"{image}.nii.gz", label, "application/gzip")}
        self._json(
            "PUT", "/datastore/label", params={"image": image, "tag": "final"}, data={"params": sent}, files=files
        )

    def images(self) -> set[str]:
        """Ids of all images of the server's datastore."""
        return set(self._json("GET", "/datastore/", params={"output": "all"}).get("objects", {}))

    def image_digest(self, image: str, folder: Path) -> str:
        """Content digest of an image as the server holds it, downloaded to `folder` for the while."""
        path = folder / "image.nii.gz"
        path.write_bytes(self._send("GET", "/datastore/image", params={"image": image}).content)
        return content_digest(path)

    def open_session(self, image: Path) -> str:
        """Upload an image that is not in the pool; return an id for `infer`."""
        with open(image, "rb") as stream:
            reply = self._json("PUT", "/session/", files={"files": (image.name, stream, "application/gzip")})
        return str(reply["session_id"])

    def has_session(self, session: str) -> bool:
        """Return whether the server still holds an uploaded image."""
        return self._send("GET", f"/session/{session}", allow=(404,)).status_code == 200

    def infer(self, bundle: str, session: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Label map and affine of an uploaded image, on its own grid."""
        sent = json.dumps({"result_extension": ".nii.gz", "result_dtype": "uint8", "client_id": self.client_id})
        query = {"session_id": session, "output": "image"}
        reply = self._send("POST", f"/infer/{bundle}", params=query, data={"params": sent})
        try:
            return from_nifti(reply.content)
        except Exception as error:
            raise RefereeError(
                f"POST /infer/{bundle} answered {len(reply.content)} bytes that are not NIfTI"
            ) from error

    def _task(self, kind: str, name: str, request: Mapping[str, Any], watch: Callable[[], None] | None) -> None:
        task = self._json("POST", f"/{kind}/{name}", json=dict(request))
        pause = 0.05
        while task["status"] in _BUSY:
            if watch is not None:
                watch()
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)
            listed = self._json("GET", f"/{kind}/", params={"all": "true"})
            mine = [t for t in listed if t["id"] == task["id"]] if isinstance(listed, list) else []
            if not mine:
                raise RefereeError(f"the server forgot {kind} {name} while it ran; it was restarted, so run `resume`")
            task = mine[0]
        if task["status"] != "DONE":
            last = [str(line) for line in task.get("details") or ["no details"]]
            raise RefereeError(f"{kind} {name} ended as {task['status']}: {_reason(last)}")

    def _json(self, verb: str, path: str, **options: Any) -> Any:
        reply = self._send(verb, path, **options)
        try:
            return reply.json()
        except ValueError as error:
            raise RefereeError(f"{verb} {path} answered no JSON: {reply.text[:200]}") from error

    def _send(self, verb: str, path: str, *, allow: tuple[int, ...] = (), **options: Any) -> httpx.Response:
        try:
            try:
                reply = self._http.request(verb, path, **options)
            except httpx.RemoteProtocolError:
                # A broken connection must not end a study of hours if the request can be repeated safely.
                if verb != "GET":
                    raise
                reply = self._http.request(verb, path, **options)
        except httpx.TransportError as error:
            raise RefereeError(
                f"{verb} {path} got no answer from {self.url} ({type(error).__name__}); see the server's log"
            ) from error
        if reply.is_error and reply.status_code not in allow:
            raise RefereeError(f"{verb} {path} was refused ({reply.status_code}): {_detail(reply)}")
        return reply


def _detail(reply: httpx.Response) -> str:
    """The sentence inside FastAPI's {"detail": ...}, or the start of the text."""
    try:
        content = reply.json()
    except ValueError:
        return reply.text[:300]
    detail = content.get("detail", content) if isinstance(content, dict) else content
    return detail if isinstance(detail, str) else json.dumps(detail)[:300]


def _reason(lines: list[str]) -> str:
    """Line of a task's last output with the reason: the exception, else the last line."""
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines)[-1].strip()
