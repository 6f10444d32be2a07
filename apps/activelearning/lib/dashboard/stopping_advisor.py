# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Stopping recommendation from the agreement of the model's predictions with the answers, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["continue", "you may stop", "too early to say"]

# With fewer regions, the estimate of the variance between regions is too uncertain to use the batch.
FEWEST_REGIONS = 5
# Exponents c of the fitted curves; 0 is the logarithm, which does not level off.
EXPONENTS = (0.0, 0.5, 1.0)
REPLICATES = 1000

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """One round of answers, whose predictions are those of one model.

    `overlaps_ncv`: shared, predicted and answered voxels per region and class, (N, C, 3). `known`: number of regions in
        the training of the model; `minutes`: minutes of work on them.
    """

    round: int
    known: int
    minutes: float
    overlaps_ncv: NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Estimate:
    """Estimated Dice of a model from one batch, with its interval and the Dice per class (None: not seen)."""

    round: int
    regions: int
    known: int
    minutes: float
    dice: float
    low: float
    high: float
    classes: tuple[float | None, ...]


@dataclass(frozen=True)
class Rules:
    """Parameters of the recommendation.

    `gain`: least useful gain in Dice per batch; `batches`: least number of measured batches; `level`: of intervals.
    """

    gain: float = 0.005
    batches: int = 3
    level: float = 0.9


@dataclass(frozen=True)
class Advice:
    """The verdict, in a sentence, and the predicted gain of the next batch with its interval (None: too few data)."""

    verdict: Verdict
    sentence: str
    gain: float | None = None
    low: float | None = None
    high: float | None = None


def pooled_dice(overlaps_ncv: NDArray[np.integer[Any]]) -> _Floats:
    """D_c = 2 sum_i shared / sum_i (predicted + answered) of every class over regions i, (C,); NaN if not seen.

    Voxels are summed before the division: a region without a class on both sides adds 0, and one with few voxels has a
    small weight. A mean of the regions' own Dice would be dominated by regions with few voxels.
    """
    return _dice(np.asarray(overlaps_ncv, np.float64).sum(axis=0))


def estimate(batch: Batch, rules: Rules, rng: np.random.Generator) -> Estimate | None:
    """Mean over classes of the pooled Dice of one batch, with a percentile interval from reweighted regions.

    None if neither predictions nor answers contain any class.
    """
    classes = pooled_dice(batch.overlaps_ncv)
    if np.all(np.isnan(classes)):
        return None
    dice = float(np.nanmean(classes))
    low, high = _interval(_resampled(batch, dice, rng), dice, rules.level)
    return Estimate(
        round=batch.round,
        regions=len(batch.overlaps_ncv),
        known=batch.known,
        minutes=batch.minutes,
        dice=dice,
        low=max(low, 0.0),
        high=min(high, 1.0),
        classes=tuple(None if np.isnan(value) else float(value) for value in classes),
    )


def advise(
    batches: Sequence[Batch], annotated: int, next_regions: int, rules: Rules, rng: np.random.Generator
) -> Advice:
    """Return whether `next_regions` regions after `annotated` ones are expected to raise the Dice by `rules.gain`.

    Fit q(x) = a + b z_c(x) over regions x, with z_c(x) = (1 - x^-c) / c and z_0 = log x: a power law that levels off,
    or a logarithm. The fit is least squares weighted by regions, for each exponent c of `EXPONENTS`. The gain is q(x +
    n) - q(x), where q never exceeds 1. It is averaged over c with weights exp(-RSS_c / 2 sigma^2), since few batches do
    not distinguish the shapes. Here sigma^2 = max(mean s_b^2, RSS / (B - 2)), and s_b^2 is the sampling variance of
    each of the B batches. The interval is a percentile interval over replicates. In each of them the regions of each
    batch are reweighted, each batch is shifted by tau e, e ~ N(0, 1), tau^2 = sigma^2 - mean s_b^2, and the shape is
    drawn by its weight.
    """
    counted = [b for b in batches if len(b.overlaps_ncv) >= FEWEST_REGIONS and _shows_classes(b)]
    sizes = len({b.known for b in counted})
    if sizes < max(rules.batches, 2):
        return Advice("too early to say", _too_early(sizes, max(rules.batches, 2)))
    observed = np.array([np.nanmean(pooled_dice(b.overlaps_ncv)) for b in counted])
    replicates = np.stack([_resampled(b, d, rng) for b, d in zip(counted, observed, strict=True)], axis=1)
    known = np.array([max(b.known, 1) for b in counted], np.float64)
    weights = np.array([len(b.overlaps_ncv) for b in counted], np.float64)
    span = float(max(annotated, 1)), float(max(annotated, 1) + next_regions)
    gains, losses = _fit(known, observed[None], weights, span)
    sampling = float(replicates.var(axis=0).mean())
    sigma2 = max(sampling, float(losses.min()) / max(len(counted) - 2, 1), 1e-12)
    shapes = np.exp(-(losses[:, 0] - losses.min()) / (2 * sigma2))
    shapes /= shapes.sum()
    replicates = replicates + np.sqrt(max(sigma2 - sampling, 0.0)) * rng.standard_normal(replicates.shape)
    drawn = rng.choice(len(EXPONENTS), size=REPLICATES, p=shapes)
    gain = float(shapes @ gains[:, 0])
    low, high = _interval(_fit(known, replicates, weights, span)[0][drawn, np.arange(REPLICATES)], gain, rules.level)
    return _verdict(gain, low, high, next_regions, rules)


