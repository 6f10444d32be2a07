# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Progress of a training: one record of all its members, for the log, /train and /info."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from lib.storage.atomic_files import write_json
from lib.training.trainer import Progress

logger = logging.getLogger(__name__)


class ProgressLog:
    """Progress of every member of a training; `report` writes it to `path` and the log.

    Time left = time so far / share done so far * share left, over the steps of this process: the speed of an earlier
    process does not count.
    """

    def __init__(self, members: int, done: Iterable[int], path: Path) -> None:
        self.members = members
        self.path = path
        self.shares = dict.fromkeys(done, 1.0)
        self.first = dict(self.shares)  # share of each member at its first report to this process
        self.begun = time.monotonic()
        self.started = time.time()

    def report(self, member: int, progress: Progress) -> None:
        """Takes in where one member stands."""
        share = progress.step / progress.steps
        self.first.setdefault(member, share)
        self.shares[member] = share
        fraction = sum(self.shares.values()) / self.members
        left = self._seconds_left(fraction)
        logger.info(
            "member %d/%d step %d/%d loss %.4f%s",
            member + 1, self.members, progress.step, progress.steps, progress.loss,
            "" if left is None else f", about {left:.0f} s left",
        )  # fmt: skip
        state = {
            "started": round(self.started, 3),
            "member": member + 1,
            "members": self.members,
            "step": progress.step,
            "steps": progress.steps,
            "loss": progress.loss,
            "fraction": round(fraction, 4),
            "seconds_left": None if left is None else round(left, 1),
        }
        write_json(self.path, state)

    def _seconds_left(self, fraction: float) -> float | None:
        """None until the speed can be estimated."""
        gained = sum(share - self.first[member] for member, share in self.shares.items()) / self.members
        return (time.monotonic() - self.begun) * (1 - fraction) / gained if gained > 0 else None
