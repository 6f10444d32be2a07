# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Trainings and scorings in child processes, as MONAI Label starts them: does one run, and how did the last one end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import tasks

from lib.adapters.scoring_method import AUTOMATIC
from lib.errors import refuse
from lib.ledger.queries import QueryLedger

Kind = Literal["train", "scoring"]

UNFINISHED = ("SUBMITTED", "RUNNING")
_GIVE_WAY_SECONDS = 15.0
_TIME = "%Y-%m-%d %H:%M:%S"
_LOG_HEAD = re.compile(r"^(\[[^\]]*\] ?)+(\([^)]*\))?\s*-?\s*")
_SPOKEN = re.compile(r"refused: (.+)$")


class Failures:
    """Last failure of each kind of run, stored in the ledger, where child processes write it."""

    def __init__(self, ledger: QueryLedger) -> None:
        self.ledger = ledger

    def note(self, kind: Kind, sentence: str | None) -> None:
        """Store the reason for a failure; None for a success."""
        if sentence is not None:
            self.ledger.set_meta(f"failed:{kind}", {"sentence": sentence[:2000], "at": time.time()})
        elif self.get(kind) is not None:
            self.ledger.set_meta(f"failed:{kind}", None)

    def get(self, kind: Kind) -> dict[str, Any] | None:
        """`sentence` and `at` (seconds since 1970) of the last failure; None if the last run succeeded."""
        found: dict[str, Any] | None = self.ledger.get_meta(f"failed:{kind}")
        return found


def last(kind: Kind) -> dict[str, Any] | None:
    """MONAI Label's record of the newest run of this server process."""
    listed = tasks(kind)
    return dict(listed[-1]) if listed else None


def is_running(kind: Kind) -> bool:
    """Return whether a run is in progress or queued, started by any request."""
    return any(task["status"] in UNFINISHED for task in list(tasks(kind)))


def start(kind: Kind, request: Mapping[str, Any]) -> None:
    """Start a run in a child process, as `POST /train` and `POST /scoring` do."""
    AsyncTask.run(kind, request=dict(request), enqueue=True)


def give_way(kind: Kind) -> None:
    """End an automatic run; its finished images are kept."""
    end = time.monotonic() + _GIVE_WAY_SECONDS
    while time.monotonic() < end:
        running = [task for task in list(tasks(kind)) if task["status"] in UNFINISHED]
        if not running or not all(task["request"].get(AUTOMATIC) for task in running):
            return
        # A run that was only just submitted has no process to end yet.
        AsyncTask.stop(kind)
        time.sleep(0.05)


def was_stopped(kind: Kind, seconds: float) -> bool:
    """Return whether the newest run was stopped less than `seconds` ago."""
    task = last(kind)
    if task is None or task["status"] != "STOPPED" or "end_ts" not in task:
        return False
    return time.time() - datetime.strptime(task["end_ts"], _TIME).timestamp() < seconds


def started_at(task: Mapping[str, Any]) -> float:
    """Time of the request for a run of `last`, in seconds since 1970."""
    return datetime.strptime(task["start_ts"], _TIME).timestamp()


@contextmanager
def one_at_a_time(lock: Path, wait: bool) -> Iterator[None]:
    """Lock for one training across processes, since a training may outlive a killed server and meet the next one.

    Raises:
        PatchwiseError: 409 without `wait` while another process holds the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=-1 if wait else 0, poll_interval=0.2):
            yield
    except Timeout:
        refuse("another training is running; ask again when it has ended", 409)


def how_it_ended(kind: Kind, task: Mapping[str, Any], failures: Failures, since: float) -> str:
    """Reason for a failed run, in one sentence: the failure that the child stored, or the end of its log."""
    noted = failures.get(kind)
    if noted and noted["at"] >= since:
        return str(noted["sentence"])
    what = "the training" if kind == "train" else "the scoring"
    if task["status"] == "STOPPED":
        return f"{what} was stopped by hand"
    return (
        f"{what} ended without an error message (killed, or out of memory?); {_last_words(task.get('details') or ())}"
    )


def _last_words(details: Sequence[str]) -> str:
    for line in reversed(list(details)):
        spoken = _SPOKEN.search(line)
        if spoken:
            return spoken[1]
    said = [_LOG_HEAD.sub("", line).strip() for line in details]
    said = [line for line in said if line]
    return f"its log ends with: {said[-1][:300]}" if said else "its log is empty"
