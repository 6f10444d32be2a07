# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Routes of annotators: leases, answers taken back, and agreement."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from monailabel.endpoints.user.auth import User
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from lib.agreement import summarise
from lib.errors import refuse
from lib.ledger.records import Answer, Query, iso
from lib.middleware.roles import ANNOTATOR, USER
from lib.options import problems
from lib.routes.services import Services


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    client_id: str | None = Field(default=None, max_length=200)
    reason: str | None = Field(default=None, max_length=1000)


class _LeaseRequest(_Request):
    query: StrictInt


def lease_routes(services: Services) -> APIRouter:
    """Routes that change leases; `POST /activelearning/{strategy}` would take their paths, so they come before it."""
    router = APIRouter(tags=["Patchwise"])
    ledger = services.ledger

    @router.post("/activelearning/renew", summary="A new lease for a region")
    async def renew(params: dict[str, Any] | None = None, user: User = USER) -> dict[str, Any]:
        wanted, client = _parse(_LeaseRequest, params, services)
        return _told(ledger.leases.renew(wanted.query, client))

    @router.post("/activelearning/release", summary="Return a region to the pool")
    async def release(params: dict[str, Any] | None = None, user: User = USER) -> dict[str, Any]:
        wanted, client = _parse(_LeaseRequest, params, services)
        return _told(ledger.leases.release(wanted.query, client, wanted.reason))

    @router.post("/activelearning/skip", summary="Exclude a region from all later queries")
    async def skip(params: dict[str, Any] | None = None, user: User = ANNOTATOR) -> dict[str, Any]:
        wanted, client = _parse(_LeaseRequest, params, services)
        return _told(ledger.leases.skip(wanted.query, client, wanted.reason))

    return router


def answer_routes(services: Services) -> APIRouter:
    """Routes that list answers, withdraw and restore them, and report inter-rater agreement."""
    router = APIRouter(tags=["Patchwise"], prefix="/patchwise")
    ledger, store = services.ledger, services.store

    @router.get("/answers", summary="Submissions of an image, or of all, withdrawn ones too")
    async def answers(image: str | None = None, user: User = USER) -> list[dict[str, Any]]:
        images = ledger.answers.images(withdrawn=True) if image is None else [image]
        return [_answer(answer) for name in images for answer in ledger.answers.of_image(name, withdrawn=True)]

    @router.post("/answers/{answer_id}/withdraw", summary="Take an answer out of the label")
    async def withdraw(answer_id: int, params: dict[str, Any] | None = None, user: User = ANNOTATOR) -> dict[str, Any]:
        wanted, client = _parse(_Request, params, services)
        return _answer(store.withdraw_answer(answer_id, client, wanted.reason))

    @router.post("/answers/{answer_id}/restore", summary="Put a withdrawn answer back")
    async def restore(answer_id: int, params: dict[str, Any] | None = None, user: User = ANNOTATOR) -> dict[str, Any]:
        wanted, client = _parse(_Request, params, services)
        return _answer(store.restore_answer(answer_id, client, wanted.reason))

    @router.get("/agreement", summary="Dice between two annotators of one region")
    async def agreement(user: User = USER) -> dict[str, Any]:
        pairs = ledger.answers.agreements()
        return {"classes": summarise(pairs, services.classes), "pairs": pairs}

    return router


def times(services: Services, query: Query) -> dict[str, Any]:
    """Client, times and minutes of work of a query, which `GET /patchwise/queries/{id}` adds."""
    return {
        "status": query.status,
        "client": query.client,
        "note": query.note,
        "second_reading_of": query.twin,
        "handed_out": iso(query.leased),
        "opened": iso(query.opened),
        "submitted": iso(services.ledger.answers.submitted(query.id)),
        "minutes": query.worked / 60 if query.worked else None,
    }


def _parse(kind: type[Any], params: dict[str, Any] | None, services: Services) -> tuple[Any, str]:
    try:
        wanted = kind.model_validate(params or {})
    except ValidationError as error:
        refuse(f"request {problems(error)}")
    return wanted, services.clients.identify({"client_id": wanted.client_id})


def _told(query: Query) -> dict[str, Any]:
    return {**query.to_json(), "status": query.status, "client": query.client, "note": query.note}


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.id,
        "image": answer.image,
        "client": answer.client,
        "submitted": iso(answer.submitted),
        "active": answer.active,
        "queries": [query for query, _ in answer.regions if query is not None],
        "raw": answer.raw,
        "raw_sha256": answer.raw_sha256,
    }
