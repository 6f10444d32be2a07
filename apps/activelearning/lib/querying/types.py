# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Types of a query: the pool, the evidence about its images, the request and the picks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lib.querying.method import MethodError, QueryMethod
from lib.randomness import child_rng
from lib.regions import Box, Triple, boxes_overlap, triple
from lib.selectors.steps import Selection, indices_of
from lib.uncertainty import PosteriorMoments
from lib.units import unit_size

ALTERNATIVES = 5  # candidates recorded per step besides its pick


@dataclass(frozen=True)
class PoolImage:
    """An image of the pool: id, shape in voxels, spacing in mm, and the boxes already queried, answered or leased."""

    id: str
    shape: Triple
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    taken: tuple[Box, ...] = ()

    def is_free(self, box: Box) -> bool:
        """Return whether `box` overlaps none of the taken boxes."""
        return not any(boxes_overlap(box, other) for other in self.taken)


class Evidence(Protocol):
    """Predictions of the model per image; read lazily, one image at a time."""

    def moments(self, image: str) -> PosteriorMoments:
        """Moments of the posterior on the grid of the stored image."""
        ...


@runtime_checkable
class FeatureEvidence(Protocol):
    """Additional evidence of methods that need "features"."""

    def features(self, image: str, boxes: Sequence[Box]) -> NDArray[np.floating[Any]]:
        """One feature vector per box, (N, D), computed alike for all images."""
        ...

    def labelled_features(self) -> NDArray[np.floating[Any]]:
        """Features of the regions annotated so far, (L, D); L may be 0."""
        ...


@runtime_checkable
class GradientEvidence(Protocol):
    """Additional evidence of methods that need "gradients"."""

    def gradients(self, image: str, boxes: Sequence[Box], layer: str) -> NDArray[np.floating[Any]]:
        """One gradient per box, (N, P), of the pseudo-label log likelihood with respect to the weights of `layer`."""
        ...

    def class_frequencies(self) -> NDArray[np.floating[Any]]:
        """Per class, the sum over annotated images of the share of their voxels labelled so, (C,)."""
        ...


@dataclass(frozen=True)
class Pick:
    """One region to annotate. `score` is its mean uncertainty (0 where nothing was scored), `rank` counts from 1."""

    image: str
    start: Triple
    size: Triple
    unit: str
    score: float
    rank: int
    reason: dict[str, Any] = field(default_factory=dict)

    @property
    def box(self) -> Box:
        """(start, size)."""
        return self.start, self.size


class PoolExhausted(Exception):  # noqa: N818  a state of the pool, not a fault
    """Fewer regions are left than the request asks for; `picks` holds them."""

    def __init__(self, asked: int, picks: Sequence[Pick], hint: str = "") -> None:
        super().__init__(f"pool exhausted: asked {asked}, {len(picks)} left{hint}")
        self.picks = list(picks)


@dataclass(frozen=True)
class Ask:
    """One query: the method, the number and size of the regions, and all inputs of the random draw."""

    method: QueryMethod
    n: int
    size: Triple | None = None
    seed: int = 0
    round: int = 0
    axis: int = 2
    stride: Triple = (1, 1, 1)
    n_per_image: int | None = None
    hints: Sequence[Mapping[str, Any]] = ()
    regions: Sequence[Mapping[str, Any]] = ()
    labels: Mapping[str, int] = field(default_factory=dict)
    rounds_total: int | None = None
    utilities: bool = False

    @property
    def per_image(self) -> int:
        """Largest number of regions from one image."""
        return min(self.n, self.n_per_image or self.n)

    def option(self, name: str) -> Any:
        """Value of an option of the method."""
        return self.method.options[name]

    def rng(self, *keys: object) -> np.random.Generator:
        """Generator for one purpose of this query; the same for the same seed, round, method and keys."""
        return child_rng(self.seed, self.round, self.method.name, *keys)

    def box_size(self, image: PoolImage) -> Triple:
        """Size of this query's unit in `image`."""
        return unit_size(self.method.unit, image.shape, self.size, self.axis)


def with_features(evidence: Evidence, ask: Ask) -> FeatureEvidence:
    """Return `evidence` if it offers features.

    Raises:
        MethodError: it does not.
    """
    if not isinstance(evidence, FeatureEvidence):
        raise MethodError(f"{ask.method.name} needs features of the network and this model offers none: use power_pe")
    return evidence


def with_gradients(evidence: Evidence, ask: Ask) -> GradientEvidence:
    """Return `evidence` if it offers gradients.

    Raises:
        MethodError: it does not.
    """
    if not isinstance(evidence, GradientEvidence):
        raise MethodError(f"{ask.method.name} needs gradients of the network and this model offers none: use power_pe")
    return evidence


@dataclass(frozen=True)
class Candidate:
    """A unit that may be picked: `utility` decides, `score` is its plain mean uncertainty."""

    image: str
    start: Triple
    size: Triple
    score: float
    utility: float
    reason: dict[str, Any] = field(default_factory=dict)


