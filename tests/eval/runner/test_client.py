# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The HTTP client: the sent requests, and one sentence per failure."""

import json

import httpx
import pytest

from eval.errors import RefereeError
from eval.runner.client import LabelClient


def client(answer) -> LabelClient:
    return LabelClient("http://server", transport=httpx.MockTransport(answer))


def test_query_sends_the_client_and_reads_regions():
    sent = {}

    def answer(request):
        sent.update(path=request.url.path, body=json.loads(request.content))
        return httpx.Response(200, json={"id": "a", "regions": [{"query": 1}]})

    assert client(answer).query("random", {"batch": 1}) == [{"query": 1}]
    assert sent == {"path": "/activelearning/random", "body": {"batch": 1, "client_id": "oracle"}}


def test_an_empty_answer_is_no_region():
    assert client(lambda request: httpx.Response(200, json={})).query("random", {}) == []


def test_the_servers_sentence_is_passed_on():
    refuse = client(lambda request: httpx.Response(404, json={"detail": "method randon is unknown; try random"}))
    with pytest.raises(RefereeError, match=r"\(404\): method randon is unknown; try random"):
        refuse.query("randon", {})


def test_a_server_error_without_json_is_still_one_sentence():
    with pytest.raises(RefereeError, match=r"POST /scoring/x was refused \(500\): Internal Server Error"):
        client(lambda request: httpx.Response(500, text="Internal Server Error")).score("x", {})


def test_a_dead_server_is_one_sentence():
    def answer(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(RefereeError, match="got no answer from http://server"):
        client(answer).info()


def test_a_connection_that_ends_without_an_answer_is_tried_once_more_where_that_is_safe():
    asked = []

    def answer(request):
        asked.append(request.method)
        if len(asked) == 1:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        return httpx.Response(200, json={"name": "x"})

    assert client(answer).info() == {"name": "x"}
    assert asked == ["GET", "GET"]
    asked.clear()
    with pytest.raises(RefereeError, match="RemoteProtocolError"):
        client(answer).query("random", {})
    assert asked == ["POST"]


def test_a_connection_that_ends_twice_is_one_sentence():
    def answer(request):
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")

    with pytest.raises(RefereeError, match="GET /info/ got no answer from http://server"):
        client(answer).info()


def test_prediction_that_is_no_image():
    with pytest.raises(RefereeError, match="answered 4 bytes that are not NIfTI"):
        client(lambda request: httpx.Response(200, content=b"oops")).infer("net", "s")


def training(*statuses):
    """A server whose own task goes through `statuses`, behind another client's task."""
    states = iter(statuses)

    def answer(request):
        if request.method == "POST":
            return httpx.Response(200, json={"id": "mine", "status": "SUBMITTED"})
        mine = next(states)
        other = {"id": "other", "status": "RUNNING"}
        return httpx.Response(200, json=[other] if mine is None else [{"id": "mine", **mine}, other])

    return client(answer)


def test_training_is_waited_for():
    watched = []
    training({"status": "RUNNING"}, {"status": "DONE"}).train("net", {}, lambda: watched.append(1))
    assert len(watched) == 2


def test_failed_training_says_why():
    details = ["step 3", "ValueError: no annotated image", "end of output"]
    with pytest.raises(RefereeError, match="train net ended as ERROR: ValueError: no annotated image"):
        training({"status": "RUNNING"}, {"status": "ERROR", "details": details}).train("net", {})


def test_forgotten_training_points_to_resume():
    with pytest.raises(RefereeError, match="run `resume`"):
        training(None).train("net", {})
