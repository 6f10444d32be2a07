# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Whole requests as MONAI Label's client library writes them, byte for byte."""

from __future__ import annotations

from pathlib import Path

AUTH = b"GET /auth/ HTTP/1.1\r\nHost: SERVER\r\nAccept-Encoding: identity\r\n\r\n"
LIMIT = "----------lImIt_of_THE_fIle_eW_$"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: SERVER\r\nAccept-Encoding: identity\r\n\r\n".encode()


def sent(method: str, path: str, content_type: str, body: bytes) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: SERVER\r\nAccept-Encoding: identity\r\ncontent-type: {content_type}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def multipart(method: str, path: str, params: str, label: Path | None = None, field: str = "label") -> bytes:
    body = f'--{LIMIT}\r\nContent-Disposition: form-data; name="params"\r\n\r\n{params}\r\n'.encode()
    if label is not None:
        body += f'--{LIMIT}\r\nContent-Disposition: form-data; name="{field}"; filename="{label}"\r\n'.encode()
        body += b"Content-Type: application/octet-stream\r\n\r\n" + label.read_bytes() + b"\r\n"
    body += f"--{LIMIT}--\r\n\r\n".encode()
    return sent(method, path, f"multipart/form-data; boundary={LIMIT}", body)
