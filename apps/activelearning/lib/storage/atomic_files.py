# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Durable files: a file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".tmp-"


def folded(name: str) -> str:
    """A name as file systems compare it that ignore case, spelling of accents, and dots and blanks at the end."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).rstrip(". ")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that replaces it (fsync, rename, fsync of the folder) on success.

    The temporary name keeps the suffixes of the target, since writers choose their format by them. On an error the
    temporary file is removed and `target` is unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=UNFINISHED, suffix=f"-{target.name}", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, hours: float) -> int:
    """Remove temporary files of killed writers below `folder` older than `hours`; return their number."""
    old, removed = time.time() - 3600 * hours, 0
    for path in folder.rglob(f"{UNFINISHED}*"):
        try:
            if path.is_file() and path.stat().st_mtime < old:
                path.unlink()
                removed += 1
        except FileNotFoundError:
            # Its writer was only slow.
            continue
    return removed


def write_atomic(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(stream)` on a temporary file that then replaces `target`."""
    with atomic_path(target) as temporary, open(temporary, "wb") as stream:
        write(stream)


def write_json(target: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_atomic(target, lambda stream: stream.write(text.encode()))


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None if the file does not exist."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_digest(*parts: object) -> str:
    """SHA-256 over the JSON of `parts`: one name for one combination of settings and inputs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
