# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Facts of a training for tests that need a model on disk and no network."""

from __future__ import annotations

from lib.models.facts import ModelFacts
from lib.models.recipe import Recipe

RECIPE = {
    "patch": [16, 16, 16], "batch": 2, "steps": 20, "learning_rate": 0.001, "weight_decay": 0.01, "warmup": 0.1,
    "clip": 1.0, "foreground": 0.5,
}  # fmt: skip


def facts(digest, **changes):
    """Facts of a training in round 0 with one member and one class, but for `changes`."""
    known = {
        "digest": digest,
        "round": 0,
        "bundle": "net",
        "members": 1,
        "classes": {"organ": 1},
        "recipe": Recipe(**RECIPE),
    }
    return ModelFacts(**{**known, **changes})
