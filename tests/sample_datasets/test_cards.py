# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cards: one per dataset, with the facts that its use requires."""

from pathlib import Path

import pytest

CARDS = Path(__file__).resolve().parents[2] / "sample-datasets" / "cards"


def test_every_dataset_has_a_card(phantoms, fetch):
    wanted = {f"phantom_{name}" for name in phantoms.PRESETS} | {task.lower() for task in fetch.TASKS}
    assert {path.stem for path in CARDS.glob("*.md")} == wanted | {"acdc", "amos", "kits"}


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_a_card_names_source_licence_classes_size_and_split(path):
    rows = [line.split("|")[1].strip() for line in path.read_text().splitlines() if line.startswith("|")]
    assert {"source", "licence", "classes", "size", "split"} <= set(rows)


def test_classes_on_the_cards_are_those_of_the_presets(phantoms):
    for name, preset in phantoms.PRESETS.items():
        text = (CARDS / f"phantom_{name}.md").read_text()
        assert all(label in text for label in preset.labels), name
