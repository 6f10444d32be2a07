# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Replacements of routes of MONAI Label that would read, write or keep more than requested."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, UploadFile
from fastapi.background import BackgroundTasks
from monailabel.config import settings
from monailabel.endpoints import datastore as upstream_datastore
from monailabel.endpoints import logs as upstream_logs
from monailabel.endpoints import ohif as upstream_ohif
from monailabel.endpoints import session as upstream_session
from monailabel.endpoints.user.auth import User
from monailabel.utils.others.generic import file_checksum
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, HTMLResponse, Response

from lib.errors import refuse
from lib.middleware.request_checks import check_plain_name
from lib.middleware.roles import ADMIN, ANNOTATOR, USER
from lib.routes.services import Services
from lib.storage.atomic_files import folded
from lib.storage.volume_headers import check_self_contained
from lib.storage.volumes import EXTENSIONS, check_image
from lib.studies.datastore import FINAL
from lib.studies.request_context import SENT_FILE, as_sent

_CHECK_SUM = re.compile(r"(?:(SHA256|SHA512|MD5):)?([0-9a-fA-F]{32,128})")
_MOST_FILES = 10_000
# DEFLATE compresses at most 1032 bytes into one; other methods of ZIP compress more, and have the same limit.
_MOST_PACKED = 1040


@contextmanager
def cleaned(background: BackgroundTasks) -> Iterator[None]:
    """Remove temporary files of MONAI Label's route, even if it ends with an error."""
    try:
        yield
    except BaseException:
        for task in background.tasks:
            task.func(*task.args, **task.kwargs)
        raise


def sent_name(file: UploadFile) -> str | None:
    """Name of an upload as its client calls it, at most 80 characters."""
    return Path(file.filename or "").name[:80] or None


@contextmanager
def received(file: UploadFile) -> Iterator[Path]:
    """A copy of an upload under its extension; the upload itself is at its beginning again."""
    name = Path(file.filename or "").name
    extension = next((e for e in EXTENSIONS if name.endswith(e)), None)
    if extension is None:
        refuse(f"{name[:80]!r}: images must end in {', '.join(EXTENSIONS)}")
    with tempfile.NamedTemporaryFile(prefix="patchwise-", suffix=extension) as stream:
        shutil.copyfileobj(file.file, stream)
        stream.flush()
        file.file.seek(0)
        SENT_FILE.set(sent_name(file))
        with as_sent(Path(stream.name)):
            yield Path(stream.name)


def datastore_routes(services: Services) -> APIRouter:
    """Uploads and downloads that leave nothing in the temporary folder."""
    router = APIRouter(tags=["Datastore"], prefix="/datastore")

    @router.put("/", summary="Upload an image", include_in_schema=False)
    @router.put("/image", summary="Upload an image")
    async def add_image(
        background: BackgroundTasks,
        image: str | None = None,
        params: str = Form("{}"),
        file: UploadFile = File(...),  # noqa: B008
        user: User = ANNOTATOR,
    ) -> Any:
        SENT_FILE.set(sent_name(file))
        with cleaned(background):
            return upstream_datastore.add_image(background, image, params, file, user.username)

    @router.put("/label", summary="Save a label; only the queried regions become labelled")
    async def save_label(
        background: BackgroundTasks,
        image: str,
        params: str = Form("{}"),
        tag: str = FINAL,
        label: UploadFile = File(...),  # noqa: B008
        user: User = ANNOTATOR,
    ) -> Any:
        SENT_FILE.set(sent_name(label))
        with cleaned(background):
            return upstream_datastore.save_label(background, image, params, tag, label, user.username)

    @router.head("/image", summary="Check if an image exists")
    async def check_image_sum(image: str, check_sum: str | None = None, user: User = USER) -> dict[str, Any]:
        path, found = services.store.get_image_uri(image), _CHECK_SUM.fullmatch(check_sum or "")
        if check_sum and not found:
            refuse(f"check_sum {check_sum[:80]!r} cannot be used; send SHA256:, SHA512: or MD5: and hexadecimal digits")
        if found and not file_checksum(path, found[1] or "SHA256").endswith(f":{found[2].lower()}"):
            refuse(f"the file of image {image!r} has another check sum", 404)
        return {}

    @router.get("/dataset", summary="Download images and labels as a ZIP archive")
    async def dataset(
        limit_cases: Annotated[int | None, Query(ge=0, le=1_000_000)] = None, user: User = ANNOTATOR
    ) -> FileResponse:
        response: FileResponse = upstream_datastore.download_dataset(limit_cases)
        response.background = BackgroundTask(os.unlink, response.path)
        return response

    return router


