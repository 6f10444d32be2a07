# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Rounds that run themselves: when a batch is answered, train, score, and plan the next one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lib.errors import PatchwiseError

logger = logging.getLogger(__name__)

Step = Literal["wait", "train", "score", "plan"]

# Seconds until a failed step is retried: doubled after each failure, at most half an hour.
FIRST_PAUSE = 10.0
LONGEST_PAUSE = 1800.0


@dataclass(frozen=True)
class Standing:
    """State of the ledger, the model store and the cache, which determines the next step, also after a restart.

    `model`: digest of the newest model; `pending`: planned or open regions of its current batch. `answered`: regions of
        rounds that it was not trained on. `labels`: key that changes with every answer. `scored`: whether the whole
        pool is scored; `planned`: whether its batch has been chosen.
    """

    model: str | None
    pending: int
    answered: int
    labels: str
    scored: bool
    planned: bool


def next_step(now: Standing, begun: str | None, trained_on: str | None) -> Step:
    """Next step; `wait` while annotators have regions left, or before the first answer.

    A round that has begun is completed, although annotators get other regions in the meantime.

    Args:
        now: present state.
        begun: `labels` at the start of the current round; None without one.
        trained_on: `labels` at the start of the last successful training.
    """
    if now.pending and begun is None:
        return "wait"
    if now.answered and trained_on != (begun or now.labels):
        return "train"
    if now.model is None or now.planned:
        return "wait"
    return "plan" if now.scored else "score"


class Work(Protocol):
    """Steps and state of automatic rounds."""

    def standing(self, begun: bool) -> Standing:
        """Present state; `scored` is only computed in a round that has begun, or without pending regions."""
        ...

    def is_busy(self) -> bool:
        """Return whether a training or a scoring runs, started by any request."""
        ...

    def start(self, step: Step) -> None:
        """Start a training or a scoring, or plan a batch."""
        ...

    def failure(self, step: Step, since: float) -> tuple[str, bool] | None:
        """Reason for the failure of the started run, and whether it was stopped by hand; None for a success."""
        ...

    def get(self) -> dict[str, Any]:
        """Return the kept state."""
        ...

    def keep(self, state: dict[str, Any]) -> None:
        """Keep the state across restarts."""
        ...


class AutoRounds:
    """Automatic rounds; `tick` is called every few seconds from one thread, and does not wait for a run."""

    def __init__(self, work: Work, clock: Callable[[], float] = time.time) -> None:
        self.work = work
        self.clock = clock
        self.step: Step = "wait"
        self._started: tuple[Step, float, str] | None = None

    def told(self) -> dict[str, Any]:
        """Current step and the failure that blocks it, for /info and the page."""
        state = self.work.get()
        return {"step": self.step, "failure": state.get("failure")}

    def tick(self) -> None:
        """Determine the state and start the next step."""
        if self.work.is_busy():
            return
        if self._started is not None:
            self._settle(*self._started)
            self._started = None
        state = self.work.get()
        begun, failure = state.get("begun"), state.get("failure")
        now = self.work.standing(begun is not None)
        step = next_step(now, begun, state.get("trained_on"))
        if failure and failure["step"] != step:
            # The step was done by hand, or is no longer needed.
            failure = None
        if step == "wait":
            begun = None
        elif step == "train" and begun is None:
            begun = now.labels
        self.work.keep({**state, "begun": begun, "failure": failure})
        self.step = step
        if step == "wait" or (failure and not self._may_retry(failure, now.labels)):
            self.step = "wait"
            return
        logger.info("rounds: %s", step)
        self._started = (step, self.clock(), begun or now.labels)
        try:
            self.work.start(step)
        except PatchwiseError as refused:
            self._failed(step, str(refused), now.labels)
        except Exception as error:
            logger.exception("rounds: %s failed", step)
            self._failed(step, f"{type(error).__name__}: {error}", now.labels)

    def _settle(self, step: Step, since: float, labels: str) -> None:
        found = self.work.failure(step, since)
        if found is not None:
            self._failed(step, found[0], labels, by_hand=found[1])
            return
        state = self.work.get()
        if step == "train":
            state = {**state, "trained_on": labels}
        self.work.keep({**state, "failure": None})

    def _failed(self, step: Step, sentence: str, labels: str, by_hand: bool = False) -> None:
        state, now = self.work.get(), self.clock()
        last = state.get("failure") or {}
        count = last.get("count", 0) + 1 if last.get("step") == step else 1
        pause = None if by_hand else min(FIRST_PAUSE * 2 ** (count - 1), LONGEST_PAUSE)
        failure = {
            "step": step,
            "sentence": sentence,
            "at": now,
            "count": count,
            "retry_at": None if pause is None else now + pause,
            "labels": labels,
        }
        logger.warning("rounds: %s failed: %s", step, sentence)
        self.work.keep({**state, "failure": failure})
        self._started = None

    def _may_retry(self, failure: dict[str, Any], labels: str) -> bool:
        """Return whether a retry is due: after the pause, or for a run stopped by hand after the next answer."""
        if failure["retry_at"] is None:
            return bool(failure["labels"] != labels)
        return bool(self.clock() >= failure["retry_at"])
