# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Candidate summaries: the best boxes per image, cached so that a selection need not read every uncertainty map.

A summary holds the best boxes of an image and their utilities, given the boxes that were taken at that time. It also
holds the ceiling: the highest utility of any position of the image. Noisy methods draw their noise for every position
from a generator keyed by seed, round, method and image, so a summary is exact for them too: a repeated query in the
same round has the same noise. If only the first candidates have been taken since, the remaining ones are still exact.
After any other change the ceiling still bounds the utilities of the image, so its maps are read again only if that
bound could win.
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
    """Store of summaries by key and image; they are valid as long as the moments that they were computed from."""

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
    """The `n` best candidates of the pool, exactly as if every image had been read; `pool` in order of ids.

    Images are visited in descending order of their bounds, until no bound reaches the n best found. Missing
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

    Greedy selection continues from its first picks as if it had not been interrupted, so the remaining ones are exact.
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
    """Candidates of every image, in the order of `pool`; `offers` computes those that are missing or outdated.

    For selectors whose choice needs candidates of every image. Without a store, all of them are computed.
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
