# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""One server per folder: a lock that is held from its start to its end."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from lib.errors import PatchwiseError

# A server that was killed a moment ago may still be ending.
_PATIENCE = 2.0


class FolderInUseError(PatchwiseError):
    """Another server holds the folder."""


def hold_folder(folder: Path, state: Path) -> FileLock:
    """The lock of a folder, held until the process ends; processes that it starts do not hold it.

    Raises:
        FolderInUseError: another server holds it.
    """
    state.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state / "server.lock", thread_local=False)
    try:
        lock.acquire(timeout=_PATIENCE, poll_interval=0.1)
    except Timeout:
        raise FolderInUseError(
            f"{folder}: expected one server per folder, and another one is running on it; stop that one or choose "
            "another folder"
        ) from None
    return lock
