# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Streamed moments of a posterior and the voxel uncertainties that follow from them.

Axes: m members, c classes (background included), x y z voxels. Natural logarithm, 0 log 0 = 0; never negative or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float32]

SLAB = 3 << 17  # values worked on at once: a slab of every class and its logarithm stay in the cache
_TINY = float(np.finfo(np.float32).tiny)  # log of it is finite, so 0 * log(max(0, tiny)) is 0
_ABOVE_ONE = 1e-3  # slack for softmax computed in half precision


class PosteriorMoments(Protocol):
    """Moments of an image's posterior as read by a query, independently of their storage.

    `Moments` holds them in memory, `lib.prediction.moments_archive.ArchivedMoments` on disk.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Classes, X, Y, Z."""
        ...

    @property
    def count(self) -> int:
        """Posterior members."""
        ...

    def voxelwise(self, read: Callable[[Moments], NDArray[Any]]) -> NDArray[Any]:
        """The map (X, Y, Z) that `read` makes voxel by voxel of moments in memory."""
        ...

    def mean_of(self, c: int) -> Array:
        """Mean probability of class `c` (X, Y, Z)."""
        ...

    def variance_of(self, c: int, ddof: int = 1) -> Array:
        """Variance of class `c` over members (X, Y, Z)."""
        ...

    def learning_loss(self) -> Array:
        """Loss (X, Y, Z) that the members' heads predict."""
        ...

    def predicted(self) -> NDArray[np.uint8]:
        """Most probable class (X, Y, Z)."""
        ...

    def predicted_fractions(self, box: tuple[slice, slice, slice]) -> NDArray[np.float64]:
        """Share of the voxels of `box` for which each class is the most probable one, (C,)."""
        ...


