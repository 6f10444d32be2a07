# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Routes of the page on which regions are annotated: the page, views of regions, drafts, and their labels."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from monailabel.endpoints.user.auth import User

from lib.annotator.region_labels import ENDING, Draft, Drafts, Start, filled_between, packed, unpacked, write_answer
from lib.annotator.region_views import RegionView, view_of
from lib.annotator.viewer_file import MISSING, viewer_file
from lib.errors import refuse
from lib.ledger.records import Query as Asked
from lib.middleware.roles import ANNOTATOR, USER
from lib.routes.services import Services
from lib.storage.volumes import load_crop
from lib.studies.datastore import FINAL
from lib.studies.request_context import saved_answer

PAGES = Path(__file__).parent / "pages"
VIEWER = "niivue.js"
_ASSET = re.compile(r"annotate/[a-z_]+\.(js|css)")
_KINDS = {".js": "text/javascript", ".css": "text/css"}
# Scripts, styles and requests of this server only. NiiVue decodes with WebAssembly and keeps its pictures in blobs.
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; connect-src 'self' blob: data:; "
    "img-src 'self' blob: data:; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_PACKED = "application/gzip"
# What a draft began with, nothing or the prediction.
START_HEADER = "X-Patchwise-Start"
Client = Annotated[str | None, Query(max_length=200)]


def annotate_routes(services: Services) -> APIRouter:
    """Routes of the page; everything but its empty shell needs the roles of MONAI Label's authentication."""
    router = APIRouter(tags=["Annotate"], prefix="/patchwise")

    @router.get("/annotate", summary="The page to annotate regions on", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        headers = {**_HEADERS, "Content-Security-Policy": _POLICY}
        return HTMLResponse((PAGES / "annotate.html").read_text(encoding="utf-8"), headers=headers)

    @router.get("/assets/{path:path}", include_in_schema=False)
    async def asset(path: str) -> FileResponse:
        if path == VIEWER:
            found = viewer_file()
            if found is None:
                refuse(MISSING, 404)
            return FileResponse(found, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})
        if not _ASSET.fullmatch(path) or not (PAGES / path).is_file():
            refuse(f"the page has no file {path[:80]!r}", 404)
        return FileResponse(PAGES / path, media_type=_KINDS[Path(path).suffix], headers=_HEADERS)

    _region_routes(router, services)
    return router


def _region_routes(router: APIRouter, services: Services) -> None:
    drafts = Drafts(services.store.annotations.state / "drafts")

    def found(query_id: int) -> tuple[Asked, RegionView]:
        query = services.ledger.query(query_id)
        if query is None:
            refuse(f"there is no query {query_id}", 404)
        return query, view_of((query.region.start, query.region.size), *services.store.geometry(query.region.image))

    @router.get("/regions", summary="Regions that a client holds, the oldest first")
    async def held(client_id: Client = None, user: User = USER) -> list[int]:
        client = services.clients.identify({"client_id": client_id})
        return [query.id for query in services.ledger.leases.held_by(client)]

    @router.get("/regions/{query_id}", summary="Place of a region in its view, and the classes to draw")
    async def region(query_id: int, client_id: Client = None, user: User = USER) -> dict[str, Any]:
        query, view = found(query_id)
        client = services.clients.identify({"client_id": client_id})
        services.ledger.leases.touch(client, query.region.image, opening=True)
        start, size = view.region
        return {
            **query.to_json(),
            "status": query.status,
            "client": query.client,
            "view": {"shape": view.shape, "start": start, "size": size},
            "classes": [{"name": name, "value": value} for name, value in services.classes.items()],
            "has_prediction": services.predictions.get(query_id) is not None,
            "reason": _told(query.reason),
        }

    @router.get("/regions/{query_id}/image.nii", summary="A region and its surroundings, upright")
    async def image(query_id: int, user: User = USER) -> Response:
        query, view = found(query_id)
        crop_xyz = load_crop(services.store.image_path(query.region.image), view.crop)
        return Response(view.nifti(view.upright(crop_xyz)), media_type="application/octet-stream")

    @router.get("/regions/{query_id}/prediction", summary="Label that the model proposed for a region")
    async def prediction(query_id: int, user: User = USER) -> Response:
        _, view = found(query_id)
        label_xyz = services.predictions.get(query_id)
        if label_xyz is None:
            refuse(f"the model has proposed nothing for query {query_id}; start from nothing", 404)
        return Response(packed(view.upright(label_xyz)), media_type=_PACKED)

    @router.get("/regions/{query_id}/draft", summary="Unfinished label of a region")
    async def draft(query_id: int, client_id: Client = None, user: User = USER) -> Response:
        kept = drafts.get(query_id, services.clients.identify({"client_id": client_id}))
        if kept is None:
            return Response(status_code=204)
        return Response(kept.body, media_type=_PACKED, headers={START_HEADER: kept.start})

    @router.put("/regions/{query_id}/draft", summary="Keep an unfinished label of a region")
    async def keep_draft(
        query_id: int, request: Request, client_id: Client = None, start: Start = "nothing", user: User = ANNOTATOR
    ) -> dict[str, Any]:
        query, view = found(query_id)
        client, body = services.clients.identify({"client_id": client_id}), await request.body()
        unpacked(body, view, services.classes)
        if query.client != client:
            refuse(f"query {query_id} was not given to {client}, so no draft of it is kept", 409)
        drafts.keep(query_id, client, Draft(body, start))
        services.ledger.leases.touch(client, query.region.image)
        now = services.ledger.query(query_id)
        return {"kept": True, "status": now.status if now else query.status}

    @router.post("/regions/{query_id}/between", summary="Label with empty slices filled between drawn ones")
    async def between(
        query_id: int, request: Request, axis: Annotated[int, Query(ge=0, le=2)] = 2, user: User = USER
    ) -> Response:
        _, view = found(query_id)
        label_xyz = unpacked(await request.body(), view, services.classes)
        return Response(packed(filled_between(label_xyz, axis)), media_type=_PACKED)

    @router.put("/regions/{query_id}/label", summary="Answer a region")
    async def answer(
        query_id: int,
        request: Request,
        client_id: Client = None,
        start: Start = "nothing",
        user: User = ANNOTATOR,
    ) -> dict[str, Any]:
        query, view = found(query_id)
        client = services.clients.identify({"client_id": client_id})
        label_xyz = unpacked(await request.body(), view, services.classes)
        with tempfile.TemporaryDirectory(prefix="patchwise-") as folder:
            path = Path(folder) / f"region_{query_id}{ENDING}"
            write_answer(path, label_xyz, view, services.classes)
            info = {"queries": [query_id], "client_id": client, "start": start}
            services.store.save_label(query.region.image, str(path), FINAL, info)
        drafts.drop(query_id, client)
        return {"answer": saved_answer(), "query": query_id, "labelled_voxels": query.region.voxels}


def _told(reason: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a reason that the page shows."""
    return {key: reason[key] for key in ("method", "rank", "score", "uncertainty", "predicted") if key in reason}
