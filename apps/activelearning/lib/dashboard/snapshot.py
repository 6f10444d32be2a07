# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Data of the progress page: budget, quality, coverage, regions, advice, work and failures, as one JSON."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol

import numpy as np
from monailabel.interfaces.exception import MONAILabelException

from lib.adapters.train_task import EnsembleTrainTask
from lib.annotator.captions import cue_in_batch
from lib.annotator.explanations import Explanations
from lib.dashboard.counts import Counts
from lib.dashboard.stopping_advisor import Batch, Rules, advise, estimate
from lib.errors import PatchwiseError
from lib.ledger.records import Query, iso
from lib.options import AppOptions
from lib.prediction.moments_cache import MomentsCache
from lib.randomness import child_rng
from lib.studies.datastore import PartialLabelDatastore

PICTURES = 12
# Seconds for which all clients get the same report.
FRESH_SECONDS = 1.0
# Statuses of the ledger -> statuses on the page.
STATUSES = {"answered": "answered", "open": "open", "proposed": "planned", "expired": "returned",
            "released": "returned", "skipped": "skipped", "withdrawn": "given up"}  # fmt: skip


Kind = Literal["train", "scoring"]


class Failures(Protocol):
    """Last failure of each kind of run."""

    def get(self, kind: Kind) -> dict[str, Any] | None:
        """`sentence` and `at` of the last failure; None if the last run succeeded."""
        ...


class Tasks(Protocol):
    """Trainings and scorings of this server process; `lib.automation.background_tasks` is one."""

    def is_running(self, kind: Kind) -> bool:
        """Return whether a run is in progress or queued."""
        ...

    def last(self, kind: Kind) -> dict[str, Any] | None:
        """The record of the newest run."""
        ...

    def started_at(self, task: Mapping[str, Any]) -> float:
        """Time of the request for a run, in seconds since 1970."""
        ...

    def how_it_ended(self, kind: Kind, task: Mapping[str, Any], failures: Any, since: float) -> str:
        """Reason for a failed run, in one sentence."""
        ...


class Rounds(Protocol):
    """Automatic rounds; `lib.automation.auto_rounds` is one."""

    @property
    def step(self) -> str:
        """The current step."""
        ...

    def told(self) -> dict[str, Any]:
        """State and failure, as `/info/` lists them."""
        ...


