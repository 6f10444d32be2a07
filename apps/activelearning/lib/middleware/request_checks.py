# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Checks in front of all routes: names that are not paths, bodies of bounded size, usable JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn
from urllib.parse import parse_qsl

from monailabel.config import settings
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.errors import PatchwiseError, refuse
from lib.middleware.request_bodies import (
    FORM_BYTES,
    JSON_BYTES,
    TASK_BYTES,
    FormBody,
    PlainBody,
    TextBody,
    check_json,
    check_length,
    check_urlencoded,
)

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}")
# Query parameters that name files: MONAI Label joins them into paths.
_IMAGES = frozenset({"image", "id", "label"})
_FOLDERS = frozenset({"tag", "session_id"})
_TASKS = re.compile(r"/(train|scoring|batch)(/|$)")
_REGIONS = re.compile(r"/patchwise/regions/")
_PROXY = re.compile(r"/proxy/dicom(/|$)")
_PROXIED_BYTES = 2**28
_MOST_PARAMETERS = 100
# The body of a refused request is received up to here; otherwise the sender sees a broken connection, not the error.
_READ_ON_BYTES = 2**26


class CheckedRequests:
    """Refuse a request with a 4xx status and one sentence before it reaches a route, or as soon as its body is wrong.

    Args:
        upload_bytes: limit of a form with files.
    """

    def __init__(self, app: ASGIApp, upload_bytes: int) -> None:
        self.app = app
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            check_path(scope["path"])
            check_query(scope["query_string"])
            body = body_of(scope, self.upload_bytes)
        except PatchwiseError:
            await _read_on(receive)
            raise
        await self.app(scope, _checking(receive, body), send)


def body_of(scope: Scope, upload_bytes: int) -> PlainBody:
    """Checks for the body of a request.

    Raises:
        PatchwiseError: 413 for a declared length above the limit, 400 for a form with an unusable head.
    """
    headers, path = Headers(scope=scope), scope["path"].removeprefix(settings.MONAI_LABEL_API_STR)
    told, options = parse_options_header(headers.get("content-type", ""))
    kind = told.decode("latin-1").lower()
    body: PlainBody
    if _PROXY.match(path):
        body = PlainBody(_PROXIED_BYTES)
    elif _REGIONS.match(path):
        body = PlainBody(upload_bytes)
    elif kind == "multipart/form-data":
        if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
            refuse("the form declares a charset other than UTF-8; send it in UTF-8")
        if not options.get(b"boundary"):
            refuse("the form's Content-Type names no boundary; send multipart/form-data with one")
        body = FormBody(upload_bytes, options[b"boundary"])
    elif kind == "application/x-www-form-urlencoded":
        body = TextBody(FORM_BYTES, check_urlencoded)
    elif kind in ("", "application/json") or kind.endswith("+json"):
        # A request that starts a process is passed on its command line, whose length is limited.
        body = TextBody(TASK_BYTES if _TASKS.match(path) else JSON_BYTES, check_json)
    else:
        body = PlainBody(FORM_BYTES)
    for length in headers.getlist("content-length"):
        if length.isdigit():
            check_length(int(length), body.limit)
    return body


def largest_body(upload_bytes: int, is_signed_in: Callable[[Scope], bool]) -> Callable[[Scope], int]:
    """Limit of a request in bytes, by its head; without authentication no more than for the form of a sign-in."""

    def limit(scope: Scope) -> int:
        found = body_of(scope, upload_bytes).limit
        if found > FORM_BYTES and not is_signed_in(scope):
            for length in Headers(scope=scope).getlist("content-length"):
                if length.isdigit() and int(length) > FORM_BYTES:
                    refuse("nothing of this size is taken without a sign-in; send a valid token", 401)
            return FORM_BYTES
        return found

    return limit


def check_path(path: str) -> None:
    """Refuse a path that, decoded, leads elsewhere or contains characters outside of this app's names."""
    for segment in path.split("/"):
        if segment in ("..", "."):
            _no_name("path", path, "write it without '.' and '..'")
        if len(segment) > 255:
            _no_name("path", path, f"its part of {len(segment)} characters is longer than any name here, at most 255")
        if not segment.isprintable() or "\\" in segment:
            _no_name("path", path, "write it without control characters and backslashes")
        if segment.lstrip("-").isdigit() and len(segment) > 18:
            _no_name("number", segment, "numbers have at most 18 digits")


def check_query(query: bytes) -> None:
    """Refuse parameters that name files outside of the studies folder, or that are not valid names."""
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=_MOST_PARAMETERS)
    except ValueError:
        refuse(f"the address has more than {_MOST_PARAMETERS} parameters; send less")
    for name, value in pairs:
        if name in _IMAGES and (len(value) > 200 or value.startswith(".") or re.search(r"[/\\]", value)):
            _no_name(name, value, "an id has up to 200 characters and no '/'; GET /datastore/?output=all lists them")
        if name in _FOLDERS and value and (not _PLAIN.fullmatch(value) or ".." in value):
            _no_name(name, value, "use up to 200 letters, digits, '_', '-' and '.'")
        if len(value) > 4000 or not value.isprintable() or not name.isprintable():
            _no_name(f"parameter {name[:80]!r}", value, "send up to 4000 printable characters")


def check_plain_name(name: str, what: str) -> None:
    """Refuse a name that is joined into a path and could lead elsewhere."""
    if not _PLAIN.fullmatch(name) or ".." in name:
        _no_name(what, name, "use up to 200 letters, digits, '_', '-' and '.'")


def _no_name(what: str, found: str, advice: str) -> NoReturn:
    refuse(f"{what} {found[:80]!r} cannot be used; {advice}")


def _checking(receive: Receive, body: PlainBody) -> Receive:
    async def call() -> Message:
        message = await receive()
        if message["type"] != "http.request":
            return message
        try:
            body.feed(message.get("body", b""))
            if not message.get("more_body", False):
                body.end()
        except PatchwiseError as refused:
            if message.get("more_body", False):
                await _read_on(receive)
            # FastAPI reads the body for the route, and lets only this class pass as it is.
            raise HTTPException(refused.status, str(refused)) from refused
        return message

    return call


async def _read_on(receive: Receive) -> None:
    """Receive the rest of a body and drop it."""
    dropped = 0
    while dropped < _READ_ON_BYTES:
        message = await receive()
        dropped += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
