# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Candidate summaries: what an image can offer a query, kept so that a pool is chosen from without reading its maps.

An image's summary holds its best boxes and their utilities under the boxes that were taken when it was made, and the
highest utility of any position whatsoever, its ceiling. Noise of the noisy methods is drawn for every position when a
summary is made, from a generator keyed by seed, round, method and image, so a summary is exact for them too: asking
again in the same round meets the same noise. When an image's first candidates have been taken since, the rest of them
is still exact. After any other change its ceiling still bounds what the image can offer, so its maps are read again
only if that bound could win.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from lib.querying.types import Ask, Candidate, PoolImage
from lib.regions import Box


@dataclass(frozen=True)
class Head:
    """The part of a summary that decides whether the rest is read."""

    taken: str
    best: float
    ceiling: float


@dataclass(frozen=True)
class ImageCandidates:
    """Head, boxes taken then, and candidates (best first) of one image; complete when it has no more boxes to offer."""

    head: Head
    taken: tuple[Box, ...]
    candidates: tuple[Candidate, ...]
    complete: bool


@runtime_checkable
class SummaryStore(Protocol):
    """Where summaries are kept, by key and image, for as long as the moments they were made of."""

    def heads(self, key: str) -> Mapping[str, Head]:
        """Heads of every image that has a summary under `key`."""
        ...

    def load(self, key: str, image: str) -> ImageCandidates:
        """One summary."""
        ...

    def save(self, key: str, image: str, summary: ImageCandidates) -> None:
        """Keep a summary in place of an older one."""
        ...


@dataclass
class MemorySummaries:
    """Summaries in memory."""

    _kept: dict[str, dict[str, ImageCandidates]] = field(default_factory=dict)

    def heads(self, key: str) -> Mapping[str, Head]:
        """Heads of every image that has a summary under `key`."""
        return {image: summary.head for image, summary in self._kept.get(key, {}).items()}

    def load(self, key: str, image: str) -> ImageCandidates:
        """One summary."""
        return self._kept[key][image]

    def save(self, key: str, image: str, summary: ImageCandidates) -> None:
        """Keep a summary in place of an older one."""
        self._kept.setdefault(key, {})[image] = summary


def summary_key(ask: Ask) -> str:
    """Digest of everything but the image and its taken boxes that candidates depend on."""
    method = ask.method
    noise = (ask.seed, ask.round, method.name, ask.option("beta")) if method.selector == "power" else ()
    parts = (method.posterior, method.uncertainty, method.unit, method.selector, ask.size, ask.axis, ask.stride)
    options = sorted((k, str(v)) for k, v in method.options.items())
    names = sorted(ask.labels.items())
    return hashlib.sha256(repr((parts, options, noise, ask.per_image, names)).encode()).hexdigest()


def taken_digest(taken: Sequence[Box]) -> str:
    """Digest of a set of taken boxes; their order does not matter."""
    return hashlib.sha256(repr(sorted(taken)).encode()).hexdigest()[:16]


def best_of_pool(
    ask: Ask, pool: Sequence[PoolImage], store: SummaryStore, summarise: Callable[[PoolImage], ImageCandidates], n: int
) -> list[Candidate]:
    """The `n` best candidates of the pool, exactly as if every image had been looked at; `pool` in order of ids.

    Images are visited by the bound on what they offer, and no more once no bound can reach the n best found. Missing
    summaries are made by `summarise`; outdated ones only when their ceiling can win.
    """
    key = summary_key(ask)
    heads = store.heads(key)
    queue: list[tuple[float, int, str]] = []
    for i, image in enumerate(pool):
        head = heads.get(image.id)
        if head is None:
            head = _renew(store, key, image, summarise).head
        fresh = head.taken == taken_digest(image.taken)
        queue.append((-(head.best if fresh else head.ceiling), i, "fresh" if fresh else "outdated"))
    heapq.heapify(queue)
    found: list[tuple[float, int, int, Candidate]] = []
    while queue:
        negative_bound, i, state = heapq.heappop(queue)
        if len(found) >= n and -negative_bound < -found[n - 1][0]:
            break
        summary = store.load(key, pool[i].id)
        offered = _remaining(summary, pool[i].taken)
        if offered is None or state == "beyond":
            found = [entry for entry in found if entry[1] != i]
            heapq.heappush(queue, (-_renew(store, key, pool[i], summarise).head.best, i, "fresh"))
            continue
        found += [(-c.utility, i, rank, c) for rank, c in enumerate(offered)]
        found = sorted(found, key=lambda entry: entry[:3])[:n]
        if not summary.complete and len(offered) < ask.per_image:
            heapq.heappush(queue, (-summary.candidates[-1].utility, i, "beyond"))
    return [c for _, _, _, c in found]


def _remaining(summary: ImageCandidates, taken: Sequence[Box]) -> tuple[Candidate, ...] | None:
    """Candidates left when the first few of them have been taken since, None when anything else has changed.

    Greedy selection goes on from its first picks as if it had never stopped, so what is left is exact.
    """
    before, now = set(summary.taken), set(taken)
    since = now - before
    first = summary.candidates[: len(since)]
    if not before <= now or since != {(c.start, c.size) for c in first}:
        return None
    return summary.candidates[len(since) :]


def remembered(
    key: str, pool: Sequence[PoolImage], store: object, offers: Callable[[PoolImage], Sequence[Candidate]]
) -> Iterator[Sequence[Candidate]]:
    """What every image offers, in the order of `pool`; made by `offers` only where boxes were taken since, or never.

    For selectors whose choice needs candidates of every image. Without a store everything is made anew.
    """
    if not isinstance(store, SummaryStore):
        yield from map(offers, pool)
        return
    heads = store.heads(key)
    for image in pool:
        head, taken = heads.get(image.id), taken_digest(image.taken)
        if head is not None and head.taken == taken:
            yield store.load(key, image.id).candidates
            continue
        candidates = tuple(offers(image))
        top = max((c.utility for c in candidates), default=-math.inf)
        store.save(key, image.id, ImageCandidates(Head(taken, top, top), image.taken, candidates, complete=True))
        yield candidates


def _renew(
    store: SummaryStore, key: str, image: PoolImage, summarise: Callable[[PoolImage], ImageCandidates]
) -> ImageCandidates:
    summary = summarise(image)
    store.save(key, image.id, summary)
    return summary
