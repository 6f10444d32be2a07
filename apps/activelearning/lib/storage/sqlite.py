# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Settings that all SQLite files of the studies folder share."""

from __future__ import annotations

import sqlite3
import time


def log_ahead(connection: sqlite3.Connection, seconds: float) -> None:
    """Set the WAL mode of a file, which persists; of two processes that create the file at once, one must retry.

    SQLite does not wait for a lock here, regardless of the connection's timeout.

    Raises:
        sqlite3.OperationalError: the file stayed locked for `seconds`, or is read-only.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
