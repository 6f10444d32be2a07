# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""USIM: uncertainty-guided submodular mutual information, from uncertainties and gradients to a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.selectors.submodular import flqmi

Array = NDArray[np.float64]


def class_weights(frequencies: ArrayLike, background: int | None = 0) -> Array:
    """w_c = 1 / f_c, 0 for the background, normalised to a sum of one (USIM, section 3.3).

    `frequencies` (C,) sums over labelled images the share of their voxels labelled c. A class without labels gets the
    largest weight among the others, where published code divides by zero.

    Raises:
        ValueError: frequencies that are negative or not finite.
    """
    f = np.asarray(frequencies, dtype=np.float64)
    if f.ndim != 1 or not np.isfinite(f).all() or (f < 0).any():
        raise ValueError(f"class frequencies must be finite numbers, none negative, found {f}")
    counted = np.ones(len(f), bool)
    if background is not None:
        counted[background] = False
    seen = counted & (f > 0)
    weights = np.zeros(len(f))
    weights[seen] = 1 / f[seen]
    weights[counted & ~seen] = weights[seen].max() if seen.any() else 1.0
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(f), 1 / len(f))


def elbow(descending: ArrayLike) -> int | None:
    """Rank at the knee of a convex descending curve: argmax of (1 - y) - x, both scaled to [0, 1].

    None where the curve is straight or constant and has no knee (Kneedle's normalised difference; USIM, section 3.3).
    """
    y = np.asarray(descending, dtype=np.float64)
    span = y.max() - y.min() if y.size > 1 else 0.0
    if span <= 0:
        return None
    difference = 1 - (y - y.min()) / span - np.linspace(0, 1, y.size)
    best = int(difference.argmax())
    return best if difference[best] > 1e-9 else None


def kneedle(descending: ArrayLike, sensitivity: float = 10.0) -> int | None:
    """Rank of the knee by Kneedle (Satopaa et al. 2011), as the published pipeline takes it.

    The last local maximum of (1 - y) - x after which the difference falls by sensitivity / (n - 1) before it has a
    minimum; None where there is none. On smooth curves it is `elbow`; on ragged ones it lies later.
    """
    y = np.asarray(descending, dtype=np.float64)
    span = y.max() - y.min() if y.size > 1 else 0.0
    if span <= 0:
        return None
    difference = 1 - (y - y.min()) / span - np.linspace(0, 1, y.size)
    rises = np.append(np.diff(difference) <= 0, True)  # not below the next one
    falls = np.insert(np.diff(difference) >= 0, 0, True)  # not below the one before
    maxima = set(np.flatnonzero(rises & falls).tolist())
    lows = np.append(np.diff(difference) >= 0, True) & np.insert(np.diff(difference) <= 0, 0, True)
    threshold, knee = 0.0, None
    for i in range(y.size - 1):
        if i in maxima:
            threshold, knee = difference[i] - sensitivity / (y.size - 1), i
        elif lows[i]:
            threshold = 0.0
        if knee is not None and difference[i + 1] < threshold:
            return knee if difference[knee] > 1e-9 else None
    return None


def query_set_size(weighted: ArrayLike, batch: int, published: bool = False) -> int:
    """Size of the query set: the knee of the sorted uncertainties, at least 5 batches, at most the pool."""
    u = np.sort(np.asarray(weighted, dtype=np.float64))[::-1]
    knee = kneedle(u) if published else elbow(u)
    return min(max(knee or 0, 5 * batch), u.size)


def fisher_diagonal(gradients: ArrayLike, published: bool = False) -> Array:
    """F_j = mean over samples of g_j^2 (P,), from gradients (N, P) of the log likelihood.

    `published` gives the square of the first sample, which is what ALUNET's code uses.
    """
    g = np.asarray(gradients, dtype=np.float64)
    result: NDArray[np.float64] = np.square(g[0]) if published else np.square(g).mean(axis=0)
    return result


def cosine_similarity(candidates: ArrayLike, queries: ArrayLike) -> Array:
    """Cosine of gradients (U, P) and (Q, P) -> (U, Q); 0 where one has no length."""
    u, q = (_unit_rows(np.asarray(g, dtype=np.float64)) for g in (candidates, queries))
    return np.asarray(u @ q.T)


