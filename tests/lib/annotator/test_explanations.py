# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Pictures are drawn after the request of a region; a request for a picture waits for it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

from lib.annotator.explanations import Explanations
from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.regions import Region


@pytest.fixture
def queries(tmp_path):
    ledger = QueryLedger(tmp_path / "ledger.sqlite")
    asked = [Asked(Region("a", (x, 0, 0), (1, 1, 1)), "patch", 0.5, {"rank": x}) for x in range(2)]
    return ledger.ask("b", "random", 0, asked)


def test_a_picture_that_is_being_drawn_is_waited_for(tmp_path, queries):
    reasons, go = Explanations(tmp_path / "reasons"), threading.Event()

    def draw():
        assert go.wait(20)
        return [np.full((4, 5, 3), 10 * k, np.uint8) for k in range(2)]

    reasons.keep(queries, draw)
    assert reasons.has_picture(queries[1].id)
    threading.Timer(0.05, go.set).start()
    path = reasons.picture(queries[1].id)
    assert path is not None
    assert np.asarray(Image.open(path)).max() == 10
    assert reasons.get(queries[1].id)["reason"] == {"rank": 1}


def test_what_cannot_be_drawn_is_not_there(tmp_path, queries):
    reasons = Explanations(tmp_path / "reasons")

    def draw():
        raise OSError("disk full")

    reasons.keep(queries, draw)
    assert reasons.picture(queries[0].id) is None
    reasons.keep(queries, lambda: [np.zeros((4, 5, 3), np.uint8)] * 2)
    assert reasons.picture(queries[0].id) is not None
    assert not reasons.has_picture(99)