class RunningMoments:
    """Sums over posterior members p[m,c,x,y,z], one member at a time; `finished` gives their moments.

    Kept in float32, on the device of the first member: sum_m p (C,X,Y,Z); the spread sum_m (p - mean)^2 (C,X,Y,Z),
    updated by Welford's rule, which does not cancel; and sum_m H(p_m) (X,Y,Z), with H the entropy over classes.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        """Empty sums for members of `shape` (C, X, Y, Z).

        Raises:
            ValueError: not four axes.
        """
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"a member has four axes (class, x, y, z), found the shape {tuple(shape)}")
        self.shape: tuple[int, int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3]))
        self.count = 0
        self._sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def add(self, probs_cxyz: ArrayLike | torch.Tensor) -> None:
        """Take one more member (C, X, Y, Z) into the sums.

        Raises:
            ValueError: another shape, or a value that is NaN, infinite, negative or above one.
        """
        probs = _tensor(probs_cxyz)
        if tuple(probs.shape) != self.shape:
            raise ValueError(f"every member must have the shape {self.shape}, found {tuple(probs.shape)}")
        _check(probs)  # before anything changes: a refused member leaves the sums as they were
        if self._sums is None:
            total, spread = (torch.zeros(self.shape, device=probs.device) for _ in range(2))
            self._sums = total, spread, torch.zeros(self.shape[1:], device=probs.device)
        n, sums = self.count, self._sums
        probs, total, spread = (a.view(self.shape[0], -1) for a in (probs.to(sums[0].device), sums[0], sums[1]))
        entropy = sums[2].view(-1)
        for part in _slabs(probs):
            p, t = probs[:, part], total[:, part]
            entropy[part] -= _p_log_p(p).sum(0).clamp_(max=0)
            if n:
                delta = torch.sub(p, t, alpha=1 / n)
                spread[:, part].addcmul_(delta, delta, value=n / (n + 1))
            t += p
        self.count = n + 1

    def finished(self, loss_xyz: Array | None = None) -> Moments:
        """Moments of the members so far, with the loss their heads predict where they have such heads.

        Raises:
            ValueError: no member.
        """
        if self._sums is None:
            raise ValueError("moments need at least one posterior member, found none: predict with the model first")
        total, spread, entropy = (values.cpu().numpy() for values in self._sums)
        return Moments(total, spread, entropy, self.count, loss_xyz)


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments in memory of M posterior members: the input of every uncertainty, without the stack itself.

    Args:
        total_cxyz: sum_m p, float32.
        spread_cxyz: sum_m (p - mean)^2, float32.
        entropy_xyz: sum_m H(p_m), float32, nats.
        count: M.
        loss_xyz: predicted loss of members that have a head for it.
    """

    total_cxyz: Array
    spread_cxyz: Array
    entropy_xyz: Array
    count: int
    loss_xyz: Array | None = None

    @classmethod
    def from_members(cls, members: Iterable[ArrayLike | torch.Tensor], loss_xyz: Array | None = None) -> Moments:
        """Moments of all `members`, arrays or tensors (C, X, Y, Z) of probabilities, taken one at a time.

        Raises:
            ValueError: no member, differing shapes, or a value that is not a probability.
        """
        running: RunningMoments | None = None
        for member in members:
            probs = member if isinstance(member, torch.Tensor) else np.asarray(member, dtype=np.float32)
            running = running or RunningMoments(probs.shape)
            running.add(probs)
        return (running or RunningMoments((1, 1, 1, 1))).finished(loss_xyz)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Moments:
        """Moments as `to_arrays` gave them.

        Raises:
            ValueError: an array is missing or has another shape.
        """
        missing = {"sum", "spread", "entropy", "count"} - set(arrays)
        if missing:
            raise ValueError(f"stored moments lack {sorted(missing)}: delete this cache entry and score again")
        total, spread, entropy = (np.asarray(arrays[name], np.float32) for name in ("sum", "spread", "entropy"))
        if spread.shape != total.shape or entropy.shape != total.shape[1:]:
            raise ValueError("stored moments disagree in shape: delete this cache entry and score again")
        loss = np.asarray(arrays["learning_loss"], np.float32) if "learning_loss" in arrays else None
        return cls(total, spread, entropy, int(arrays["count"]), loss)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for a cache: `sum` and `spread` (C,X,Y,Z), `entropy` (X,Y,Z), all float32, and `count`."""
        stored: dict[str, NDArray[np.generic]] = {
            "sum": self.total_cxyz,
            "spread": self.spread_cxyz,
            "entropy": self.entropy_xyz,
            "count": np.array(self.count),
        }
        return stored | ({} if self.loss_xyz is None else {"learning_loss": self.loss_xyz})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Classes, X, Y, Z."""
        c, x, y, z = self.total_cxyz.shape
        return c, x, y, z

    def voxelwise(self, read: Callable[[Moments], NDArray[Any]]) -> NDArray[Any]:
        """The map (X, Y, Z) that `read` makes of these moments."""
        return read(self)

    def learning_loss(self) -> Array:
        """Loss (X, Y, Z) that the members' heads predict; it comes with the moments, not from the probabilities.

        Raises:
            ValueError: the members were trained without such a head.
        """
        return predicted_loss(self.loss_xyz)

    @property
    def mean(self) -> Array:
        """Mean probability (C, X, Y, Z): (1/M) sum_m p."""
        return np.asarray(self.total_cxyz / np.float32(self.count))

    def predictive_entropy(self) -> Array:
        """Entropy of the mean (X, Y, Z), in nats: -sum_c mean log mean."""
        return _entropy_of_sum(self.total_cxyz, self.count)

    def expected_entropy(self) -> Array:
        """Mean entropy of the members (X, Y, Z), in nats: -(1/M) sum_m sum_c p log p."""
        return np.asarray(self.entropy_xyz / np.float32(self.count))

    def mutual_information(self) -> Array:
        """Predictive minus expected entropy (X, Y, Z), clipped at 0: BALD, the Jensen-Shannon divergence of members."""
        information = self.predictive_entropy() - self.expected_entropy()
        return np.maximum(information, 0, out=information)

    def class_variance(self, ddof: int = 1) -> Array:
        """Variance of each class over members (C, X, Y, Z); 0 where there are too few members for `ddof`."""
        return np.asarray(self.spread_cxyz / np.float32(max(self.count - ddof, 1)))

    def mean_std(self) -> Array:
        """Mean over classes of the standard deviation over members (ddof 0), (X, Y, Z); USIM, Mean STD."""
        out = np.zeros(self.shape[1:], np.float32)
        for spread_xyz in self.spread_cxyz:
            out += np.sqrt(spread_xyz / np.float32(self.count))
        return np.asarray(out / np.float32(self.shape[0]))

    def mean_variance(self) -> Array:
        """Mean over classes of the variance over members (ddof 1), (X, Y, Z); Mean STD in ALUNET's code."""
        return np.asarray(self.class_variance(ddof=1).mean(axis=0))

    def least_confidence(self) -> Array:
        """1 - max_c mean (X, Y, Z)."""
        return np.asarray(np.maximum(1 - self.mean.max(axis=0), 0))

    def margin(self) -> Array:
        """1 - (p1 - p2) of the two largest class means (X, Y, Z): high where they are close; 0 for a single class."""
        if self.shape[0] == 1:
            return np.zeros(self.shape[1:], np.float32)
        top = np.partition(self.mean, self.shape[0] - 2, axis=0)[-2:]
        return np.asarray(np.clip(1 - (top[1] - top[0]), 0, None))

    def mean_of(self, c: int) -> Array:
        """Mean probability of class `c` (X, Y, Z)."""
        return np.asarray(self.total_cxyz[c] / np.float32(self.count))

    def variance_of(self, c: int, ddof: int = 1) -> Array:
        """Variance of class `c` over members (X, Y, Z); 0 where there are too few members for `ddof`."""
        return np.asarray(self.spread_cxyz[c] / np.float32(max(self.count - ddof, 1)))

    def predicted_fractions(self, box: tuple[slice, slice, slice]) -> NDArray[np.float64]:
        """Share of the voxels of `box` for which each class is the most probable one, (C,)."""
        winners = self.total_cxyz[(slice(None), *box)].argmax(axis=0)
        shares: NDArray[np.float64] = np.bincount(winners.ravel(), minlength=self.shape[0]) / max(winners.size, 1)
        return shares

    def predicted(self) -> NDArray[np.uint8]:
        """Most probable class (X, Y, Z), argmax_c mean; the lowest class among equals."""
        return np.asarray(self.total_cxyz.argmax(axis=0), np.uint8)