class Snapshot:
    """Report on the ledger, the counts and the processes, at the cost of a few sums for any number of scans.

    Args:
        store: images, labels and the ledger.
        measures: counts in label files.
        trainers: by bundle; the first is shown.
        cache, reasons: scored images, pictures.
        options: options of the app.
        rounds: automatic rounds, or None.
        failures, tasks: trainings and scorings.
    """

    def __init__(
        self,
        store: PartialLabelDatastore,
        measures: Counts,
        trainers: Mapping[str, EnsembleTrainTask],
        cache: MomentsCache,
        reasons: Explanations,
        options: AppOptions,
        rounds: Rounds | None,
        failures: Failures,
        tasks: Tasks,
        unscored: Callable[[], int] = lambda: 0,
    ) -> None:
        self.store = store
        self.ledger = store.ledger
        self.measures = measures
        self.trainer = next(iter(trainers.values()))
        self.cache = cache
        self.reasons = reasons
        self.options = options
        self.rounds = rounds
        self.failures = failures
        self.tasks = tasks
        self.unscored = unscored
        self.rules = Rules(options.stop_gain, options.stop_batches)
        self._lock = threading.Lock()
        self._report: tuple[float, dict[str, Any]] = (-np.inf, {})
        self._quality: tuple[Any, dict[str, Any]] = (None, self._advised([], {}, 0, options.batch))
        self._cues: dict[int, str] = {}

    def report(self) -> dict[str, Any]:
        """All data of the page; clients get the same report within a second."""
        with self._lock:
            made, report = self._report
            if time.monotonic() - made > FRESH_SECONDS:
                report = self._make()
                self._report = (time.monotonic(), report)
            return report

    def refresh(self) -> None:
        """Update estimates and advice if answers, counts or minutes have changed; called from the background thread."""
        minutes: dict[int, float] = defaultdict(float)
        for round_, _, worked in self.ledger.overview.minutes():
            minutes[round_] += worked
        sizes = self.ledger.overview.sizes()
        newest = sizes[max(sizes)] if sizes else self.options.batch
        key = (
            self.ledger.overview.answers_key(),
            self.measures.revision,
            newest,
            [round(m, 1) for m in minutes.values()],
        )
        if key != self._quality[0]:
            self._quality = (key, self._estimates(minutes, newest))

    def _make(self) -> dict[str, Any]:
        standing, minutes = self.ledger.overview.standing(), self.ledger.overview.minutes()
        return {
            "generated": iso(time.time()),
            "project": self.store.studies.name,
            "images": {"total": len(self.store.list_images()), "annotated": len(self.store.get_labeled_images())},
            "left_out": self.store.left_out(),
            "regions": _by_status(standing),
            "annotators": _annotators(standing, minutes),
            "minutes": {"used": sum(m for _, _, m in minutes), "budget": self.options.budget_minutes},
            "voxels": sum(sum(kept.values()) for kept in self.measures.voxels().values()),
            "classes": self._classes(),
            "quality": self._quality[1],
            "latest": [self._region(query) for query in self.ledger.overview.latest(PICTURES)],
            "work": self._work(),
            "failures": self._failures(),
            "measuring": self.measures.waiting,
        }

    # --- quality -----------------------------------------------------------------------------------------------------

    def _estimates(self, minutes: Mapping[int, float], next_regions: int) -> dict[str, Any]:
        overlaps = self.measures.overlaps()
        answered: Counter[int] = Counter()
        counts: dict[int, list[Any]] = defaultdict(list)
        methods: dict[int, set[str]] = defaultdict(set)
        assisted = 0
        for found in self.ledger.overview.answered_queries():
            answered[found.round] += found.first == found.query
            # An answer that began with the prediction agrees with it, whatever the quality of the model.
            assisted += found.assisted
            if (found.query, found.answer) in overlaps and not found.assisted:
                counts[found.round].append(overlaps[found.query, found.answer])
                methods[found.round].add(found.method)
        batches = [
            Batch(
                round=round_,
                known=sum(n for r, n in answered.items() if r < round_),
                minutes=sum(m for r, m in minutes.items() if r < round_),
                overlaps_ncv=np.stack(counts[round_]),
            )
            for round_ in sorted(counts)
        ]
        return self._advised(batches, methods, answered.total(), next_regions, assisted)

    def _advised(
        self,
        batches: Sequence[Batch],
        methods: Mapping[int, set[str]],
        annotated: int,
        next_regions: int,
        assisted: int = 0,
    ) -> dict[str, Any]:
        rng = child_rng(0, "advisor")
        estimates = [e for e in (estimate(batch, self.rules, rng) for batch in batches) if e is not None]
        advice = advise(batches, annotated, next_regions, self.rules, rng)
        return {
            "batches": [{**asdict(e), "methods": sorted(methods[e.round])} for e in estimates],
            "assisted": assisted,
            "class_names": list(self.store.annotations.classes),
            "advice": {**asdict(advice), "worth": self.rules.gain, "level": self.rules.level, "regions": next_regions},
        }

    def _classes(self) -> list[dict[str, Any]]:
        names = ["background", *self.store.annotations.classes]
        voxels, cases = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for kept in self.measures.voxels().values():
            for name, count in kept.items():
                if count and name in voxels:
                    voxels[name] += count
                    cases[name] += 1
        total = sum(voxels.values())
        return [
            {"name": n, "voxels": voxels[n], "cases": cases[n], "share": voxels[n] / total if total else 0.0}
            for n in names
        ]

    # --- regions and work --------------------------------------------------------------------------------------------

    def _region(self, query: Query) -> dict[str, Any]:
        # A second reading has the same picture as the first one.
        drawn = query.id if query.twin is None else query.twin
        over = (
            query.status == "open" and query.lease_until is not None and query.lease_until < self.ledger.store.clock()
        )
        return {
            "query": query.id,
            "cue": self._cue(query),
            "status": STATUSES["expired" if over else query.status],
            "client": query.client,
            "method": query.method,
            "round": query.round,
            "lease_until": iso(query.lease_until) if query.status == "open" else None,
            "picture": f"/patchwise/queries/{drawn}/picture.png" if self.reasons.has_picture(drawn) else None,
        }

    def _cue(self, query: Query) -> str:
        if query.id not in self._cues:
            if len(self._cues) > 1000:
                self._cues.clear()
            try:
                grid = self.store.geometry(query.region.image)
                self._cues[query.id] = cue_in_batch(query, self.ledger, *grid)
            except (PatchwiseError, MONAILabelException, OSError):
                # The image was removed from the pool, or is no longer readable.
                return query.region.image
        return self._cues[query.id]

    def _work(self) -> dict[str, Any]:
        model, images = self.trainer.store.current(), len(self.store.pool()[0])
        training, scoring = self.tasks.is_running("train"), self.tasks.is_running("scoring")
        scored = self.cache.root / model.digest[:16] if model else None
        done = sum(1 for _ in scored.glob("*.npz")) if scoring and scored and scored.is_dir() else 0
        return {
            "model": {"round": model.round, "members": model.facts.members, "digest": model.digest[:8]}
            if model
            else None,
            "training": {**self.trainer.progress(), "running": True} if training else {"running": False},
            "scoring": {"running": scoring, "scored": min(done, images), "images": images, "waiting": self.unscored()},
            "auto_rounds": self.rounds is not None,
            "step": self.rounds.step if self.rounds else None,
        }

    def _failures(self) -> list[dict[str, Any]]:
        """Last failures without a later success."""
        found: list[dict[str, Any]] = []
        auto = self.rounds.told()["failure"] if self.rounds else None
        if auto:
            what = {"train": "training", "score": "scoring", "plan": "choosing the next batch"}[auto["step"]]
            found.append({"what": what, "sentence": auto["sentence"], "at": iso(auto["at"]),
                          "retry_at": iso(auto["retry_at"])})  # fmt: skip
        kinds: tuple[Kind, ...] = ("train", "scoring")
        for kind in kinds:
            noted, task = self.failures.get(kind), self.tasks.last(kind)
            if noted is None and task and task["status"] == "ERROR":
                since = self.tasks.started_at(task)
                noted = {"sentence": self.tasks.how_it_ended(kind, task, self.failures, since), "at": since}
            if noted and all(noted["sentence"] != f["sentence"] for f in found):
                what = "training" if kind == "train" else kind
                found.append({"what": what, "sentence": noted["sentence"], "at": iso(noted["at"]), "retry_at": None})
        return found


def _by_status(standing: Sequence[tuple[int, str, str | None, int, int]]) -> dict[str, int]:
    counts = dict.fromkeys(STATUSES.values(), 0)
    for _, status, _, regions, _ in standing:
        counts[STATUSES[status]] += regions
    return counts


def _annotators(
    standing: Sequence[tuple[int, str, str | None, int, int]], minutes: Sequence[tuple[int, str | None, float]]
) -> list[dict[str, Any]]:
    people: dict[str, dict[str, Any]] = {}

    def of(client: str) -> dict[str, Any]:
        fresh = {"client": client, "answered": 0, "open": 0, "returned": 0, "skipped": 0, "voxels": 0, "minutes": 0.0}
        return people.setdefault(client, fresh)

    for _, status, client, regions, voxels in standing:
        kept = STATUSES[status]
        if client is not None and kept in ("answered", "open", "returned", "skipped"):
            of(client)[kept] += regions
            of(client)["voxels"] += voxels if kept == "answered" else 0
    for _, client, worked in minutes:
        if client is not None:
            of(client)["minutes"] += worked
    return sorted(people.values(), key=lambda person: (-person["answered"], person["client"]))