def _verdict(gain: float, low: float, high: float, regions: int, rules: Rules) -> Advice:
    told = (
        f"The next {regions} regions are expected to change the estimated Dice by {gain:+.3f} "
        f"({100 * rules.level:.0f} % interval {low:+.3f} to {high:+.3f})"
    )
    if high < rules.gain:
        sentence = f"{told}: even the upper end is below the {rules.gain:.3f} set as worth a batch."
        return Advice("you may stop", sentence, gain, low, high)
    if gain >= rules.gain:
        return Advice("continue", f"{told}, at least the {rules.gain:.3f} set as worth a batch.", gain, low, high)
    sentence = (
        f"{told}: below the {rules.gain:.3f} set as worth a batch, but the interval still reaches above it. "
        "Another batch will narrow it."
    )
    return Advice("too early to say", sentence, gain, low, high)


def _too_early(found: int, needed: int) -> str:
    return (
        f"{found} of the {needed} batches needed are measured. A batch counts when at least {FEWEST_REGIONS} of its "
        "regions were proposed by a trained model and answered, and differs from others in what its model knew."
    )


def _shows_classes(batch: Batch) -> bool:
    return bool(np.any(batch.overlaps_ncv[..., 1:]))


def _dice(sums_cv: _Floats) -> _Floats:
    total = sums_cv[..., 1] + sums_cv[..., 2]
    return np.where(total > 0, 2 * sums_cv[..., 0] / np.where(total > 0, total, 1), np.nan)


def _resampled(batch: Batch, dice: float, rng: np.random.Generator) -> _Floats:
    """Dice of the batch with its regions weighted anew, (REPLICATES,): the Bayesian bootstrap (Rubin 1981).

    Its weights, uniform on the simplex, leave no region out, so every replicate shows the classes that the batch shows.
    """
    n = len(batch.overlaps_ncv)
    if n < 2:
        return np.full(REPLICATES, dice)
    weights = rng.standard_exponential((REPLICATES, n))
    values = _dice(np.tensordot(weights, batch.overlaps_ncv.astype(np.float64), axes=1))
    shown = ~np.isnan(values[0])
    # With such weights, the variance of a mean is 1 / (n + 1) of the variance of regions; unbiased is 1 / (n - 1).
    spread: _Floats = dice + (values[:, shown].mean(axis=1) - dice) * np.sqrt((n + 1) / (n - 1))
    return spread


def _fit(known: _Floats, dice_rb: _Floats, weights: _Floats, span: tuple[float, float]) -> tuple[_Floats, _Floats]:
    """Gain over `span` and residual sum of squares (mean weight 1), (C, R): every shape fitted to every row."""
    w = weights / weights.sum()
    mean = dice_rb @ w
    gains, losses = [], []
    for c in EXPONENTS:
        z = _curve(known, c)
        centred = z - w @ z
        spread = float(w @ centred**2)
        slope = (dice_rb - mean[:, None]) @ (w * centred) / spread
        start = mean + slope * (_curve(np.array(span[0]), c) - w @ z)
        gain = slope * (_curve(np.array(span[1]), c) - _curve(np.array(span[0]), c))
        gains.append(np.minimum(gain, np.maximum(1 - start, 0)))
        losses.append(((dice_rb - mean[:, None] - slope[:, None] * centred) ** 2) @ w * len(w))
    return np.stack(gains), np.stack(losses)


def _curve(regions: _Floats, c: float) -> _Floats:
    return np.log(regions) if c == 0 else np.asarray((1 - regions**-c) / c)


def _interval(values: _Floats, centre: float, level: float) -> tuple[float, float]:
    """Percentile interval, widened to hold `centre`."""
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return min(float(low), centre), max(float(high), centre)
