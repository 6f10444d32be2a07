# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Steps of automatic rounds on this server: child processes, the ledger and the region selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lib.adapters.pool_evidence import spec_of
from lib.adapters.query_strategy import QueryStrategy
from lib.automation import background_tasks
from lib.automation.auto_rounds import Standing, Step
from lib.models.checkpoints import Model, ModelStore
from lib.options import AppOptions
from lib.prediction.moments_cache import MomentsCache
from lib.querying.methods import resolve
from lib.studies.datastore import PartialLabelDatastore

_KINDS: dict[Step, background_tasks.Kind] = {"train": "train", "score": "scoring"}


class ServerWork:
    """Training and scoring of one bundle, as by request, and planning of batches of one method.

    Args:
        bundle: its name.
        method: registry name of the query method.
        models: where its trainings are published.
        store, cache: the pool and its moments.
        strategy: makes the adapter of a method.
        options: of the app.
        failures: why runs failed.
    """

    def __init__(
        self,
        bundle: str,
        method: str,
        models: ModelStore,
        store: PartialLabelDatastore,
        cache: MomentsCache,
        strategy: Callable[[str], QueryStrategy],
        options: AppOptions,
        failures: background_tasks.Failures,
    ) -> None:
        self.bundle = bundle
        self.method = method
        self.models = models
        self.store = store
        self.cache = cache
        self.strategy = strategy
        self.options = options
        self.failures = failures

    def standing(self, begun: bool) -> Standing:
        ledger = self.store.ledger
        ledger.leases.expire()
        model = self.models.current()
        own = _batch(model) if model is not None and ledger.batch(_batch(model)) else None
        planned = model is not None and (own is not None or ledger.get_meta("rounds:exhausted") == model.digest)
        last = model.round if model else -1
        # A request after the last region of a batch begins another batch. If a round waited for that one too, it would
        # never begin while several annotators work.
        pending, answered = ledger.overview.after_round(
            last, own or ledger.overview.first_batch(last, self.options.batch)
        )
        # The check for unscored images is slow in a large pool.
        matters = model is not None and not planned and (begun or not pending)
        scored = not matters or model is None or self._is_scored(model)
        return Standing(
            model=model.digest if model else None,
            pending=pending,
            answered=answered,
            labels=ledger.overview.answers_key(),
            scored=scored,
            planned=planned,
        )

    def is_busy(self) -> bool:
        return background_tasks.is_running("train") or background_tasks.is_running("scoring")

    def start(self, step: Step) -> None:
        if step == "train":
            background_tasks.start("train", {"model": self.bundle, **self.options.auto_train})
        elif step == "score":
            # For a method without predictions, the stored predictions are those of the deep ensemble.
            wanted = {"query_method": self.method} if resolve(self.method).posterior else {}
            background_tasks.start("scoring", {"method": "predictive_entropy", "model": self.bundle, **wanted})
        elif step == "plan":
            self._plan()

    def failure(self, step: Step, since: float) -> tuple[str, bool] | None:
        kind = _KINDS.get(step)
        task = background_tasks.last(kind) if kind else None
        if kind is None or task is None or task["status"] == "DONE":
            return None
        # Both processes share one clock, but `since` is less precise than the time of the stored failure.
        return background_tasks.how_it_ended(kind, task, self.failures, since - 1), task["status"] == "STOPPED"

    def get(self) -> dict[str, Any]:
        return self.store.ledger.get_meta("rounds") or {}

    def keep(self, state: dict[str, Any]) -> None:
        if state != self.get():
            self.store.ledger.set_meta("rounds", state)

    def _plan(self) -> None:
        model = self.models.current()
        assert model is not None, "a batch is planned after a training"
        request = {"batch": self.options.batch, "request_id": _batch(model), "model": self.bundle}
        if not self.strategy(self.method).plan(request, self.store):
            self.store.ledger.set_meta("rounds:exhausted", model.digest)

    def _is_scored(self, model: Model) -> bool:
        digests = self.store.digests(self.store.pool()[0])
        return not self.cache.missing(model, digests, spec_of(resolve(self.method)))


def _batch(model: Model) -> str:
    """Name of the batch that is planned after a training: a restart finds it and plans no second one."""
    return f"auto:{model.digest[:16]}"
