# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Installation of routes and middleware beside upstream's: checks before work starts, errors as sentences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from monailabel.config import settings
from monailabel.endpoints import datastore as upstream_datastore
from monailabel.endpoints.user.auth import User
from starlette.formparsers import MultiPartParser

from lib.errors import refuse
from lib.middleware.client_identity import IdentifiedClients, is_signed_in
from lib.middleware.error_responses import ErrorResponses
from lib.middleware.origins import OriginGuard
from lib.middleware.received_bodies import ReceivedBodies, allow_connections
from lib.middleware.request_checks import CheckedRequests, largest_body
from lib.middleware.roles import ADMIN, USER
from lib.middleware.tokens import accept_signed_tokens
from lib.middleware.upstream_patches import guard, keep_connected, limit_heads
from lib.middleware.worker_threads import Threads, prefer_answers
from lib.options import AppOptions
from lib.routes.annotate_routes import annotate_routes
from lib.routes.datastore_routes import datastore_routes, other_routes, session_routes
from lib.routes.lease_routes import answer_routes, lease_routes, times
from lib.routes.page_routes import page_routes
from lib.routes.services import Services
from lib.routes.task_routes import infer_routes, start_trainings, task_routes

logger = logging.getLogger(__name__)


def install(services: Services) -> None:
    """Add this project's routes in front of upstream's and guard all of them. Called once, when the server starts."""
    from monailabel.app import app

    accept_signed_tokens()
    # Uploads of a form are buffered on disk, not in memory.
    MultiPartParser.spool_max_size = 2**16
    _install(app, routers(services), services.options)


def routers(services: Services) -> list[APIRouter]:
    """Every route that this project adds to upstream's, or puts in front of one of them."""
    own = [routes, lease_routes, answer_routes, page_routes, annotate_routes]
    guarding = [datastore_routes, session_routes, infer_routes, task_routes, other_routes]
    return [make(services) for make in (*own, *guarding)]


def _install(app: FastAPI, routers: Sequence[APIRouter], options: AppOptions) -> None:
    count = len(app.router.routes)
    for router in routers:
        app.include_router(router, prefix=settings.MONAI_LABEL_API_STR)
    added = app.router.routes[count:]
    app.router.routes[:] = [*added, *app.router.routes[:count]]
    # The application's own middleware is built before this app is loaded; the router's can still be wrapped.
    checked = CheckedRequests(app.router.middleware_stack, options.upload_mib * 2**20)
    app.router.middleware_stack = Threads(
        IdentifiedClients(ErrorResponses(checked), options.forwarded_header), options.body_idle_seconds
    )
    prefer_answers()
    origins = [*options.origins, *(str(origin).rstrip("/") for origin in settings.MONAI_LABEL_CORS_ORIGINS)]
    limit = largest_body(options.upload_mib * 2**20, is_signed_in)
    guard(
        app,
        origins,
        [
            lambda inner: ReceivedBodies(inner, limit, options.body_idle_seconds, options.body_seconds),
            lambda inner: OriginGuard(inner, origins, options.hosts),
        ],
    )
    limit_heads(options.body_idle_seconds)
    keep_connected()
    allow_connections()


def routes(services: Services) -> APIRouter:
    """Routes that upstream lacks, or that must check a request before it starts a process."""
    router = APIRouter()

    @router.post("/train/{model}", tags=["Train"], summary="Train an ensemble; the request is checked first")
    async def train(
        model: str,
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
        enqueue: bool = False,
        user: User = ADMIN,
    ) -> Any:
        if model not in services.trainers:
            refuse(f"no model {model!r} to train; known models are {', '.join(services.trainers)}", 404)
        return start_trainings(services, {model: dict(params or {})}, run_sync, enqueue)[model]

    @router.get("/patchwise/queries/{query_id}", tags=["Patchwise"], summary="A query and its reason")
    async def query(
        query_id: int,
        user: User = USER,
    ) -> dict[str, Any]:
        found = services.ledger.query(query_id)
        if found is None:
            refuse(f"there is no query {query_id}", 404)
        # A second reading has the same picture as the first one.
        drawn = query_id if found.twin is None else found.twin
        picture = f"/patchwise/queries/{drawn}/picture.png" if services.reasons.has_picture(drawn) else None
        return {**found.to_json(), **times(services, found), "picture": picture}

    @router.get("/patchwise/queries/{query_id}/picture.png", tags=["Patchwise"], summary="Image and score map")
    async def picture(
        query_id: int,
        user: User = USER,
    ) -> FileResponse:
        path = services.reasons.picture(query_id)
        if path is None:
            refuse(f"there is no picture of query {query_id}", 404)
        return FileResponse(path, media_type="image/png")

    @router.get("/datastore/image", tags=["Datastore"], summary="Download an image; its regions count as opened")
    async def image(
        image: str,
        user: User = USER,
    ) -> Any:
        services.opened(image)
        return upstream_datastore.download_image(image)

    return router
