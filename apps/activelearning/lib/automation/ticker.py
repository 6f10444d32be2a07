# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Background thread of the server for work that no request waits for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

SECONDS = 2.0


class Ticker:
    """Thread that calls each of `work` every few seconds, in order, after the first `start`."""

    def __init__(self, work: Sequence[Callable[[], None]], seconds: float = SECONDS) -> None:
        self.work = work
        self.seconds = seconds
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread; a later call only wakes it."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="background", daemon=True)
                self._thread.start()
        self._wake.set()

    def stop(self, seconds: float = 2) -> None:
        """Start no more work, and wait up to `seconds` for the present one."""
        self._stopped.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopped.is_set():
            for work in self.work:
                if self._stopped.is_set():
                    return
                try:
                    work()
                except Exception:
                    # The next turn tries again; the thread must outlive a full disk or a locked file.
                    logger.exception("background work failed")
            self._wake.wait(self.seconds)
            self._wake.clear()
