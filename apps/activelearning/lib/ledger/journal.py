# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Second record of data that cannot be derived: answers and their withdrawal, one line each, append-only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Lines of JSON beside the ledger; each is on disk before `append` returns.

    The ledger alone would suffice if every file system kept synced data. If it does not (a write-ahead log that is
    shorter after a power cut, a file system check), the journal restores the missing entries of the ledger.

    Several processes may append: a line is one write to a file opened for appending.

    Args:
        path: the file; created with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entries: list[Mapping[str, Any]]) -> None:
        """Append lines.

        Raises:
            OSError: the disk is full or read-only; a line may then be torn, and is passed over by `entries`.
        """
        if not entries:
            return
        text = "".join(json.dumps(dict(entry)) + "\n" for entry in entries)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            # The remains of an earlier line that a full disk cut off must not be joined with this one.
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            content = (("\n" if torn else "") + text).encode()
            while content:
                content = content[os.write(handle, content) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Lines in the order in which they were added; torn ones are left out."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry
