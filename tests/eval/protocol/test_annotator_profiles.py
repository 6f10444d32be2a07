# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Oracle profiles: the permitted changes of each, and their dependence on (seed, query) only."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from eval.errors import RefereeError
from eval.protocol.annotator_profiles import UNLABELLED, Oracle, answers, paint
from eval.protocol.study import load_study
from eval.runner.run import Options, start_run

HOW = {"foreground": {"head": 1, "tail": 2}, "spacing": (1.0, 1.0, 2.0)}
PROFILES = ["perfect", "boundary_noisy", "missing_small", "partly_finished", "late", "class_confusion"]
REGION = {"query": 3, "image": "scan", "start": [3, 2, 1], "size": [14, 12, 8]}


def scene():
    label = np.zeros((20, 16, 12), dtype=np.uint8)
    label[4:12, 4:12, 2:8] = 1
    label[12:15, 4:12, 2:8] = 2
    label[17, 14, 10] = label[6, 13, 7] = 2  # two small objects; the second lies in the region
    return label


def painted(oracle, seed=1, region=REGION):
    return paint(scene(), region, oracle, seed, **HOW)


def truth():
    return scene()[3:17, 2:14, 1:9]


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), query=st.integers(1, 99))
def test_seed_and_query_decide(profile, seed, query):
    oracle, region = Oracle(profile=profile), {**REGION, "query": query}
    first, again = painted(oracle, seed, region), painted(oracle, seed, region)
    np.testing.assert_array_equal(first, again)
    assert first.shape == truth().shape
    assert set(np.unique(first)) <= {0, 1, 2, UNLABELLED}
    other = {**REGION, "query": query + 1, "start": [0, 0, 0], "size": [3, 16, 12]}
    both = answers(scene(), [other, region], oracle, seed, **HOW)
    np.testing.assert_array_equal(both[3:17, 2:14, 1:9], first)  # another region in the same answer changes nothing
    assert not both[17:].any()


@pytest.mark.parametrize(
    "harmless",
    [
        {"profile": "perfect"},
        {"profile": "late"},
        {"profile": "boundary_noisy", "amplitude": 0},
        {"profile": "missing_small", "smallest": 0},
        {"profile": "partly_finished", "done": 1},
        {"profile": "class_confusion", "share": 0},
    ],
)
def test_profiles_without_an_error_paint_the_truth(harmless):
    np.testing.assert_array_equal(painted(Oracle(**harmless)), truth())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), amplitude=st.floats(0.1, 0.5))
def test_noise_changes_voxels_near_borders_only(seed, amplitude):
    noisy = painted(Oracle(profile="boundary_noisy", amplitude=amplitude), seed)
    whole = scene()
    border = np.zeros(whole.shape, dtype=bool)
    for axis in range(3):
        change = np.diff(whole.astype(int), axis=axis) != 0
        padding = [(0, 0)] * 3
        padding[axis] = (0, 1)
        border |= np.pad(change, padding)
    near = binary_dilation(border, np.ones((3, 3, 3)), iterations=3)[3:17, 2:14, 1:9]
    assert not (noisy != truth())[~near].any()


def test_more_noise_is_more_error():
    wrong = [(painted(Oracle(profile="boundary_noisy", amplitude=a)) != truth()).mean() for a in (0.5, 2.0)]
    assert 0 < wrong[0] < wrong[1]


def test_small_objects_are_missed_as_a_whole():
    kept = painted(Oracle(profile="missing_small", smallest=10, share=1))
    expected = truth().copy()
    expected[3, 11, 6] = 0  # 1 voxel, 2 mm^3
    np.testing.assert_array_equal(kept, expected)


def test_unfinished_regions_stay_unlabelled_or_become_background():
    for rest, value in (("unlabelled", UNLABELLED), ("background", 0)):
        begun = painted(Oracle(profile="partly_finished", share=1, done=0.5, rest=rest))
        np.testing.assert_array_equal(begun[..., :4], truth()[..., :4])
        assert (begun[..., 4:] == value).all()


def test_classes_are_taken_for_each_other():
    confused = painted(Oracle(profile="class_confusion", share=1))
    np.testing.assert_array_equal(confused, np.array([0, 2, 1], dtype=np.uint8)[truth()])
    with pytest.raises(RefereeError, match="two or more foreground classes"):
        paint(scene(), REGION, Oracle(profile="class_confusion"), 1, foreground={"head": 1}, spacing=(1, 1, 1))


@pytest.mark.parametrize("late_by", ["round", "lease"])
def test_late_answers_come_a_round_later_or_after_their_lease(write_study, stand_in, tmp_path, monkeypatch, late_by):
    servers = []
    start = stand_in.start
    monkeypatch.setattr(stand_in, "start", lambda self, seconds=10: (servers.append(self), start(self))[1])
    oracle = {"profile": "late", "share": 1.0, "late_by": late_by, "lease_minutes": 0.001}
    start_run(load_study(write_study(methods=["random"], oracle=oracle)), tmp_path / "out", Options(quiet=True))
    asked = pd.read_csv(tmp_path / "out" / "queries.csv")
    answered = servers[0].memory["answered"]
    # Round 0 is answered at once; of three rounds the last one's late answers never come.
    last = 1 if late_by == "round" else 2
    assert answered == asked[asked["round"] <= last]["query"].tolist()


def test_unknown_profiles_and_options_are_refused(write_study):
    with pytest.raises(RefereeError, match=r"oracle\.profile"):
        load_study(write_study(oracle="careless"))
    with pytest.raises(RefereeError, match="oracle"):
        load_study(write_study(oracle={"profile": "late", "delay": 3}))