class Places:
    """Places of units, to find those that overlap one of them.

    Args:
        units: image id, start and size of each.
    """

    def __init__(self, units: Sequence[tuple[str, Triple, Triple]]) -> None:
        self._images = np.array([image for image, _, _ in units], dtype=object)
        self._starts = np.array([start for _, start, _ in units], dtype=np.intp).reshape(-1, 3)
        self._ends = self._starts + np.array([size for _, _, size in units], dtype=np.intp).reshape(-1, 3)

    def overlapping(self, unit: int) -> NDArray[np.bool_]:
        """Return which units share a voxel with `unit`, itself included, (U,)."""
        meets = (self._starts < self._ends[unit]) & (self._ends > self._starts[unit])
        return np.asarray(meets.all(axis=1) & (self._images == self._images[unit]))


Step = dict[str, Any]
"""One greedy step: "utility" of its pick, best "candidates" not taken by then, how many are "left", if known."""


def step(utility: float | None, others: Iterable[Candidate] = (), left: int | None = None) -> Step:
    """JSON-serialisable record of a step; a utility that is not finite is None."""
    told = [
        {"image": c.image, "start": list(c.start), "size": list(c.size), "utility": _finite(c.utility)} for c in others
    ]
    return {"utility": _finite(utility), "candidates": told, "left": left}


def ranked_steps(ranked: Sequence[Candidate], n: int, left: int | None = None) -> list[Step]:
    """Steps of taking the first `n` of `ranked`, whose utilities never change; `left` of them remain after the last."""
    return [
        step(c.utility, ranked[k : k + ALTERNATIVES], None if left is None else left + n - k)
        for k, c in enumerate(ranked[:n], start=1)
    ]


def traced(units: Sequence[Candidate], selection: Selection, trace: bool) -> tuple[list[int], list[Step]]:
    """Indices that `selection` takes of `units`, and with `trace` the record of each step."""
    chosen = list[int]()

    def utilities() -> Iterator[NDArray[np.floating[Any]]]:
        for taken in selection:
            chosen.append(taken.row)
            yield taken.utilities()

    if trace:
        return chosen, traced_steps(units, chosen, utilities())
    return indices_of(selection).tolist(), []


def traced_steps(
    units: Sequence[Candidate], chosen: Sequence[int], utilities: Iterable[NDArray[np.floating[Any]]]
) -> list[Step]:
    """Steps of taking `chosen` of `units`, given the utility of every unit at each step, (U,).

    NaN stands for a unit that is not free, -inf for a free one that does not compare with the pick. A unit that
    overlaps a pick is not free any more.
    """
    free, found = np.ones(len(units), dtype=bool), list[Step]()
    places = Places([(c.image, c.start, c.size) for c in units])
    for k, values in enumerate(utilities):
        i = chosen[k]
        free &= ~places.overlapping(i)
        comparable = np.flatnonzero(free & (values > -np.inf))
        best = comparable[np.argsort(-values[comparable], kind="stable")[:ALTERNATIVES]]
        left = np.count_nonzero(free & ~np.isnan(values))
        found.append(step(values[i], [replace(units[b], utility=float(values[b])) for b in best], left))
    return found


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def picks_from(
    ask: Ask,
    chosen: Sequence[Candidate],
    runner_up: Candidate | None = None,
    steps: Callable[[], Sequence[Step]] | None = None,
) -> list[Pick]:
    """Picks in the order of `chosen`, each with its rank and a JSON-serialisable reason.

    `steps` is called when the query asks for utilities; without it (nothing was ranked) they are recorded as unknown.
    """
    found = []
    records = [step(None)] * len(chosen) if steps is None or not ask.utilities else steps()
    for rank, (c, record) in enumerate(zip(chosen, records, strict=True), start=1):
        reason: dict[str, Any] = {"rank": rank, "score": c.score, "method": ask.method.name}
        reason["selector"] = ask.method.selector
        if ask.method.uncertainty is not None:
            reason["uncertainty"] = ask.method.uncertainty
            reason["utility"] = _finite(c.utility)
        if runner_up is not None:
            reason["runner_up"] = {
                "image": runner_up.image,
                "start": list(runner_up.start),
                "size": list(runner_up.size),
                "score": runner_up.score,
            }
        reason |= {**c.reason, **({"step": record} if ask.utilities else {})}
        found.append(Pick(c.image, c.start, c.size, ask.method.unit, c.score, rank, reason))
    return found


def class_shares(moments: PosteriorMoments, box: Box, labels: Mapping[str, int]) -> dict[str, float]:
    """Share of the voxels of `box` predicted to be each class, by name if `labels` has one; zeros are left out."""
    names = {0: "background"} | {value: name for name, value in labels.items()}
    cut = triple(a + d for a, d in zip(*box, strict=True))
    slices = (slice(box[0][0], cut[0]), slice(box[0][1], cut[1]), slice(box[0][2], cut[2]))
    shares: NDArray[np.float64] = moments.predicted_fractions(slices)
    return {names.get(c, str(c)): round(float(share), 4) for c, share in enumerate(shares) if share > 0}
