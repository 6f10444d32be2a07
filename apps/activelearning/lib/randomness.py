# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Randomness: child generators keyed by what they are for, never by the order of calls."""

from __future__ import annotations

import hashlib

import numpy as np


def child_seed(seed: int, *keys: object) -> np.random.SeedSequence:
    """SeedSequence of (seed, SHA-256 of the keys): the same keys give the same stream in any process and file order."""
    digest = hashlib.sha256("\x1f".join(str(key) for key in keys).encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.SeedSequence(seed, spawn_key=tuple(words))


def child_rng(seed: int, *keys: object) -> np.random.Generator:
    """Generator of `child_seed(seed, *keys)`."""
    return np.random.default_rng(child_seed(seed, *keys))