def session_routes(services: Services) -> APIRouter:
    """Sessions: images that clients bring along, kept for a while."""
    router = APIRouter(tags=["Session"], prefix="/session")

    @router.put("/", summary="New session with an image")
    async def create(
        uncompress: bool = False,
        expiry: int = 0,
        files: list[UploadFile] = File(...),  # noqa: B008
        user: User = USER,
    ) -> dict[str, Any]:
        sessions = services.sessions()
        if sessions is None:
            refuse("sessions are turned off on this server; name an image of the studies folder", 406)
        with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
            kept = _keep(files, Path(folder) / "files")
            source = kept[0] if len(kept) == 1 else kept[0].parent
            if uncompress:
                source = _unpack(source, Path(folder) / "unpacked", services.options.upload_mib * 2**20)
            elif source.is_file():
                check_image(source, uploaded=True)
            for path in [source] if source.is_file() else sorted(source.rglob("*")):
                if path.is_file():
                    check_self_contained(path)
            number, info = sessions.add_session(str(source), expiry)
        return {"session_id": number, "session_info": info.to_json()}

    @router.get("/{session_id}", summary="A session, or its image")
    async def session(session_id: str, update_ts: bool = False, image: bool = False, user: User = USER) -> Any:
        check_plain_name(session_id, "session_id")
        answer = upstream_session.get_session(session_id, update_ts, image)
        if isinstance(answer, FileResponse) and Path(answer.path).is_dir():
            refuse(f"session {session_id} holds several files; it has no single image to download")
        return answer

    @router.delete("/{session_id}", summary="Delete a session")
    async def remove(session_id: str, user: User = USER) -> Any:
        check_plain_name(session_id, "session_id")
        return upstream_session.remove_session(session_id)

    return router


def other_routes(services: Services) -> APIRouter:
    """Add routes for functions that this app limits or does not offer."""
    router = APIRouter()

    @router.put("/model/{model}", tags=["Model"], summary="Refused: networks come from trainings")
    async def upload_model(model: str, user: User = ADMIN) -> None:
        refuse("weights are not taken from requests; a network comes from POST /train/{bundle} on this server", 409)

    @router.delete("/model/{model}", tags=["Model"], summary="Refused: the folder keeps its networks")
    async def delete_model(model: str, user: User = ADMIN) -> None:
        refuse("networks are not deleted by requests; train anew, or remove the folder under .patchwise/models", 409)

    @router.post("/reload", include_in_schema=False)
    async def reload(user: User = ADMIN) -> None:
        refuse("the app is not loaded again while it runs; restart the server", 409)

    @router.get("/", include_in_schema=False)
    @router.get("/docs", include_in_schema=False)
    def start() -> HTMLResponse:
        # MONAI Label's own pages here fetch their scripts from other servers.
        links = ("patchwise/", "The progress page"), ("ohif/", "OHIF"), ("logs/", "The log"), ("openapi.json", "Routes")
        listed = "".join(f'<li><a href="{address}">{name}</a></li>' for address, name in links)
        return _page("Patchwise", f"<ul>{listed}</ul>")

    @router.get("/logs/", tags=["Others"], summary="Last lines of the log")
    async def logs(
        lines: Annotated[int, Query(ge=1, le=100_000)] = 300,
        html: bool = True,
        text: bool = False,
        refresh: Annotated[int, Query(ge=0, le=86_400)] = 0,
        user: User = ADMIN,
    ) -> Any:
        path = os.path.join(settings.MONAI_LABEL_APP_DIR, "logs", "app.log")
        found: Response = upstream_logs.get_logs(path, lines, False, True, refresh)
        if text or not html:
            return found
        last = escape(bytes(found.body).decode("utf-8", "replace"))
        return _page("Log", f"<pre>{last}</pre>", max(refresh, 3) if refresh else 0)

    @router.get("/logs/gpu", tags=["Others"], summary="Output of nvidia-smi")
    async def gpu(user: User = ADMIN) -> Any:
        if shutil.which("nvidia-smi") is None:
            refuse("this machine has no nvidia-smi, so no GPUs are listed", 404)
        return await upstream_logs.gpu_info(user)

    @router.get("/ohif/{path:path}", include_in_schema=False)
    async def ohif(path: str, user: User = USER) -> FileResponse:
        pages = Path(upstream_ohif.__file__).parent / "static" / "ohif"
        answer: FileResponse = upstream_ohif.get_ohif("" if (pages / path).is_dir() else path)
        return answer

    @router.get("/proxy/dicom/{path:path}", include_in_schema=False)
    @router.post("/proxy/dicom/{path:path}", include_in_schema=False)
    async def proxy(path: str, user: User = USER) -> None:
        refuse("this server works on a folder, so there is no DICOMweb server behind it", 404)

    # In front of MONAI Label's own proxy only if that has no target.
    if services.studies.startswith(("http://", "https://")):
        router.routes[:] = [r for r in router.routes if "/proxy/" not in getattr(r, "path", "")]
    return router


