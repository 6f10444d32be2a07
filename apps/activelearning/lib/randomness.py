# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Randomness: child generators keyed by their purpose, never by the order of calls."""

from __future__ import annotations

import hashlib

import numpy as np


def child_seed(seed: int, *keys: object) -> np.random.SeedSequence:
    """SeedSequence that depends only on `seed` and `keys`, e.g. (round, method, image).

    The keys, joined as text, are hashed by SHA-256; its eight 32-bit words and the seed are the entropy, so the stream
    is the same in every process and on every platform.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed must be zero or a positive whole number, found {seed}")
    digest = hashlib.sha256("\x1f".join(str(key) for key in keys).encode()).digest()
    words = np.frombuffer(digest, dtype=">u4").astype(np.uint32)
    return np.random.SeedSequence([int(seed), *(int(word) for word in words)])


def child_rng(seed: int, *keys: object) -> np.random.Generator:
    """Generator of `child_seed(seed, *keys)`."""
    return np.random.default_rng(child_seed(seed, *keys))
