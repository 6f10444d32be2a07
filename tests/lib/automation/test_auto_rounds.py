# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from lib.automation.auto_rounds import AutoRounds, Standing, next_step
from lib.errors import PatchwiseError
from tests.lib.clock import Clock

ANSWERED = Standing(model="m0", pending=0, answered=4, labels="4", scored=True, planned=True)


@pytest.mark.parametrize(
    ("change", "begun", "trained_on", "step"),
    [
        ({}, None, "2", "train"),
        ({"pending": 1}, None, "2", "wait"),
        ({"pending": 1}, "3", "2", "train"),
        ({"model": None}, None, None, "train"),
        ({"planned": False}, None, "4", "plan"),
        ({"planned": False, "pending": 2, "answered": 1}, "3", "3", "plan"),
        ({"planned": False, "pending": 2, "scored": False}, "3", "3", "score"),
        ({"answered": 0, "planned": False, "scored": False}, None, "2", "score"),
        ({"answered": 0, "planned": False}, None, "2", "plan"),
        ({"answered": 0}, "3", "3", "wait"),
        ({"answered": 0, "model": None, "planned": False, "scored": False}, None, None, "wait"),
    ],
)
def test_the_next_step_follows_from_how_things_stand(change, begun, trained_on, step):
    assert next_step(replace(ANSWERED, **change), begun, trained_on) == step


class FakeWork:
    """A studies folder in which trainings take two ticks and may fail."""

    def __init__(self, state=None):
        self.model, self.scored, self.planned = None, set(), set()
        self.pending, self.answered = 0, 0
        self.state = state if state is not None else {}
        self.started, self.running, self.why = [], [], None
        self.answers = itertools.count()
        self.labels = "none"

    def answer(self, n=1):
        self.pending, self.answered = self.pending - n, self.answered + n
        self.labels = f"answers {next(self.answers)}"

    def standing(self, begun):
        model = self.model
        return Standing(model, self.pending, self.answered, self.labels, model in self.scored, model in self.planned)

    def is_busy(self):
        if len(self.running) < 2:
            self.running.append(None) if self.running else None
            return bool(self.running)
        step, _ = self.running
        self.running = []
        if self.why is None:
            self.finish(step)
        return False

    def finish(self, step):
        if step == "train":
            self.model, self.answered = f"m{len(self.started)}", 0
        elif step == "score":
            self.scored.add(self.model)

    def start(self, step):
        self.started.append(step)
        if step == "plan":
            if self.why:
                raise PatchwiseError(self.why[0], 409)
            self.planned.add(self.model)
            self.pending = 2
        else:
            self.running = [step]

    def failure(self, step, since):
        return self.why

    def get(self):
        return dict(self.state)

    def keep(self, state):
        self.state.clear()
        self.state.update(state)


def run(rounds, ticks=20):
    for _ in range(ticks):
        rounds.tick()


def test_an_answered_batch_leads_to_the_next_one():
    work = FakeWork()
    rounds = AutoRounds(work, Clock(1000.0))
    work.pending = 2
    work.answer()
    run(rounds)
    assert work.started == []
    work.answer()
    run(rounds)
    assert work.started == ["train", "score", "plan"]
    assert (work.pending, rounds.step) == (2, "wait")
    work.answer(2)
    run(rounds)
    assert work.started == ["train", "score", "plan"] * 2


def test_a_restart_goes_on_with_the_step_that_is_missing():
    work = FakeWork()
    work.pending = 1
    work.answer()
    first = AutoRounds(work, Clock(1000.0))
    first.tick()
    assert work.started == ["train"]
    killed = FakeWork(work.state)
    killed.answered, killed.labels = 1, work.labels
    run(AutoRounds(killed, Clock(1000.0)))
    assert killed.started == ["train", "score", "plan"]
    scored = FakeWork(work.state)
    scored.model, scored.scored = "m1", {"m1"}
    run(AutoRounds(scored, Clock(1000.0)))
    assert scored.started == ["plan"]


def test_a_failure_is_told_and_retried_after_a_growing_pause():
    work, clock = FakeWork(), Clock(1000.0)
    rounds = AutoRounds(work, clock)
    work.pending = 1
    work.answer()
    work.why = ("the disk is full", False)
    run(rounds, 5)
    assert work.started == ["train"]
    failure = rounds.told()["failure"]
    assert (failure["sentence"], failure["count"], failure["retry_at"]) == ("the disk is full", 1, 1010.0)
    clock.now += 11
    run(rounds, 5)
    assert (len(work.started), work.state["failure"]["retry_at"]) == (2, clock.now + 20)
    restarted = AutoRounds(work, clock)
    run(restarted, 5)
    assert len(work.started) == 2
    clock.now += 21
    work.why = None
    run(restarted)
    assert work.started == ["train"] * 3 + ["score", "plan"]
    assert restarted.told()["failure"] is None


def test_who_asks_meanwhile_does_not_hold_a_round_up():
    work, clock = FakeWork(), Clock(1000.0)
    rounds = AutoRounds(work, clock)
    work.pending = 1
    work.answer()
    work.why = ("broken", False)
    run(rounds, 5)
    work.pending = 3
    run(rounds, 5)
    assert rounds.told()["failure"]["sentence"] == "broken"
    work.why = None
    clock.now += 11
    run(rounds)
    assert work.started == ["train", "train", "score", "plan"]
    run(rounds)
    assert len(work.started) == 4


def test_a_training_stopped_by_hand_waits_for_the_next_answer():
    work, clock = FakeWork(), Clock(1000.0)
    rounds = AutoRounds(work, clock)
    work.pending = 2
    work.answer(2)
    work.why = ("stopped", True)
    run(rounds, 5)
    clock.now += 10**6
    run(rounds, 5)
    assert work.started == ["train"]
    work.why = None
    work.pending = 1
    work.answer()
    run(rounds)
    assert work.started == ["train", "train", "score", "plan"]


def test_a_training_by_hand_counts():
    work, clock = FakeWork(), Clock(1000.0)
    rounds = AutoRounds(work, clock)
    work.pending = 1
    work.answer()
    work.why = ("broken", False)
    run(rounds, 5)
    work.why = None
    work.running = ["train"]
    run(rounds)
    assert work.started == ["train", "score", "plan"]
    assert rounds.told()["failure"] is None


def test_a_plan_that_is_refused_is_a_failure_in_a_sentence():
    work, clock = FakeWork(), Clock(1000.0)
    work.model, work.scored = "m0", {"m0"}
    work.why = ("the pool is empty", False)
    rounds = AutoRounds(work, clock)
    run(rounds, 3)
    assert work.started == ["plan"]
    assert rounds.told()["failure"]["sentence"] == "the pool is empty"


def test_pauses_end_at_half_an_hour():
    work, clock = FakeWork(), Clock(1000.0)
    rounds = AutoRounds(work, clock)
    work.pending = 1
    work.answer()
    work.why = ("broken", False)
    for _ in range(12):
        run(rounds, 5)
        clock.now = work.state["failure"]["retry_at"]
    assert work.state["failure"]["retry_at"] - work.state["failure"]["at"] == 1800
