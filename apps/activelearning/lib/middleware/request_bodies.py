# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Checks of request bodies: usable JSON, and forms of bounded size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from lib.errors import refuse
from lib.ledger.records import DERIVED

JSON_BYTES = 8 * 2**20
TASK_BYTES = 100_000
FORM_BYTES = 2**20
PARTS = 200
MOST_DEEP = 32
# Fields of forms in which MONAI Label's routes take JSON.
JSON_FIELDS = frozenset({"params", "info", "wsi"})
_GPUS = re.compile(r"all|\d{1,3}(,\d{1,3})*")


class PlainBody:
    """A body that only has a largest size. Both methods end the request with a 4xx status where something is wrong."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = 0

    def feed(self, piece: bytes) -> None:
        self.length += len(piece)
        check_length(self.length, self.limit)

    def end(self) -> None:
        pass


class TextBody(PlainBody):
    """JSON, or a form of `name=value` pairs: kept, and checked as a whole."""

    def __init__(self, limit: int, check: Callable[[bytes], object]) -> None:
        super().__init__(limit)
        self.check = check
        self.kept = bytearray()

    def feed(self, piece: bytes) -> None:
        super().feed(piece)
        self.kept += piece

    def end(self) -> None:
        if self.kept:
            self.check(bytes(self.kept))


class FormBody(PlainBody):
    """A form with files: the parts and the bytes outside of files are counted, file names and JSON fields checked."""

    def __init__(self, limit: int, boundary: bytes) -> None:
        super().__init__(limit)
        self.parts = self.texts = 0
        self.headers: dict[bytes, bytes] = {}
        self.field, self.value = b"", b""
        self.name: str | None = None
        self.content = bytearray()
        self.ended = False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> None:
        super().feed(piece)
        try:
            self.parser.write(piece)
        except MultipartParseError:
            refuse("the body is not a readable form; send multipart/form-data with the boundary of its header")

    def end(self) -> None:
        if self.length and not self.ended:
            refuse("the form ends before its last boundary; send it whole")

    def _begin(self) -> None:
        self.parts += 1
        if self.parts > PARTS:
            refuse(f"the form has more than {PARTS} parts; send less at a time", 413)
        self.headers, self.content, self.name = {}, bytearray(), None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.field += data[start:end]
        self._count(end - start)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]
        self._count(end - start)

    def _header_end(self) -> None:
        self.headers[self.field.lower()] = self.value
        self.field, self.value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b""))
        if b"filename" in options:
            check_file_name(options[b"filename"].decode("utf-8", "replace"))
        else:
            self.name = options.get(b"name", b"").decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self.name is not None:
            self.content += data[start:end]
            self._count(end - start)

    def _part_end(self) -> None:
        if self.name is not None:
            check_field(self.name, bytes(self.content))

    def _end(self) -> None:
        self.ended = True

    def _count(self, more: int) -> None:
        self.texts += more
        if self.texts > FORM_BYTES:
            refuse(f"the fields of the form have more than {FORM_BYTES:,} bytes beside its files; send less", 413)


def check_length(length: int, limit: int) -> None:
    """Refuse a body longer than `limit` bytes."""
    if length > limit:
        refuse(f"the body has more than the {limit:,} bytes that this request may have; send less at a time", 413)


def check_file_name(name: str) -> None:
    """Refuse a name that is not valid for a file; clients may send the whole path."""
    last = re.split(r"[/\\]", name)[-1]
    if last in ("", ".", "..") or len(last) > 200 or not last.isprintable():
        refuse(f"{name[:80]!r} is not a file name; name the file with 1 to 200 letters, digits, '_', '-' and '.'")


def check_urlencoded(body: bytes) -> None:
    """Refuse `name=value` pairs with unusable JSON, or too many of them."""
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=PARTS)
    except ValueError:
        refuse(f"the form is not readable, or has more than {PARTS} fields; send it as multipart/form-data")
    for name, value in pairs:
        check_field(name, value.encode("utf-8", "surrogatepass"))


def check_field(name: str, content: bytes) -> None:
    """Refuse a form field that is not text, or not the expected JSON object."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        refuse(f"the field {name[:80]!r} is not text; send it in UTF-8")
    if name in JSON_FIELDS and text and not isinstance(check_json(content, name), dict):
        refuse(f"{name} must be a JSON object, found {text[:80]!r}")


def check_json(text: bytes, what: str = "the body") -> Any:
    """Value of a JSON text, restricted to values that every part of the app can process.

    Raises:
        PatchwiseError: 400: not JSON, not UTF-8, deeper than 32 levels, numbers that are not finite or beyond 64 bits,
            text that is not Unicode, or a field that would give access to the machine (`bundle_path`, `gpus`).
    """
    try:
        value = json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        refuse(f"{what} must be a JSON object; it is not readable: {error}")
    except (ValueError, RecursionError) as error:
        refuse(f"{what} is not usable JSON ({type(error).__name__}); send UTF-8 and at most {MOST_DEEP} levels")
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MOST_DEEP:
            refuse(f"{what} is nested more than {MOST_DEEP} levels deep; send it flat")
        if isinstance(node, dict):
            for key, held in node.items():
                _check_scalar(key, what)
                _check_key(key, held)
            waiting += [(held, depth + 1) for held in node.values()]
        elif isinstance(node, list):
            waiting += [(held, depth + 1) for held in node]
        else:
            _check_scalar(node, what)
    return value


def _check_scalar(value: Any, what: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        refuse(f"{what} holds the number {value}; send finite numbers")
    if isinstance(value, int) and value.bit_length() > 63:
        refuse(f"{what} holds a whole number of {value.bit_length()} bits; send numbers of at most 63")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            refuse(f"{what} holds half of a character ({value[:40]!a}); send whole Unicode characters")


def check_client_id(held: Any) -> None:
    """Refuse an id that is not text, or that has the form of ids that the server derives."""
    if held is None or held == "":
        return
    _check_scalar(held, "the body")
    if not isinstance(held, str) or len(held) > 200 or not held.isprintable() or held != held.strip():
        refuse(f"client_id {held!r:.80} cannot be used; send up to 200 printable characters, or leave it out")
    if held.startswith(DERIVED):
        refuse(f"client_id {held[:80]!r} begins with {DERIVED!r}, which marks ids that the server makes; leave it out")


def _check_key(key: str, held: Any) -> None:
    if key == "client_id":
        check_client_id(held)
    if key == "bundle_path":
        # MONAI Label would put it on the path from which its tasks import Python.
        refuse("bundle_path is not taken from requests: bundles run code; start the server with --conf bundles FOLDER")
    if key == "gpus" and held not in (None, "") and not (isinstance(held, str) and _GPUS.fullmatch(held)):
        refuse(f"gpus must be 'all' or numbers like '0,1', found {held!r:.80}")
