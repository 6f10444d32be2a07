# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from eval.app_tools.reference_pages import (
    PAGES,
    REFERENCE,
    command_names,
    help_of,
    options_table,
    recipes_table,
    written,
)
from eval.metrics.cost import COSTS
from eval.protocol.annotator_profiles import Oracle
from eval.protocol.study import Study
from eval.records.rows import case_rows, round_row
from lib.options import AppOptions


@pytest.mark.parametrize("name", list(PAGES))
def test_the_committed_page_is_written_from_the_code(name: str) -> None:
    page = (REFERENCE / name).read_text(encoding="utf-8")
    assert page == written(page, PAGES[name]()), "run `make reference` and commit the page"


def test_options_have_a_row_with_default_bounds_and_meaning() -> None:
    rows = options_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(AppOptions.model_fields)
    members = AppOptions.model_fields["members"].description
    assert f"| `members` | `5` | ≥ 1, ≤ 50 | {members} |" in rows
    assert any(row.startswith("| `size` | `32,32,32` |") for row in rows)
    assert any(row.startswith("| `auto_rounds` | `false` | `true`, `false` |") for row in rows)
    assert any(row.startswith("| `bundles` |  |  |") for row in rows)


def test_recipes_have_a_row_with_their_choices() -> None:
    rows = recipes_table().splitlines()
    assert any(row.startswith("| `loss` | `dice_ce` | `dice_ce`, `focal`, `weighted_dice` |") for row in rows)
    assert any(row.startswith("| `warmup` |  | ≥ 0, < 1 |") for row in rows)


def test_commands_are_those_of_the_help() -> None:
    assert {"run", "resume", "report", "methods", "doctor", "audit", "backup"} <= set(command_names())
    assert "--dry-run" in help_of("run")
    assert help_of("no-such-command") == ""


def test_only_the_part_between_the_marks_is_written() -> None:
    page = "a\n<!-- begin: written by `make reference` -->\nold\n<!-- end -->\nz\n"
    new = written(page, "new")
    assert new == "a\n<!-- begin: written by `make reference` -->\n\nnew\n\n<!-- end -->\nz\n"
    assert written(new, "new") == new
    with pytest.raises(ValueError, match="lacks its marks"):
        written("a\n", "new")


def names_on(page: str) -> set[str]:
    """Names in backquotes on a page of the reference."""
    return set(re.findall(r"`([\w<>]+)`", Path(REFERENCE / page).read_text(encoding="utf-8")))


def test_the_page_of_studies_has_every_entry_and_profile() -> None:
    names = names_on("studies.md")
    assert set(Study.model_fields) <= names
    assert set(get_args(Oracle.model_fields["profile"].annotation)) <= names
    assert set(Oracle.model_fields) - {"profile"} <= set(
        re.findall(r"\w+", (REFERENCE / "studies.md").read_text(encoding="utf-8"))
    )


def test_the_page_of_metrics_has_every_column() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[1:3, 1:3, 1:3] = 1
    cases = case_rows(label, label, {"a": 1}, (1.0, 1.0, 1.0))
    columns = set(cases[0]) - {"class"}
    region = {"size": (2, 2, 2), "classes": {"a": 8}, "costs": dict.fromkeys(COSTS, 1.0)}
    columns |= {name.replace("_a", "_<class>") for name in round_row([region], cases, ["a"], 8)}
    assert columns <= names_on("metrics.md")
