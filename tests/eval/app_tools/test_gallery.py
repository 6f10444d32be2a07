# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from eval.app_tools.gallery import write_gallery
from eval.app_tools.list_methods import methods_json
from eval.benchmarks import BENCHMARKS
from eval.benchmarks.query import aggregation_rows
from lib.querying.methods import REGISTRY


def test_the_page_shows_every_method_and_needs_nothing_else(tmp_path: Path) -> None:
    page = write_gallery(tmp_path / "gallery" / "gallery.html").read_text(encoding="utf-8")
    assert re.findall(r'<h2 id="([^"]+)"', page) == list(REGISTRY)
    assert page.count("data:image/png;base64,") == len(REGISTRY)
    assert "http" not in page.split("base64")[0]


def test_the_listing_is_json() -> None:
    assert [m["name"] for m in json.loads(json.dumps(methods_json()))] == list(REGISTRY)


def test_benchmark_rows_have_what_the_command_prints() -> None:
    assert "query" in BENCHMARKS
    for row in aggregation_rows(np.random.default_rng(0)):
        assert {"name", "ours_s", "reference_s", "ratio", "bar"} <= set(row)
        assert row["ratio"] > 1
