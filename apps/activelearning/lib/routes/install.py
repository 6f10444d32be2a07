# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""What the server's routes need beside upstream's: requests checked before work starts, errors as sentences."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import requests
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from monailabel.config import settings
from monailabel.endpoints import datastore as upstream_datastore
from monailabel.endpoints import train as upstream_train
from monailabel.endpoints.user.auth import User
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.errors import SPEAKING, refuse, speaking_errors, status_of, storage_problem
from lib.middleware.client_identity import IdentifiedClients
from lib.middleware.request_checks import CheckedRequests
from lib.middleware.roles import ADMIN, USER
from lib.middleware.tokens import accept_signed_tokens, unanswered
from lib.middleware.worker_threads import Threads, prefer_answers
from lib.options import AppOptions, found_wrong
from lib.routes.datastore_routes import datastore_routes, other_routes, session_routes
from lib.routes.lease_routes import answer_routes, lease_routes, times
from lib.routes.page_routes import page_routes
from lib.routes.task_routes import infer_routes, task_routes

if TYPE_CHECKING:
    from main import PatchwiseApp

logger = logging.getLogger(__name__)


class SpeakingErrors:
    """Answers errors of routes with a 4xx status and their sentence where upstream would answer 500 without one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "starlette.exception_handlers" in scope:
            by_class, by_status = scope["starlette.exception_handlers"]
            by_class = {**by_class, RequestValidationError: _invalid, HTTPException: _refused}
            scope = {**scope, "starlette.exception_handlers": (by_class, by_status)}
        try:
            await self.app(scope, receive, send)
        except HTTPException as error:
            await _refused(Request(scope), error)(scope, receive, send)
        except (ImageNotFoundException, LabelNotFoundException) as error:
            await _answer(404, error.msg)(scope, receive, send)
        except MONAILabelException as error:
            await _answer(400, error.msg)(scope, receive, send)
        except SPEAKING as error:
            await _answer(status_of(error), str(error))(scope, receive, send)
        except requests.RequestException as error:
            await _answer(*unanswered(error))(scope, receive, send)
        except json.JSONDecodeError as error:
            await _answer(400, f"params must be a JSON object; it is not readable: {error}")(scope, receive, send)
        except (OSError, sqlite3.OperationalError) as error:
            sentence = storage_problem(error)
            if sentence is None:
                raise
            logger.error("%s %s: %s", scope.get("method"), scope.get("path"), error)
            await _answer(507, sentence)(scope, receive, send)


def _answer(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status_code=status)


def _invalid(request: Request, error: Any) -> JSONResponse:
    """What FastAPI answers as a list, as one sentence."""
    return _answer(422, f"request {found_wrong(error.errors())}")


def _refused(request: Request, error: Any) -> JSONResponse:
    """MONAI Label answers some wrong requests with 500, and what it does not serve in two words."""
    status, sentence = error.status_code, error.detail
    if status == 404 and sentence == "Not Found":
        sentence = f"nothing is served at {request.url.path[:80]!r}; GET /openapi.json lists what is"
    if status == 405:
        sentence = f"{request.url.path[:80]!r} is not served with {request.method}; GET /openapi.json lists what is"
    return JSONResponse({"detail": sentence}, status_code=400 if status == 500 else status, headers=error.headers)


def install(patchwise: PatchwiseApp) -> None:
    """Adds this project's routes in front of upstream's and guards them all. Called once, when the server starts."""
    from monailabel.app import app

    accept_signed_tokens()
    # Uploads of a form wait on disk, not in memory, before a route has them.
    MultiPartParser.spool_max_size = 2**16
    _install(app, routers(patchwise), patchwise.options)


def routers(patchwise: PatchwiseApp) -> list[APIRouter]:
    """Every route that this project adds to upstream's, or puts in front of one of them."""
    own = [routes, lease_routes, answer_routes, page_routes]
    guarding = [datastore_routes, session_routes, infer_routes, task_routes, other_routes]
    return [make(patchwise) for make in (*own, *guarding)]


def _install(app: FastAPI, routers: Sequence[APIRouter], options: AppOptions) -> None:
    count = len(app.router.routes)
    for router in routers:
        app.include_router(router, prefix=settings.MONAI_LABEL_API_STR)
    added = app.router.routes[count:]
    app.router.routes[:] = [*added, *app.router.routes[:count]]
    # The application's own middleware is built before this app is loaded; the router's can still be wrapped.
    checked = CheckedRequests(app.router.middleware_stack, options.upload_mib * 2**20)
    app.router.middleware_stack = Threads(IdentifiedClients(SpeakingErrors(checked), options.forwarded_header))
    prefer_answers()


def routes(patchwise: PatchwiseApp) -> APIRouter:
    """Routes that upstream lacks or that have to check a request before a process is started for it."""
    router = APIRouter()

    @router.post("/train/{model}", tags=["Train"], summary="Train an ensemble; the request is checked first")
    async def train(
        model: str,
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
        enqueue: bool = False,
        user: User = ADMIN,
    ) -> Any:
        trainer = patchwise.trainers.get(model)
        if trainer is None:
            refuse(f"no model {model!r} to train; known models are {', '.join(patchwise.trainers)}", 404)
        with speaking_errors():
            trainer.parse(params or {})
        return upstream_train.run_model(model, params, run_sync, enqueue)

    @router.get("/patchwise/queries/{query_id}", tags=["Patchwise"], summary="A query and its reason")
    async def query(
        query_id: int,
        user: User = USER,
    ) -> dict[str, Any]:
        found = patchwise.ledger.query(query_id)
        if found is None:
            refuse(f"there is no query {query_id}", 404)
        # A second reading looks like the first one.
        drawn = query_id if found.twin is None else found.twin
        picture = f"/patchwise/queries/{drawn}/picture.png" if patchwise.reasons.has_picture(drawn) else None
        return {**found.to_json(), **times(patchwise, found), "picture": picture}

    @router.get("/patchwise/queries/{query_id}/picture.png", tags=["Patchwise"], summary="Image and score map")
    async def picture(
        query_id: int,
        user: User = USER,
    ) -> FileResponse:
        path = patchwise.reasons.picture(query_id)
        if path is None:
            refuse(f"there is no picture of query {query_id}", 404)
        return FileResponse(path, media_type="image/png")

    @router.get("/datastore/image", tags=["Datastore"], summary="Download an image; its regions count as opened")
    async def image(
        image: str,
        user: User = USER,
    ) -> Any:
        patchwise.opened(image)
        return upstream_datastore.download_image(image)

    return router
