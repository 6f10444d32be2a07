# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The progress page: `GET /patchwise/` is a page without data, `GET /patchwise/progress` its data."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from monailabel.endpoints.user.auth import User

from lib.middleware.roles import USER
from lib.routes.services import Services

PAGE = Path(__file__).parent / "pages" / "progress.html"


def page_routes(services: Services) -> APIRouter:
    """Routes of the page; with MONAI Label's authentication on, everything but the empty shell needs its user role."""
    router = APIRouter(tags=["Patchwise"], prefix="/patchwise")
    html = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(html),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @router.get("/", summary="The progress page", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @router.get("/progress", summary="Data of the progress page")
    async def progress(user: User = USER) -> dict[str, Any]:
        # Label files are measured from the first view of the page on; without one, the server does not measure.
        services.background.start()
        return services.progress.report()

    return router


def _policy(html: str) -> str:
    """Content security policy: only the page's own script and style, and requests to this server only."""
    script, style = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (_inside(html, "script"), _inside(html, "style"))
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )


def _inside(html: str, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert found, f"the page has one <{tag}>"
    return found[1]
