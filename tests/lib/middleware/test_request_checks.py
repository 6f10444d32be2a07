# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Checks in front of all routes: accepted requests, and the sentences for refused ones."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from lib.errors import PatchwiseError
from lib.middleware.request_bodies import FORM_BYTES, FormBody, check_file_name, check_json, check_urlencoded
from lib.middleware.request_checks import CheckedRequests, check_path, check_query

FORM = (
    b'--b\r\nContent-Disposition: form-data; name="params"\r\n\r\n{"client_id": "ann"}\r\n'
    b'--b\r\nContent-Disposition: form-data; name="label"; filename="/tmp/Slicer-x/a.nii.gz"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n\x1f\x8b\r\n--bx\r\n--b--\r\n"
)


def refused(work) -> tuple[int, str]:
    with pytest.raises((PatchwiseError, HTTPException)) as error:
        work()
    if isinstance(error.value, HTTPException):
        return error.value.status_code, error.value.detail
    assert "\n" not in str(error.value)
    return error.value.status, str(error.value)


@pytest.mark.parametrize(
    "path",
    ["/", "/datastore/image", "/train/segmentation_dynunet_3d", "/ohif/app.bundle.css", "/session/a-b", "/x/é 1"],
)
def test_paths_of_honest_requests_pass(path):
    check_path(path)


def test_queries_of_honest_requests_pass():
    check_query(b"")
    check_query(b"image=1.2.840.113619.2.55.3&tag=final&session_id=d0ad5942-e5e9-11f1-8c05-02fc00000001")
    check_query(b"image=Bauch%20f%C3%BCr%20%C3%9Cbung&output=all&tag=")


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (b"image=../x", "image '../x' cannot be used; an id has up to 200 characters and no '/'"),
        (b"id=%2Fetc%2Fpasswd", "id '/etc/passwd' cannot be used"),
        (b"label=.hidden", "label '.hidden' cannot be used"),
        (b"tag=a..b", "tag 'a..b' cannot be used; use up to 200 letters, digits, '_', '-' and '.'"),
        (b"session_id=a%20b", "session_id 'a b' cannot be used"),
        (b"lines=1%00", r"parameter 'lines' '1\x00' cannot be used; send up to 4000 printable characters"),
        (b"a%0A=1", r"parameter 'a\n' '1' cannot be used"),
        (b"&".join([b"a=1"] * 101), "the address has more than 100 parameters; send less"),
    ],
)
def test_names_in_queries(query, sentence):
    status, told = refused(lambda: check_query(query))
    assert status == 400
    assert told.startswith(sentence)


@pytest.mark.parametrize("path", ["/session/..", "/a/./b", "/a\\b", "/a\nb", "/" + "x" * 256, "/queries/" + "9" * 19])
def test_paths_that_lead_elsewhere(path):
    assert refused(lambda: check_path(path))[0] == 400


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63) + 1, 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=3),
        max_leaves=10,
    )
)
def test_usable_json_is_given_back(value):
    assert check_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"[1, NaN]", "the body holds the number nan; send finite numbers"),
        (b'{"a": -Infinity}', "the body holds the number -inf"),
        (str(2**63).encode(), "the body holds a whole number of 64 bits"),
        (b'"\\udc80"', r"the body holds half of a character ('\udc80')"),
        (b'{"\\udc80": 1}', "the body holds half of a character"),
        (b"[" * 34 + b"]" * 34, "the body is nested more than 32 levels deep; send it flat"),
        (b"[" * 10**6, "the body is not usable JSON (RecursionError)"),
        (b"9" * 5000, "the body is not usable JSON (ValueError)"),
        (b"\xff", "the body is not usable JSON (UnicodeDecodeError)"),
        (b"{", "the body must be a JSON object; it is not readable: "),
        (
            b'{"a": [{"bundle_path": null}]}',
            "bundle_path is not taken from requests: bundles run code; start the server",
        ),
        (b'{"gpus": "0;rm"}', "gpus must be 'all' or numbers like '0,1', found '0;rm'"),
    ],
)
def test_unusable_json(text, sentence):
    status, told = refused(lambda: check_json(text))
    assert status == 400
    assert told.startswith(sentence)


def test_gpus_as_clients_send_them_pass():
    for value in ("all", "0", "0,1", "", None):
        check_json(json.dumps({"gpus": value}).encode())


@pytest.mark.parametrize("name", ["a.nii.gz", "/tmp/Slicer-x/a.nii.gz", "C:\\Users\\J.Smith\\a b.nrrd", "Übung.nii"])
def test_file_names_of_honest_clients_pass(name):
    check_file_name(name)


@pytest.mark.parametrize("name", ["", "..", "a/..", "a/", "a\0.nii", "x" * 201, "a‮.nii"])
def test_file_names_that_no_file_has(name):
    assert refused(lambda: check_file_name(name))[0] == 400