def predicted_loss(loss_xyz: Array | None) -> Array:
    """Return `loss_xyz`.

    Raises:
        ValueError: it is None.
    """
    if loss_xyz is None:
        raise ValueError("the members predict no loss: train with learning_loss above 0 and score again")
    return loss_xyz


def mixed_entropy(moments: Moments, alpha: float = 0.5) -> Array:
    """`alpha H(mean) + (1 - alpha) mean H` (X, Y, Z), computed by StochasticBatchAL's code under the name JSD."""
    a = np.float32(alpha)
    return np.asarray(a * moments.predictive_entropy() + (1 - a) * moments.expected_entropy())


def distance_to_uniform(moments: Moments) -> Array:
    """sum_c |1/C - mean_c| (X, Y, Z): small where the classes are balanced (Burmeister 2022, least confidence)."""
    return np.asarray(np.abs(moments.mean - np.float32(1 / moments.shape[0])).sum(axis=0))


def burmeister_confidence(moments: Moments) -> Array:
    """2 (C-1)/C - sum_c |1/C - mean_c| (X, Y, Z): Burmeister's least confidence turned so that high is unsure."""
    most = np.float32(2 * (moments.shape[0] - 1) / moments.shape[0])
    return np.asarray(np.maximum(most - distance_to_uniform(moments), 0))


def burmeister_entropy(moments: Moments) -> Array:
    """sum_c (1/e + d log d) with d = |1/C - mean_c| (X, Y, Z), as published by Burmeister 2022; high values are chosen
    first.

    It is not Shannon entropy: d log d falls until d = 1/e and rises again. The term 1/e per class keeps it from being
    negative.
    """
    d = torch.from_numpy(moments.mean).sub_(1 / moments.shape[0]).abs_()
    return np.asarray((_p_log_p(d) + float(np.exp(-1))).clamp_(min=0).sum(0).numpy())


UNCERTAINTIES: dict[str, Callable[[Moments], Array]] = {
    "predictive_entropy": lambda moments: moments.predictive_entropy(),
    "expected_entropy": Moments.expected_entropy,
    "bald": Moments.mutual_information,
    "mean_std": Moments.mean_std,
    "mean_variance": Moments.mean_variance,
    "least_confidence": Moments.least_confidence,
    "margin": Moments.margin,
    "mixed_entropy": mixed_entropy,
    "burmeister_confidence": burmeister_confidence,
    "burmeister_entropy": burmeister_entropy,
}
"""Maps that follow from the members' probabilities."""

SCORE_MAPS: tuple[str, ...] = (*UNCERTAINTIES, "learning_loss")
"""Every map that units can be ranked by."""


def score_map_of(name: str, moments: PosteriorMoments) -> Array:
    """The map (X, Y, Z) of that name, whether the moments are in memory or on disk."""
    if name == "learning_loss":
        return moments.learning_loss()
    return moments.voxelwise(UNCERTAINTIES[name])


def _tensor(values: ArrayLike | torch.Tensor) -> torch.Tensor:
    """Contiguous float32 on the same memory where that is possible, and on the same device."""
    if isinstance(values, torch.Tensor):
        return values.detach().to(torch.float32).contiguous()
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _by_class(values_cxyz: Array) -> torch.Tensor:
    """View (C, voxels) on the same memory where the array is contiguous."""
    return _tensor(values_cxyz).view(values_cxyz.shape[0], -1)


def _slabs(values: torch.Tensor) -> list[slice]:
    """Cuts of the voxels of a tensor (C, voxels) that fit into the cache of a CPU; a GPU takes all at once."""
    voxels = values.shape[1]
    step = max(SLAB // values.shape[0], 1 << 12) if values.device.type == "cpu" else voxels
    return [slice(a, a + step) for a in range(0, voxels, step)]


def _p_log_p(p: torch.Tensor) -> torch.Tensor:
    return p.clamp(min=_TINY).log_().mul_(p)


def _check(p: torch.Tensor) -> None:
    low, high = (float(v) for v in torch.aminmax(p))
    if not (low >= 0 and high <= 1 + _ABOVE_ONE):  # NaN fails both
        what = "a value that is not a number" if np.isnan(low) else f"values from {low:.4g} to {high:.4g}"
        raise ValueError(f"members must hold probabilities from 0 to 1, found {what}: give softmax output, not logits")


def _entropy_of_sum(total_cxyz: Array, count: int) -> Array:
    out = np.empty(total_cxyz.shape[1:], np.float32)
    flat, total = torch.from_numpy(out).view(-1), _by_class(total_cxyz)
    for part in _slabs(total):
        torch.clamp(_p_log_p(total[:, part] / count).sum(0).neg_(), min=0, out=flat[part])
    return out
