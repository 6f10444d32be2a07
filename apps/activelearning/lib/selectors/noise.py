# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Noise on scores that turns greedy selection into sampling, and the schedules of its strength."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def power(scores: ArrayLike, beta: float, rng: np.random.Generator) -> Array:
    """log(score) + Gumbel(0, 1/beta), one draw per position; NaN and scores of zero or below give -inf.

    The best k are then a sample without replacement with probability proportional to score^beta (Kirsch et al.,
    Stochastic batch acquisition; nnActive, section 4).

    Raises:
        ValueError: beta not above zero.
    """
    values = np.asarray(scores, dtype=np.float64)
    noise = _gumbel(values.shape, beta, rng)
    positive = values > 0
    return np.asarray(np.log(values, out=np.full(values.shape, -np.inf), where=positive) + noise)


def softrank(scores: ArrayLike, beta: float, rng: np.random.Generator) -> Array:
    """-log(rank) + Gumbel(0, 1/beta) with rank 1 for the highest score, in the order of `scores` (nnActive, section 4).

    Equal scores keep their order. The draws are taken in the order of rank.

    Raises:
        ValueError: beta not above zero.
    """
    values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-values, axis=None, kind="stable")
    soft = np.empty(values.size)
    soft[order] = -np.log(np.arange(1, values.size + 1)) + _gumbel((values.size,), beta, rng)
    return soft.reshape(values.shape)


def _gumbel(shape: tuple[int, ...], beta: float, rng: np.random.Generator) -> Array:
    if not beta > 0:
        raise ValueError(f"the noise parameter beta must be above zero, found {beta}")
    return np.asarray(rng.gumbel(0.0, 1.0 / beta, size=shape))


def constant_schedule(rounds: int, first: float, last: float) -> Array:
    """`first` in every one of `rounds` rounds."""
    return np.full(rounds, float(first))


def exponential_schedule(rounds: int, first: float, last: float) -> Array:
    """beta_k = first (last / first)^(k / (rounds - 1)), k = 0 .. rounds - 1 (ClaSP PE)."""
    return np.asarray(first * (last / first) ** (np.arange(rounds) / max(rounds - 1, 1)))


def sigmoid_schedule(rounds: int, first: float, last: float, temperature: float = 2.0) -> Array:
    """Schedule of a value over `rounds` rounds, from `first` to `last` along a sigmoid.

    `first + (last - first) (s - min s)/(max s - min s)`, s = 1/(1 + exp(-x/temperature)), x even over [-6, 6].
    Temperature 2 is the smooth and 0.5 the sharp schedule of the ClaSP PE ablation.
    """
    if rounds < 2:
        return np.full(rounds, float(first))
    s = 1 / (1 + np.exp(-np.linspace(-6, 6, rounds) / temperature))
    return np.asarray(first + (last - first) * (s - s.min()) / (s.max() - s.min()))


SCHEDULES: dict[str, Callable[[int, float, float], Array]] = {
    "constant": constant_schedule,
    "exponential": exponential_schedule,
    "sigmoid": sigmoid_schedule,
    "sharp_sigmoid": lambda rounds, first, last: sigmoid_schedule(rounds, first, last, temperature=0.5),
}


def beta_at(schedule: str, round_: int, rounds: int, first: float, last: float) -> float:
    """Beta of query `round_` (0 for the first one) in a plan of `rounds` rounds; the last value holds beyond it.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, found {schedule!r}")
    values = SCHEDULES[schedule](max(rounds, 1), first, last)
    return float(values[min(max(round_, 0), len(values) - 1)])