@given(st.lists(st.integers(0, len(FORM)), max_size=8).map(sorted))
def test_a_form_means_the_same_however_it_is_cut(cuts):
    body = FormBody(10**6, b"b")
    for start, stop in zip([0, *cuts], [*cuts, len(FORM)], strict=True):
        body.feed(FORM[start:stop])
    body.end()
    assert (body.parts, body.length) == (2, len(FORM))


@pytest.mark.parametrize(
    ("form", "status", "sentence"),
    [
        (FORM.replace(b'{"client_id": "ann"}', b"[1]"), 400, "params must be a JSON object, found '[1]'"),
        (FORM.replace(b'{"client_id": "ann"}', b"\xff"), 400, "the field 'params' is not text; send it in UTF-8"),
        (FORM.replace(b"/tmp/Slicer-x/a.nii.gz", b".."), 400, "'..' is not a file name"),
        (FORM[:-10], 400, "the form ends before its last boundary; send it whole"),
        (b"nonsense", 400, "the body is not a readable form"),
        (
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\ny\r\n' * 201,
            413,
            "the form has more than 200 parts",
        ),
        (FORM.replace(b"ann", b"a" * FORM_BYTES), 413, "the fields of the form have more than 1,048,576 bytes"),
    ],
)
def test_forms_that_are_refused(form, status, sentence):
    def read() -> None:
        body = FormBody(10**7, b"b")
        body.feed(form)
        body.end()

    told = refused(read)
    assert told[0] == status
    assert told[1].startswith(sentence)


def test_pairs_hold_json_too():
    check_urlencoded(b"params=%7B%22a%22%3A1%7D&x=1")
    assert refused(lambda: check_urlencoded(b"params=3"))[1] == "params must be a JSON object, found '3'"
    assert refused(lambda: check_urlencoded(b"a=1&" * 300))[0] == 400


def ask(pieces, headers=(), path="/activelearning/random", query=b"", upload_bytes=1000):
    """Request that reaches a route behind the checks, and the number of pieces received besides."""
    got, waiting = [], list(pieces)

    async def route(scope, receive, send):
        more = True
        while more:
            message = await receive()
            got.append(message["body"])
            more = message["more_body"]

    async def receive():
        body = waiting.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    scope = {"type": "http", "path": path, "query_string": query, "headers": list(headers), "method": "POST"}
    try:
        asyncio.run(CheckedRequests(route, upload_bytes)(scope, receive, None))
    finally:
        assert waiting == []
    return got


def test_bodies_pass_piece_by_piece():
    json_kind = [(b"content-type", b"application/json")]
    assert ask([b'{"batch"', b": 1}"], json_kind) == [b'{"batch"', b": 1}"]
    form_kind = [(b"content-type", b"multipart/form-data; boundary=b")]
    assert ask([FORM[:50], FORM[50:]], form_kind) == [FORM[:50], FORM[50:]]


@pytest.mark.parametrize(
    ("headers", "pieces", "path", "limit"),
    [
        ([(b"content-type", b"application/json")], [b" " * 2**20] * 9, "/activelearning/random", "8,388,608"),
        ([(b"content-length", b"9000000")], [b" " * 9_000_000], "/activelearning/random", "8,388,608"),
        ([(b"content-type", b"application/json")], [b" " * 60_000] * 2, "/train/bundle", "100,000"),
        ([(b"content-type", b"text/plain")], [b" " * 2**20] * 2, "/activelearning/random", "1,048,576"),
        ([(b"content-type", b"multipart/form-data; boundary=b")], [FORM, b"x" * 1000], "/datastore/label", "1,000"),
    ],
)
def test_long_bodies_are_read_on_and_refused(headers, pieces, path, limit):
    status, told = refused(lambda: ask(pieces, headers, path))
    assert (status, told) == (
        413,
        f"the body has more than the {limit} bytes that this request may have; send less at a time",
    )


def test_a_form_says_how_it_is_written():
    for kind in (b"multipart/form-data", b"multipart/form-data; boundary=b; charset=utf-7"):
        assert refused(lambda kind=kind: ask([b""], [(b"content-type", kind)]))[0] == 400


def test_a_refused_address_is_read_to_its_end():
    assert refused(lambda: ask([b"x", b"y"], query=b"image=/etc"))[0] == 400


@pytest.mark.parametrize("wrong", [7, ["ann"], {}, True, "x" * 201, "a\n", " ann", "~anonymous@127.0.0.1", "~"])
def test_ids_that_no_client_can_send(wrong):
    for body in ({"client_id": wrong}, {"model": {"client_id": wrong}}):
        assert refused(lambda body=body: check_json(json.dumps(body).encode()))[0] == 400


@pytest.mark.parametrize("fine", [None, "", "ann@example.org", "Jürgen Groß", "x" * 200])
def test_ids_that_a_client_may_send(fine):
    assert check_json(json.dumps({"client_id": fine}).encode()) == {"client_id": fine}
