# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lib.annotator.captions import cue, position
from lib.ledger.records import Query
from lib.regions import Region

RAS = np.eye(4)
# Stored axes: anterior, superior, left.
TURNED = np.array([[0, 0, -1, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]], dtype=float)
SHAPE = (100, 100, 60)

QUERY = Query(
    id=1, region=Region("case_07", (10, 20, 34), (30, 30, 20)), unit="patch", score=0.4, method="bald", round=1,
    rank=2, batch="b",
    reason={"uncertainty": "bald", "predicted": {"background": 0.5, "Anterior": 0.3, "Posterior": 0.2}},
    status="open", client="ann", leased=None, lease_until=None, opened=None, worked=0, twin=None, note=None,
)  # fmt: skip


def told(**changes):
    return cue(replace(QUERY, **changes), 3, 20, SHAPE, RAS, 0.5)


def test_a_radiologists_line():
    assert told() == "case_07: axial 34-53, region 3 of 20, high disagreement at the anterior/posterior border"


@pytest.mark.parametrize(
    ("start", "size", "affine", "words"),
    [
        ((0, 0, 12), (100, 100, 1), RAS, "axial 12"),
        ((0, 7, 0), (100, 1, 60), RAS, "coronal 7"),
        ((3, 0, 0), (1, 100, 60), RAS, "sagittal 3"),
        ((0, 0, 12), (100, 100, 1), TURNED, "sagittal 12"),
        ((4, 0, 0), (1, 100, 60), TURNED, "coronal 4"),
        ((1, 2, 3), (8, 8, 8), RAS, "axial 3-10"),
        ((1, 2, 3), (8, 8, 8), TURNED, "axial 2-9"),
        ((0, 0, 0), SHAPE, RAS, "whole volume"),
    ],
)
def test_slices_are_named_by_their_plane(start, size, affine, words):
    assert position(Region("a", start, size), SHAPE, affine) == words


def test_an_oblique_scan_is_named_by_the_nearest_plane():
    angle = np.deg2rad(20)
    oblique = np.eye(4)
    oblique[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    assert position(Region("a", (0, 0, 5), (100, 100, 1)), SHAPE, oblique) == "axial 5"


@pytest.mark.parametrize(
    ("score", "uncertainty", "predicted", "words"),
    [
        (0.3, "bald", {"Anterior": 1.0}, "moderate disagreement inside the anterior"),
        (0.1, "predictive_entropy", {"background": 0.9, "Anterior": 0.1}, "low uncertainty at the border of the anterior"),  # noqa: E501
        (0.5, "margin", {"background": 0.99, "Anterior": 0.01}, "high uncertainty in the background"),
        (0.5, "mean_std", {}, "high disagreement"),
    ],
)  # fmt: skip
def test_why_is_told_in_words(score, uncertainty, predicted, words):
    reason = {"uncertainty": uncertainty, "predicted": predicted}
    assert told(score=score, reason=reason).endswith(f"region 3 of 20, {words}")


def test_a_method_without_a_model_gives_no_reason():
    assert told(reason={"selector": "uniform"}) == "case_07: axial 34-53, region 3 of 20"
