# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Error responses: one sentence and a 4xx status, or 507 if the disk is full or read-only."""

from __future__ import annotations

import errno
import json
import logging
import sqlite3
from typing import Any

import requests
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.errors import PatchwiseError, listed_problems
from lib.middleware.tokens import unanswered

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)


def storage_problem(error: Exception) -> str | None:
    """Sentence for a request that failed because the disk is full or read-only; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error) if isinstance(error, sqlite3.OperationalError) else ""
    if number in _NO_ROOM or "full" in text:
        return "the server's disk is full, so nothing was changed or only a part; free space there and send this again"
    if number in _NO_WRITING or "readonly" in text or "unable to open" in text or "disk I/O" in text:
        return f"the server cannot write to its studies folder ({error}); make it writable and send this again"
    return None


class ErrorResponses:
    """Answer errors of routes with a 4xx status and their sentence where upstream would answer 500 without one."""

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
        except PatchwiseError as error:
            await _answer(error.status, str(error))(scope, receive, send)
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
    """FastAPI's list of validation errors as one sentence."""
    return _answer(422, f"request {listed_problems(error.errors())}")


def _refused(request: Request, error: Any) -> JSONResponse:
    """Response to a refused request: MONAI Label returns 500 for some of them, and only two words for unknown paths."""
    status, sentence = error.status_code, error.detail
    if status == 404 and sentence == "Not Found":
        sentence = f"no route serves {request.url.path[:80]!r}; GET /openapi.json lists the routes"
    if status == 405:
        sentence = f"{request.url.path[:80]!r} is not served with {request.method}; GET /openapi.json lists the methods"
    return JSONResponse({"detail": sentence}, status_code=400 if status == 500 else status, headers=error.headers)
