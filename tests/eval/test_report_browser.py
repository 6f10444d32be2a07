# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The report in a headless browser: every figure decodes and every table has rows."""

import pytest

from eval.__main__ import main
from eval.protocol.study import load_study
from eval.runner.run import Options, start_run
from tests.browser import started_browser

COUNT = """() => ({
 broken: [...document.images].filter(i => !i.naturalWidth).length,
 images: [...document.images].map(i => i.id || i.className || "other"),
 rows: Object.fromEntries([...document.querySelectorAll("table")].map(t => [t.id, t.tBodies[0].rows.length])),
 remote: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length})"""


@pytest.mark.usefixtures("chromium")
def test_figures_and_tables_are_there(write_study, stand_in, tmp_path):
    out = tmp_path / "out"
    study = write_study(rounds=2, seeds=[1, 2, 3], full_data=True, published="nnactive/hippocampus/low")
    start_run(load_study(study), out, Options(workers=2, quiet=True))
    assert main(["report", str(out), "--claim"]) == 0
    with started_browser() as browser:
        page = browser.new_page()
        page.goto((out / "report.html").as_uri(), wait_until="load")
        found = page.evaluate(COUNT)
    assert found["broken"] == 0
    assert found["remote"] == 0
    assert {"curves", "costs", "penalty", "classes", "distances", "share", "regions"} <= set(found["images"])
    rows = found["rows"]
    assert rows["summary"] == 3
    assert rows["areas"] == rows["ranks"] == rows["tails"] - 1 == rows["seconds"] - 1 == 2
    assert rows["published"] >= 4
