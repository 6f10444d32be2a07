# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

from lib.querying.batch_facts import batch_facts
from lib.regions import Region

SHAPES = {"a": (20, 20, 20), "b": (30, 20, 10)}


def region(image: str, start: tuple[int, int, int]) -> Region:
    return Region(image, start, (4, 4, 4))


def test_border_empty_and_images_are_counted() -> None:
    inside = {"predicted": {"background": 0.9, "organ": 0.1}}
    batch = [
        (region("a", (0, 5, 5)), inside),
        (region("a", (5, 5, 5)), {"predicted": {"background": 1.0}}),
        (region("b", (26, 5, 3)), inside),
        (region("b", (5, 5, 3)), inside),
    ]
    facts, sentence = batch_facts(batch, SHAPES)
    assert facts == {"regions": 4, "border": 0.5, "empty": 0.25, "images": {"a": 2, "b": 2}}
    assert sentence is None


def test_more_than_a_third_of_empty_regions_is_said() -> None:
    empty, full = {"predicted": {"background": 1.0}}, {"predicted": {"organ": 1.0}}
    places = [region("a", (5, 5, z)) for z in (1, 6, 11)]
    assert batch_facts(zip(places, (empty, full, full), strict=True), SHAPES)[1] is None
    sentence = batch_facts(zip(places, (empty, empty, full), strict=True), SHAPES)[1]
    assert sentence is not None
    assert sentence.startswith("2 of 3 regions hold no predicted structure; a method with noise (power_pe)")


def test_without_predictions_nothing_is_said_about_structure() -> None:
    facts, sentence = batch_facts([(region("a", (1, 1, 1)), {"rank": 1})], SHAPES)
    assert (facts["empty"], facts["border"], sentence) == (None, 0.0, None)