def _page(title: str, content: str, refresh: int = 0) -> HTMLResponse:
    """A page without scripts: MONAI Label's need the internet."""
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    head = f'<meta charset="utf-8"><title>{title}</title>{again}'
    return HTMLResponse(
        f"<!doctype html><html lang=en><head>{head}</head><body><h1>{title}</h1>{content}</body></html>",
        headers={"Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'"},
    )


def _keep(files: Sequence[UploadFile], folder: Path) -> list[Path]:
    folder.mkdir()
    kept: list[Path] = []
    for file in files:
        name = PurePosixPath((file.filename or "image.nii.gz").replace("\\", "/")).name
        if folded(name) == "meta.info" or any(folded(path.name) == folded(name) for path in kept):
            refuse(f"the file name {name!r} is taken; give every file of a session a name of its own")
        kept.append(folder / name)
        with open(kept[-1], "wb") as stream:
            shutil.copyfileobj(file.file, stream)
    return kept


def _unpack(source: Path, folder: Path, most: int) -> Path:
    """Files of a ZIP archive; other formats can declare a smaller size than they have, or write elsewhere."""
    if not source.is_file() or not zipfile.is_zipfile(source):
        refuse(f"{source.name!r} is not a ZIP archive; send one .zip file, or the image itself without uncompress")
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            if size > most or len(entries) > _MOST_FILES:
                refuse(
                    f"{source.name!r} holds {len(entries)} files of {size:,} bytes, at most {_MOST_FILES} of {most:,} "
                    "are unpacked; send less",
                    413,
                )
            for entry in entries:
                if entry.filename.startswith("/") or ".." in re.split(r"[/\\]", entry.filename):
                    refuse(f"{source.name!r} holds a file called {entry.filename[:80]!r}; name files inside of it only")
                if entry.file_size > _MOST_PACKED * max(entry.compress_size, 1):
                    refuse(
                        f"{source.name!r} holds {entry.filename[:80]!r}, which unpacks to more than {_MOST_PACKED} "
                        "times its size; pack it anew as a plain ZIP archive",
                        413,
                    )
            if len({folded(entry.filename) for entry in entries}) < len(entries):
                refuse(f"{source.name!r} holds two files whose names are equal on some file systems; rename one")
            archive.extractall(folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, ValueError, EOFError) as error:
        refuse(f"{source.name!r} cannot be unpacked ({type(error).__name__}); pack it anew as a plain ZIP archive")
    return folder
