# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Routes of MONAI Label that ask for less than what they do deserves: here they need the admin role."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, BackgroundTasks, Depends, UploadFile
from monailabel.config import settings
from monailabel.endpoints import model as upstream_model
from monailabel.endpoints.user.auth import RBAC, User

from lib.errors import refuse

_ADMIN = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))


def closed_routes() -> APIRouter:
    """Routes that stand in front of upstream's of the same path.

    Upstream documents the admin role for both routes of models and checks the annotator's. Its `POST /reload` asks for
    no role and would put a second app, which was never started, on the same studies.
    """
    router = APIRouter()

    @router.put("/model/{model}", tags=["Model"], summary="Upload a model file")
    async def update(background_tasks: BackgroundTasks, model: str, file: UploadFile, user: User = _ADMIN) -> Any:
        return upstream_model.update_model(background_tasks, model, file)

    @router.delete("/model/{model}", tags=["Model"], summary="Delete a model file")
    async def delete(model: str, user: User = _ADMIN) -> Any:
        return upstream_model.delete_model(model)

    @router.post("/reload", include_in_schema=False)
    async def reload(user: User = _ADMIN) -> None:
        refuse("this app cannot be reloaded while it runs; stop the server and start it again", 409)

    return router
