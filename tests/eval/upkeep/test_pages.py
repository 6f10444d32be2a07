# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from eval.upkeep import pages
from eval.upkeep.pages import (
    anchors,
    blocks,
    broken_links,
    faults,
    option_names,
    run,
    run_order,
    unknown_options,
    unmarked,
)
from lib.options import AppOptions


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


def marked(page: Path, mark: str, command: str = "true") -> list[str]:
    """Faults of one block with this comment before it."""
    page.write_text(f"{mark}\n```bash\n{command}\n```\n")
    return [fault for block in blocks(page) for fault in unmarked(block)]


def test_the_pages_of_the_project_have_no_fault() -> None:
    found = pages.pages()
    assert len(found) > 40
    assert [fault for path in found for fault in faults(path)] == []


def test_the_tutorial_is_run_first() -> None:
    order = [block.page.name for block in run_order()]
    assert order[0] == "first-study.md"
    assert "run-studies.md" in order


def test_option_names_are_those_of_the_app() -> None:
    assert option_names() == set(AppOptions.model_fields)


def test_a_block_is_found_with_line_and_mark(page: Path) -> None:
    page.write_text("a\n\n<!-- run: yes -->\n```bash\nls\n```\n\n```text\nls\n```\n\n```bash\nmake test\n```\n")
    assert [(b.line, b.mark, b.text) for b in blocks(page)] == [(4, "yes", "ls\n"), (12, "", "make test\n")]


@pytest.mark.parametrize(
    ("mark", "fault"),
    [
        ("", "expected a comment"),
        ("<!-- run: no; because -->", "expected a comment"),
        ("<!-- run: no; tested in tests/a.py -->", "expected a comment"),
        ("<!-- run: no; tested by tests/no_such_test.py -->", "there is no test tests/no_such_test.py"),
        ("<!-- run: no; tested by tests/eval/upkeep/test_pages.py::test_none -->", "has no test test_none"),
        ("<!-- run: no; make nothing -->", "the Makefile has no target 'nothing'"),
    ],
)
def test_a_block_without_a_valid_mark_is_a_fault(page: Path, mark: str, fault: str) -> None:
    found = marked(page, mark)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    "mark",
    [
        "<!-- run: yes -->",
        "<!-- run: no; make demo -->",
        "<!-- run: no; tested by tests/eval/upkeep/test_pages.py, tests/eval/upkeep/test_style.py -->",
        "<!-- run: no; tested by tests/eval/upkeep/test_pages.py::test_the_tutorial_is_run_first -->",
    ],
)
def test_a_valid_mark_passes(page: Path, mark: str) -> None:
    assert marked(page, mark) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("--conf lables a,b", "--conf lables is not an option of the app"),
        ("python -m eval rum study.yaml", "python -m eval rum is not a command"),
        ("python -m eval run study.yaml --dry", "python -m eval run has no option --dry"),
        ("python -m eval run study.yaml \\\n    --force", "python -m eval run has no option --force"),
        ("make everything", "the Makefile has no target 'everything'"),
    ],
)
def test_unknown_options_are_found(text: str, fault: str) -> None:
    assert list(unknown_options(text)) == [fault]


@pytest.mark.parametrize(
    "text",
    [
        "--conf labels a,b",
        "python -m eval run study.yaml --dry-run --calibrate DIR",
        "`python -m eval methods --json` and then `--other`",
        "python -m eval audit DIR      # every label --is read",
        "make demo",
        "They make everything.",
    ],
)
def test_known_options_pass(text: str) -> None:
    assert list(unknown_options(text)) == []


def test_anchors_are_those_of_the_web_host() -> None:
    text = "# A page\n## Options (`--conf NAME VALUE`)\n## [Linked](a.md) title\n## A page\n```\n# no title\n```\n"
    assert anchors(text) == {"a-page", "options---conf-name-value", "linked-title", "a-page-1"}


def test_broken_links_are_found(page: Path) -> None:
    (page.parent / "other.md").write_text("# There\n")
    page.write_text(
        "[a](other.md) [b](other.md#there) [c](other.md#here) [d](none.md) [e](https://x.org) [f](#g) ![h](i.png)\n"
        "`[j](k.md)`\n```\n[l](m.md)\n```\n"
    )
    assert list(broken_links(page)) == [
        "the link other.md#here leads to no heading",
        "the link none.md leads nowhere",
        "the link #g leads to no heading",
        "the link i.png leads nowhere",
    ]


def test_blocks_run_in_their_folder_and_stop_at_the_first_failure(page: Path, tmp_path: Path) -> None:
    page.write_text(
        "<!-- run: yes -->\n```bash\necho a > made\n```\n<!-- run: yes -->\n```bash\nfalse | true\nls\n```\n"
    )
    good, bad = blocks(page)
    assert run(good, tmp_path) >= 0
    assert (tmp_path / "made").read_text() == "a\n"
    with pytest.raises(RuntimeError, match="exit code 1"):
        run(bad, tmp_path)


def test_a_block_that_hangs_is_ended(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LIMIT", 1)
    page.write_text("<!-- run: yes -->\n```bash\nexec sleep 30\n```\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run(next(blocks(page)), tmp_path)
