# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json

from eval.reporting.query_reasons import reasons_of, sentence
from eval.runner.query_pictures import keep_pictures

REGION = {
    "query": 7,
    "image": "case_3",
    "start": [1, 2, 3],
    "size": [4, 4, 4],
    "score": 0.51234,
    "reason": {
        "rank": 2,
        "uncertainty": "predictive_entropy",
        "predicted": {"background": 0.75, "anterior": 0.25},
        "runner_up": {"image": "case_9", "start": [0, 0, 0], "size": [4, 4, 4], "score": 0.5},
    },
}


def test_the_sentence_says_what_the_server_said():
    assert sentence(REGION) == (
        "case_3 at (1, 2, 3), rank 2; predictive entropy 0.512; predicted background 75 %, anterior 25 %; "
        "next best case_9 with 0.500"
    )
    assert sentence({**REGION, "reason": {"rank": 1, "area": "border"}}) == "case_3 at (1, 2, 3), rank 1; area border"
    assert sentence({**REGION, "reason": None}) == "case_3 at (1, 2, 3), rank ?"


class Server:
    def picture(self, query):
        return b"picture" if query == 7 else None


def test_pictures_are_kept_where_there_are_any_and_shown_for_the_last_round(tmp_path):
    cell = tmp_path / "cells" / "power_pe_s1"
    other = {**REGION, "query": 8, "reason": {}}
    keep_pictures(Server(), [REGION, other], cell / "pictures")
    assert [p.name for p in (cell / "pictures").iterdir()] == ["7.png"]
    steps = {"0.query": {"regions": [other]}, "1.query": {"regions": [REGION, other]}}
    (cell / "state.json").write_text(json.dumps({"steps": steps}))
    rows = reasons_of(tmp_path, pictures=True)
    assert [(r["cell"], r["round"], r["picture"]) for r in rows] == [
        ("power_pe_s1", 1, "data:image/png;base64,cGljdHVyZQ=="),
        ("power_pe_s1", 1, None),
    ]
    assert [r["picture"] for r in reasons_of(tmp_path, pictures=False)] == [None, None]
