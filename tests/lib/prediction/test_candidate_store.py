# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import math

import pytest

from lib.prediction.candidate_store import SummaryFile
from lib.querying.candidate_cache import Head, ImageCandidates
from lib.querying.types import Candidate


def summary(best=0.5):
    candidate = Candidate("a", (1, 2, 3), (4, 4, 4), 0.4, best, {"stream": "pe"})
    return ImageCandidates(Head("none", best, best), (((0, 0, 0), (2, 2, 2)),), (candidate,), True)


def test_what_is_kept_comes_back(tmp_path):
    store = SummaryFile(tmp_path / "m" / "s.sqlite", dict.fromkeys("ab", "digest"))
    store.save("k", "a", summary())
    store.save("k", "b", summary(-math.inf))
    assert SummaryFile(store.path, dict.fromkeys("ab", "digest")).load("k", "a") == summary()
    assert store.heads("k") == {"a": Head("none", 0.5, 0.5), "b": Head("none", -math.inf, -math.inf)}
    assert store.heads("other") == {}
    with pytest.raises(KeyError):
        store.load("k", "c")


def test_a_newer_summary_replaces_the_older(tmp_path):
    store = SummaryFile(tmp_path / "s.sqlite", dict.fromkeys("ab", "digest"))
    store.save("k", "a", summary())
    store.save("k", "a", summary(0.9))
    assert store.load("k", "a").head.best == 0.9


def test_summaries_of_changed_or_vanished_images_are_not_found(tmp_path):
    store = SummaryFile(tmp_path / "s.sqlite", {"a": "1", "b": "1"})
    store.save("k", "a", summary())
    store.save("k", "b", summary())
    assert list(SummaryFile(store.path, {"a": "2", "b": "1"}).heads("k")) == ["b"]
    assert SummaryFile(store.path, {"a": "2"}).heads("k") == {}
