# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import re
from dataclasses import replace

import pytest

from eval.app_tools.catalogue.facts import FACTS, POSTERIORS, UNCERTAINTIES
from eval.app_tools.catalogue.page import PAGE, PICTURES, ROOT, catalogue, digest, picked
from eval.app_tools.catalogue.pictures import digest_in
from lib.querying.methods import POSTERIORS as KNOWN_POSTERIORS
from lib.querying.registry import REGISTRY
from lib.querying.types import Pick
from lib.uncertainty import SCORE_MAPS


def test_every_registered_method_has_facts_and_no_fact_is_left_over() -> None:
    assert set(FACTS) == set(REGISTRY)
    assert set(UNCERTAINTIES) == set(SCORE_MAPS)
    assert set(POSTERIORS) == set(KNOWN_POSTERIORS)
    for name, facts in FACTS.items():
        assert all(text.strip() for text in facts), name
        assert facts.equation.count("{") == facts.equation.count("}"), name
        assert facts.advice.endswith("."), name


def test_the_readme_counts_the_methods() -> None:
    assert f"{len(REGISTRY)} query methods" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_committed_page_is_that_of_the_registry() -> None:
    assert PAGE.read_text(encoding="utf-8") == catalogue(), "run `make reference` and commit the page"


def test_the_page_has_a_section_and_a_picture_for_every_method() -> None:
    page = catalogue("pictures")
    assert sorted(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == sorted(REGISTRY)
    assert re.findall(r"\(pictures/(\w+)\.png\)", page) == re.findall(r"^### (\w+)$", page, re.MULTILINE)
    section = page.partition("### uss\n")[2].partition("\n### ")[0]
    assert "| composition | `mc_dropout` × `predictive_entropy` × `slice` × `peaks` |" in section
    assert "| source | Chlebus et al. 2022, Uncertain slice sampling, section II.E |" in section
    assert "| needs | a trained model, a network with dropout |" in section
    assert "| `distance` | 5 | 1 to 10,000 | least distance of two peaks in slices |" in section


def test_committed_pictures_are_small_and_show_what_the_methods_pick_today() -> None:
    shown = {path.stem: digest_in(path) for path in PICTURES.glob("*.png")}
    assert shown == {name: digest(picks) for name, picks, _ in picked()}, "run `make reference` and commit the pictures"
    assert max(path.stat().st_size for path in PICTURES.glob("*.png")) < 25_000


@pytest.mark.parametrize("change", [{"rank": 2}, {"image": "b"}, {"start": (1, 0, 0)}, {"size": (2, 2, 3)}])
def test_the_digest_depends_on_rank_image_and_box_and_not_on_the_score(change: dict) -> None:
    first = Pick("a", (0, 0, 0), (2, 2, 2), "patch", score=0.5, rank=1)
    assert digest([first]) == digest([replace(first, score=0.7)])
    assert digest([first]) != digest([replace(first, **change)])
    assert digest([first]) != digest([])
