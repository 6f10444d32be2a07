# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The facts of a training: files of earlier versions load, broken ones are refused in a sentence."""

from __future__ import annotations

import json

import pytest

from lib.models.checkpoints import FactsError, ModelStore
from lib.models.facts import ModelFacts
from tests.lib.models.facts import RECIPE, facts

# As `current.json` was before plans, weights to begin with and smallest structures were recorded.
OLDER = {
    "digest": "a" * 64,
    "round": 3,
    "bundle": "segmentation_dynunet_3d",
    "members": 5,
    "classes": {"anterior": 1, "posterior": 2},
    "recipe": RECIPE,
    "spacing": [1.0, 1.0, 1.0],
}


def test_a_file_of_an_earlier_version_loads(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "current.json").write_text(json.dumps(OLDER))
    model = ModelStore(tmp_path, "net").current()
    assert (model.digest, model.round, model.folder.name) == ("a" * 64, 3, "a" * 16)
    assert (model.facts.members, model.facts.spacing, model.facts.recipe.patch) == (5, (1, 1, 1), (16, 16, 16))
    assert (model.facts.plan, model.facts.start, model.facts.smallest_mm3) == (None, None, {})


def test_facts_come_back_as_they_were_published(tmp_path):
    store = ModelStore(tmp_path, "net")
    written = facts("b" * 64, start=("a" * 64, 2), smallest_mm3={"organ": 4.5}, spacing=(0.5, 0.5, 2))
    store.save_member(written.digest, 0, {})
    store.publish(written)
    assert store.current().facts == written
    kept = json.loads((store.folder / ("b" * 16) / "facts.json").read_text())
    assert ModelFacts.model_validate(kept["facts"]) == written


def test_broken_facts_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "current.json").write_text(json.dumps({**OLDER, "members": "many"}))
    with pytest.raises(FactsError, match=r"current\.json: expected the facts of a training, got members"):
        ModelStore(tmp_path, "net").current()