def fisher_similarity(candidates: ArrayLike, queries: ArrayLike, fisher: ArrayLike, damping: float = 0.0) -> Array:
    """S_uq = (1 / P) sum_j g_u[j] g_q[j] / (F_j + damping).

    Shapes: gradients (U, P) and (Q, P), Fisher diagonal (P,) -> (U, Q).
    """
    g = np.asarray(candidates, dtype=np.float64) / (np.asarray(fisher, dtype=np.float64) + damping)
    return np.asarray(g @ np.asarray(queries, dtype=np.float64).T / g.shape[1])


@dataclass(frozen=True)
class UsimChoice:
    """Chosen candidates, the gain of each, and the query set they are to cover (with repetitions)."""

    indices: NDArray[np.intp]
    gains: Array
    query_set: NDArray[np.intp]


def usim(
    variances: ArrayLike,
    gradients: ArrayLike,
    frequencies: ArrayLike,
    k: int,
    rng: np.random.Generator,
    *,
    kind: str = "c",
    eta: float = 1.0,
    optimizer: str | None = None,
    background: int | None = 0,
    parameters: int = 10_000,
    published: bool = False,
) -> UsimChoice:
    """A batch that is similar in gradient to a sample of the most uncertain candidates.

    Weighted uncertainty is u = sum_c w_c Var_c; |Q| is given by `query_set_size`. X_Q is drawn with replacement, with
    probability u / sum u. Similarity is by cosine (`kind="c"`, the first `parameters` entries) or Fisher (`kind="f"`,
    `parameters` entries drawn in proportion to F, which is taken over 200 draws from u / sum u). Then follows `flqmi`,
    by default lazily below 1,000 candidates and stochastically above. Candidates are processed in the order of their
    mean variance. `published` selects ALUNET's knee and Fisher diagonal (`kneedle`, `fisher_diagonal`).

    Shapes: variances (U, C), gradients (U, P), frequencies (C,).

    Raises:
        ValueError: an unknown kind, or arrays that disagree.
    """
    v, g = np.asarray(variances, dtype=np.float64), np.asarray(gradients)
    if kind not in ("c", "f"):
        raise ValueError(f'USIM is of the kind "c" (cosine) or "f" (Fisher), found {kind!r}')
    if v.ndim != 2 or g.ndim != 2 or len(v) != len(g):
        raise ValueError(f"USIM needs variances (U, C) and gradients (U, P), found {v.shape} and {g.shape}")
    order = np.argsort(-v.mean(axis=1), kind="stable")
    v, g = v[order], g[order]
    u = v @ class_weights(frequencies, background)
    p = u / u.sum() if u.sum() > 0 else np.full(len(u), 1 / len(u))
    size = query_set_size(u, k, published)
    if kind == "c":
        query_set = rng.choice(len(u), size, replace=True, p=p)
        similarity = cosine_similarity(g[:, :parameters], g[query_set, :parameters])
    else:
        sample = rng.choice(len(u), min(200, np.count_nonzero(p)), replace=False, p=p)
        fisher = fisher_diagonal(g[sample], published)
        used = _draw_parameters(fisher, parameters, rng)
        query_set = rng.choice(len(u), size, replace=True, p=p)
        damping = 0.0 if published else 1e-8 * (float(fisher.mean()) or 1.0)
        similarity = fisher_similarity(g[:, used], g[np.ix_(query_set, used)], fisher[used], damping)
    way = optimizer or ("lazy" if len(u) < 1000 else "stochastic")
    indices, gains = flqmi(similarity, k, eta, way, rng)
    return UsimChoice(order[indices], gains, order[query_set])


def _draw_parameters(fisher: Array, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    useful = int(np.count_nonzero(fisher > 1e-20))
    if useful == 0:
        return np.arange(min(count, len(fisher)))
    weights = np.where(fisher > 1e-20, fisher, 0)
    return np.asarray(rng.choice(len(fisher), min(count, useful), replace=False, p=weights / weights.sum()))


def _unit_rows(g: Array) -> Array:
    norms = np.linalg.norm(g, axis=1, keepdims=True)
    return np.divide(g, norms, out=np.zeros_like(g), where=norms > 0)
