# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Greedy selection step by step: the index taken, and the utilities it was taken by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Taken(NamedTuple):
    """One greedy step.

    Args:
        row: index of the row taken.
        utilities: returns the utility of every row at this step, (U,); only valid until the next step. NaN stands for
            a row that was taken before, -inf for one that does not compare with the row taken.
    """

    row: int
    utilities: Callable[[], NDArray[np.floating[Any]]]


Selection = Iterator[Taken]
"""Steps in the order in which rows are taken; utilities cost nothing unless they are called for."""


FeatureSelector = Callable[..., Selection]
"""A selector over features, called with those of the units (U, D), those of the annotated regions (L, D), the number of
units to take, a generator, and the selector's options by name; a row of the registry makes it a query method."""


def indices_of(selection: Iterable[Taken]) -> NDArray[np.intp]:
    """Indices that a selection takes, in its order."""
    return np.array([taken.row for taken in selection], dtype=np.intp)
