# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A short run of the cases of `python -m eval bench fuzz` on a real server: no 5xx, always a sentence."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import psutil
import pytest

from eval.fuzzing.http import Asker, fuzz_bodies, fuzz_openapi, fuzz_uploads, send
from eval.fuzzing.tally import Tally
from eval.fuzzing.wire import exchange, fuzz_identifiers, fuzz_wire, parsed
from tests.system.conftest import Start, fill


@pytest.fixture(scope="module")
def asker(start_server: Start, tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Asker:
    studies = tmp_path_factory.mktemp("fuzz") / "studies"
    fill(studies, phantoms)
    server, client = start_server(studies, members=2, batch=4, size="12,12,12", methods="all", upload_mib=64)
    assert server.process is not None
    return Asker(str(client.http.base_url), psutil.Process(server.process.pid))


def needs_schemathesis() -> None:
    """Skip if it is not installed, except on CI."""
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


def test_headers_lengths_origins_and_hosts(asker: Asker) -> None:
    tally = fuzz_wire(asker, 400, 24)
    assert tally.failures == []
    assert tally.outcomes["4xx"] > 200
    assert tally.outcomes["2xx"] > 10


def test_identifiers(asker: Asker) -> None:
    tally = fuzz_identifiers(asker, 200, 25)
    assert tally.failures == []
    assert tally.outcomes["2xx"] > 5


def test_a_served_foreign_page_would_be_a_failure(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.fuzzing.wire._FOREIGN", ("http://{host}",))
    tally = fuzz_wire(asker, 60, 26)
    assert {failure["kind"] for failure in tally.failures} == {"served"}


def test_bytes_are_sent_as_they_are(asker: Asker) -> None:
    host = asker.url.removeprefix("http://").rstrip("/")
    status, text = parsed(exchange(asker.url, f"GET /info/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()))
    assert status == 200
    assert '"strategies"' in text
    assert parsed(exchange(asker.url, b"nonsense\r\n\r\n")) == (400, "Invalid HTTP request received.")


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
