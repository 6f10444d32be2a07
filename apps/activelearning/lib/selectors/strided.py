# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Strided sampling: blocks of slices of which only the two outer ones are annotated (Burmeister 2022)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Block:
    """Slices `top` down to `top - thickness + 1` of a scan; the first and last are annotated."""

    scan: str
    top: int
    thickness: int

    @property
    def bottom(self) -> int:
        """Lowest slice."""
        return self.top - self.thickness + 1

    @property
    def annotated(self) -> tuple[int, ...]:
        """Slices to annotate: both ends, or the only one."""
        return (self.top,) if self.thickness == 1 else (self.top, self.bottom)

    @property
    def between(self) -> tuple[int, ...]:
        """Slices that get interpolated pseudo labels, from the top."""
        return tuple(range(self.top - 1, self.bottom, -1))


def strided_blocks(
    free: Mapping[str, NDArray[np.bool_]],
    thickness: int,
    budget: int,
    rng: np.random.Generator,
    *,
    scores: Mapping[str, NDArray[np.floating[Any]]] | None = None,
    pseudo: Mapping[str, NDArray[np.bool_]] | None = None,
    avoid_pseudo: bool = True,
) -> list[Block]:
    """Blocks whose annotated slices number at most `budget`, thick ones first, then ever thinner ones.

    All slices of a block are free (one flag per slice and scan). With `avoid_pseudo`, blocks without pseudo labels
    come first. Within a thickness blocks are shuffled, or ranked by the sum of `scores` over their slices, highest
    first. Thickness two is left out, having nothing between its ends. Single slices use up the rest, including an odd
    budget's last slice, where published code stops with an error.

    Raises:
        ValueError: a thickness below one.
    """
    if thickness < 1:
        raise ValueError(f"a block has one slice or more, found {thickness}")
    used = {scan: ~np.asarray(flags, bool) for scan, flags in free.items()}
    chosen: list[Block] = []
    for allow_pseudo in (False, True) if avoid_pseudo and pseudo else (True,):
        for size in [*range(thickness, 2, -1), 1]:
            blocks = _candidates(free, size, None if allow_pseudo else pseudo)
            if scores is None:
                order = np.arange(len(blocks))
                copy.deepcopy(rng).shuffle(order)  # every thickness from the same state, as published
            else:
                worth = [float(scores[b.scan][b.bottom : b.top + 1].sum()) for b in blocks]
                order = np.argsort(-np.array(worth), kind="stable")
            for i in order:
                block = blocks[i]
                if len(block.annotated) > budget:
                    break
                if not used[block.scan][block.bottom : block.top + 1].any():
                    used[block.scan][block.bottom : block.top + 1] = True
                    budget -= len(block.annotated)
                    chosen.append(block)
    return chosen


def _candidates(
    free: Mapping[str, NDArray[np.bool_]], size: int, pseudo: Mapping[str, NDArray[np.bool_]] | None
) -> list[Block]:
    found = []
    for scan in sorted(free):
        open_ = np.array(free[scan], dtype=bool)
        if pseudo is not None and scan in pseudo:
            open_ &= ~np.asarray(pseudo[scan], bool)
        runs = np.convolve(open_, np.ones(size), mode="valid") == size if open_.size >= size else np.zeros(0, bool)
        found += [Block(scan, int(bottom) + size - 1, size) for bottom in np.flatnonzero(runs)]
    return found
