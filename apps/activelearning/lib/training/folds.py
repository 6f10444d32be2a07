# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""k-fold splits over annotated images, so that ensemble members see different data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def training_splits(
    classes_by_case: Mapping[str, frozenset[int]], members: int, folds: int, rng: np.random.Generator
) -> list[list[str]]:
    """Cases each of `members` members trains on: all but fold i modulo `folds`.

    Cases are dealt to folds class by class, the rarest class first, so that a class found in two cases or more is in
    every training split. With one fold, or fewer cases than two, every member trains on all cases. A split that would
    lose a class (it occurs in one case only) or all cases keeps everything instead.

    Source: nnActive specification, section 7 (ensemble): folds over annotated images, rare classes spread first.
    """
    cases = sorted(classes_by_case)
    if folds < 2 or len(cases) < 2:
        return [list(cases) for _ in range(members)]
    held_out = _deal(cases, classes_by_case, folds, rng)
    everything = frozenset().union(*classes_by_case.values())
    splits = []
    for member in range(members):
        kept = [case for case in cases if held_out[case] != member % folds]
        complete = frozenset().union(*(classes_by_case[case] for case in kept)) == everything
        splits.append(kept if kept and complete else list(cases))
    return splits


def _deal(
    cases: Sequence[str], classes_by_case: Mapping[str, frozenset[int]], folds: int, rng: np.random.Generator
) -> dict[str, int]:
    """Fold of each case; folds differ in size by at most one over the cases dealt so far."""
    counts = {c: sum(c in classes_by_case[case] for case in cases) for c in set().union(*classes_by_case.values())}
    order: list[str] = []
    for label in sorted(counts, key=lambda c: (counts[c], c)):
        fresh = [case for case in cases if label in classes_by_case[case] and case not in order]
        order.extend(fresh[i] for i in rng.permutation(len(fresh)))
    rest = [case for case in cases if case not in order]
    order.extend(rest[i] for i in rng.permutation(len(rest)))
    return {case: position % folds for position, case in enumerate(order)}
