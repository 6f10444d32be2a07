# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Small pools with known predictions, shared by the tests of the query engine."""

from __future__ import annotations

import numpy as np

from lib.querying.selection import PoolImage
from lib.uncertainty import Moments

LABELS = {"background": 0, "one": 1, "two": 2}


class Members:
    """Evidence from member probabilities in memory; counts the reads."""

    def __init__(self, members: dict[str, np.ndarray]) -> None:
        self.members, self.read = members, list[str]()

    def moments(self, image: str) -> Moments:
        self.read.append(image)
        return Moments.from_members(self.members[image])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True)).astype(np.float32)


def world(images: int = 3, shape: tuple[int, int, int] = (14, 12, 10)) -> tuple[list[PoolImage], Members]:
    rng = np.random.default_rng(0)
    probs = {f"case_{i}": softmax(rng.normal(0, 2, (3, 3, *shape))) for i in range(images)}
    pool = [PoolImage(name, shape, taken=(((0, 0, 0), (4, 4, 4)),)) for name in probs]
    return pool, Members(probs)


def hints_for(pool: list[PoolImage]) -> list[dict]:
    return [
        {"image": i.id, "voxel": [6 + 3 * k, 6, 6], "class": c, "area": area}
        for i in pool
        for k, c in enumerate(("background", "one", "two"))
        for area in ("inside", "border")
    ]
