# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A short run of what `python -m eval bench fuzz` does at length, on a real server: never a 5xx, always a sentence."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import psutil
import pytest

from eval.fuzzing.http import Asker, fuzz_bodies, fuzz_openapi, fuzz_uploads, send
from eval.fuzzing.tally import Tally
from tests.system.conftest import Start, fill


@pytest.fixture(scope="module")
def asker(start_server: Start, tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Asker:
    studies = tmp_path_factory.mktemp("fuzz") / "studies"
    fill(studies, phantoms)
    server, client = start_server(studies, members=2, batch=4, size="12,12,12", methods="all", upload_mib=64)
    assert server.process is not None
    return Asker(str(client.http.base_url), psutil.Process(server.process.pid))


def needs_schemathesis() -> None:
    """Skips where it is not installed, but never on CI."""
    if importlib.util.find_spec("schemathesis") is None and not os.environ.get("CI"):
        pytest.skip("schemathesis is not installed; pip install -r requirements-dev.txt")


def check(tally: Tally, cases: int) -> None:
    assert tally.failures == []
    assert (tally.cases, tally.failed) == (cases, 0)
    assert tally.outcomes["4xx"] > tally.cases / 10
    assert tally.outcomes["2xx"] > 0


def test_bodies_of_any_bytes(asker: Asker) -> None:
    check(fuzz_bodies(asker, 200, 21), 200)


def test_damaged_uploads(asker: Asker) -> None:
    check(fuzz_uploads(asker, 150, 22), 150)


def test_numbers_that_json_lacks_are_sent_and_refused(asker: Asker) -> None:
    needs_schemathesis()
    import schemathesis

    operation = schemathesis.openapi.from_url(f"{asker.url}/openapi.json")["/activelearning/{strategy}"]["POST"]
    named = {"path_parameters": {"strategy": "random"}, "media_type": "application/json"}
    answers = [send(operation.Case(**named, body={"batch": batch})) for batch in (float("nan"), float("-inf"))]
    assert [answer.status_code // 100 for answer in answers] == [4, 4]
    assert all(isinstance(answer.json()["detail"], str) for answer in answers)


def test_every_operation_of_the_description(asker: Asker) -> None:
    needs_schemathesis()
    check(fuzz_openapi(asker, 470, 23), 470)
