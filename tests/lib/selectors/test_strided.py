# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Strided blocks by hand."""

from __future__ import annotations

import numpy as np

from lib.selectors.strided import Block, strided_blocks

FREE = {"a": np.ones(6, bool)}
PSEUDO = {"a": np.array([True, True, True, False, False, False])}
SCORES = {"a": np.array([9.0, 9, 9, 1, 1, 1])}


def blocks(*arguments, **keys) -> list[Block]:
    return strided_blocks(*arguments, np.random.default_rng(0), **keys)


def test_thin_blocks_are_single_slices() -> None:
    for thickness in (1, 2):
        found = blocks(FREE, thickness, 3)
        assert [block.thickness for block in found] == [1, 1, 1]
        assert len({block.top for block in found}) == 3


def test_pseudo_labels_are_avoided_unless_told_otherwise() -> None:
    assert blocks(FREE, 3, 2, scores=SCORES, pseudo=PSEUDO) == [Block("a", 5, 3)]
    assert blocks(FREE, 3, 2, scores=SCORES, pseudo=PSEUDO, avoid_pseudo=False) == [Block("a", 2, 3)]
    assert blocks(FREE, 3, 2, scores=SCORES) == [Block("a", 2, 3)]


def test_where_everything_has_pseudo_labels_they_are_taken_up_after_all() -> None:
    everywhere = {"a": np.ones(6, bool)}
    assert blocks(FREE, 3, 2, scores=SCORES, pseudo=everywhere) == [Block("a", 2, 3)]


def test_equal_blocks_come_in_order() -> None:
    free = {scan: np.ones(40, bool) for scan in ("b", "a")}
    scores = {scan: np.zeros(40) for scan in free}
    assert blocks(free, 3, 4, scores=scores) == [Block("a", 2, 3), Block("a", 5, 3)]


def test_a_scan_with_fewer_slices_than_a_block_gives_single_ones() -> None:
    assert blocks({"a": np.ones(2, bool)}, 5, 1)[0].thickness == 1
