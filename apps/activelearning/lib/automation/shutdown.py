# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Shutdown of the server: it starts no new work, and its child processes end with it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import psutil
from monailabel.utils.async_tasks import utils

from lib.errors import PatchwiseError, refuse

logger = logging.getLogger(__name__)

# Environment variable in which a server leaves its process id for the tasks that it starts.
SERVER = "PATCHWISE_SERVER"
# Seconds until requests must end after a signal; uvicorn alone would wait without a limit.
GRACE = 10.0

_closing = threading.Event()


def is_closing() -> bool:
    """Return whether the server is shutting down."""
    return _closing.is_set()


def end_tasks_with_server(stop_rounds: Callable[[], None]) -> None:
    """Make SIGTERM and SIGINT end tasks before the server; for its main thread.

    MONAI Label 0.8.5, `monailabel/utils/async_tasks/utils.py`: a thread waits for the running child process and starts
    the queued ones after it, even during a shutdown, and Python waits for that thread at exit. Superfluous once MONAI
    Label stops its tasks in the application's lifespan; no release does.

    Args:
        stop_rounds: function that ends automatic rounds, so that no stopped training counts as failed.
    """
    os.environ[SERVER] = str(os.getpid())
    utils._task_func = _unless_closing(utils._task_func)
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, before: Any = before) -> None:
            if not _closing.is_set():
                _closing.set()
                threading.Thread(target=_end, args=(stop_rounds, number), name="shutdown", daemon=True).start()
            if callable(before):
                before(number, frame)

        signal.signal(number, handle)


def end_with_server() -> None:
    """In a task's process: ends it soon after the server that has started it, however that ended."""
    server = os.environ.get(SERVER)
    if not server or not sys.argv[0].endswith(os.path.join("interfaces", "utils", "app.py")):
        return

    def watch() -> None:
        while os.getppid() == int(server):
            time.sleep(0.5)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, name="server", daemon=True).start()


def end_tasks() -> None:
    """End running tasks with all their processes, and queued ones; the next start resumes automatic rounds."""
    for executor in list(utils.background_executors.values()):
        executor.shutdown(wait=False, cancel_futures=True)
    for kind, listed in list(utils.background_tasks.items()):
        for task in listed:
            if task["status"] in ("SUBMITTED", "RUNNING"):
                task["status"] = "STOPPED"
        for process in list(utils.background_processes.get(kind, {}).values()):
            _kill(process.pid)


def _kill(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
    except psutil.NoSuchProcess:
        pass


def _end(stop_rounds: Callable[[], None], number: int) -> None:
    logger.info("the server is shutting down: tasks are ended")
    until = time.monotonic() + GRACE
    end_tasks()
    stop_rounds()
    while time.monotonic() < until:
        # A task may have left the queue without a process yet.
        end_tasks()
        time.sleep(0.1)
    logger.warning("requests are still being answered %g s after the signal; they are ended", GRACE)
    os._exit(128 + number)


def _unless_closing(run: Callable[..., None]) -> Callable[..., None]:
    def task(task: dict[str, Any], *values: Any) -> None:
        if _closing.is_set():
            task["status"] = "STOPPED"
            return
        run(task, *values)

    return task


def check_open() -> None:
    """Refuse a request for a task during a shutdown.

    Raises:
        PatchwiseError: 503.
    """
    if _closing.is_set():
        refuse("the server is shutting down, so no task is started; repeat the request after the restart", 503)


def end_start(error: Exception) -> NoReturn:
    """End a process that cannot start with one sentence and exit code 2.

    Inside of the running server an exception would be printed as a traceback by everything it passes through.
    """
    sentence = str(error)
    if not isinstance(error, PatchwiseError):
        what = f"{type(error).__name__}: {error}"
        sentence = f"the server cannot start: expected folders that it can write to, got {what}; make them writable"
    logger.error("%s", sentence)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise SystemExit(2) from None
    logging.shutdown()
    os._exit(2)
