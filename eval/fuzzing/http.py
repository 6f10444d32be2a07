# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Random requests to a running server: by its OpenAPI description, with damaged uploads, and with raw bodies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np
import psutil
from hypothesis import strategies as st

from eval.errors import RefereeError
from eval.fuzzing.readers import EDITS, damaged, pack, shown, volumes
from eval.fuzzing.tally import Tally, drive, resident_mib

HOSTILE = [
    *(
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "..\\..\\x",
        "%2e%2e",
        "a\0b",
        "x" * 300,
        "Übung 3",
        "кот‮gpj",
        " ",
        "-1",
    ),
    *(
        "final/../../x",
        "CON",
        "nobody",
        "0",
        "9" * 30,
        "{}",
        "'; DROP TABLE queries;--",
        "${jndi:x}",
        "a\nb",
        "😀" * 60,
    ),
]
_TASKS = ("/train/{model}", "/batch/infer/{model}", "/scoring/{method}")
_IMAGE_OF = {"image", "label"}
_JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.integers(-3, 40),
        st.floats(),
        st.sampled_from([*HOSTILE, "random", "patch", "slice", "volume", "ensemble", "bald", "power", "whole", "ann"]),
        st.text(max_size=12),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
_KEYS = [
    *("batch", "size", "size_mm", "seed", "round", "rounds", "client_id", "request_id", "model", "lease_minutes"),
    *(
        "double_share",
        "axis",
        "stride",
        "n_per_image",
        "utilities",
        "hints",
        "regions",
        "unit",
        "posterior",
        "selector",
    ),
    *(
        "uncertainty",
        "beta",
        "passes",
        "views",
        "query",
        "reason",
        "queries",
        "label_info",
        "annotated_classes",
        "image",
    ),
    *("result_extension", "label_tag", "save_label", "format", "images", "gpus", "bundle_path", "members", "patch"),
    *("query_method", "max_workers", "session", "strategy", "method", "whole", "name", "distance", "eta", "k"),
]
_SIZES = st.lists(st.integers(-2, 60), min_size=2, max_size=4)
_EXTRAS = st.dictionaries(st.sampled_from(_KEYS), st.one_of(_JUNK, _SIZES, st.just(8)), max_size=6)


class Asker:
    """Client that sends requests to one server and judges its responses.

    Args:
        url: address of the server.
        process: process of the server, whose memory is measured.
    """

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.url = url
        self.process = process
        self.http = httpx.Client(base_url=url, timeout=120)
        info = self.http.get("/info/").raise_for_status().json()
        listed = self.http.get("/datastore/", params={"output": "all"}).json()["objects"]
        self.known: Mapping[str, list[str]] = {
            "image": sorted(listed),
            "label": sorted(listed),
            "model": sorted(info["models"]),
            "strategy": [*info["strategies"], "compose", "precomputed", "starting_budget", "random_fg33"],
            "method": sorted(info["scoring"]),
            "tag": ["final", "original", "second"],
            "query_id": ["1", "2", "3", "4", "5"],
            "answer_id": ["1", "2", "3"],
        }

    def judge(self, tally: Tally, status: int, text: str, kind: str, example: Any) -> None:
        """Record an answer: its class, how much the server has grown, and a 5xx or a refusal without a sentence."""
        tally.grown_mib.append(resident_mib(self.process) - tally.rest_mib)
        tally.outcomes[f"{status // 100}xx"] += 1
        if status >= 500:
            tally.fail("server error", example, f"{status}: {text[:200]}")
        elif status >= 400 and text and not _is_sentence(text):
            tally.fail("not one sentence", example, f"{status} {kind}: {text[:200]}")


def _is_sentence(text: str) -> bool:
    try:
        detail = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(detail, str) and bool(detail) and "\n" not in detail and "Traceback" not in detail


def fuzz_openapi(asker: Asker, wanted: int, number: int) -> Tally:
    """Every operation of the OpenAPI description: values it allows, values it does not, and names that exist."""
    try:
        import schemathesis
    except ImportError as error:
        raise RefereeError("fuzzing needs schemathesis: pip install -r requirements-dev.txt") from error
    schema: Any = schemathesis.openapi.from_url(f"{asker.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    tally = Tally("OpenAPI", rest_mib=resident_mib(asker.process))
    modes: tuple[Any, ...] = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    share = -(-wanted // len(operations))
    for place, operation in enumerate(operations):
        drawn = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))

        def one(case: tuple[Any, int, dict[str, Any]]) -> None:
            asked, chance, extras = case
            _steer(asked, np.random.default_rng(chance), extras, asker.known)
            try:
                reply = send(asked)
            except ValueError:
                # requests cannot write some addresses and headers down; no server sees those.
                tally.outcomes["not sent"] += 1
            except OSError as error:
                tally.fail("no answer", _example(asked), str(error)[:200])
            else:
                kind = f"{asked.method} {asked.path}"
                text = reply.content.decode("utf-8", "replace")  # pictures are answers too
                asker.judge(tally, reply.status_code, text, kind, _example(asked))

        cases = st.tuples(drawn, st.integers(0, 2**32), _EXTRAS)
        drive(tally, cases, min(share, wanted - tally.cases), number * 100 + place, one)
    tally.check_memory()
    return tally


def send(case: Any) -> Any:
    """The answer to a case; its JSON is written here, since requests refuses NaN and infinities and clients do not."""
    if case.media_type == "application/json" and isinstance(case.body, (dict, list, str, float, int)):
        return case.call(data=json.dumps(case.body))
    return case.call()


def _example(case: Any) -> dict[str, str]:
    """Return the data that repeat a case, even if no curl command can express it."""
    return {
        "request": f"{case.method} {case.path}",
        "path": repr(case.path_parameters),
        "query": repr(case.query),
        "headers": repr(dict(case.headers or {})),
        "body": repr(case.body)[:4000],
    }


def _steer(case: Any, rng: np.random.Generator, extras: dict[str, Any], known: Mapping[str, list[str]]) -> None:
    """Set existing or hostile names in a case, and a body that reaches the code behind the first checks."""
    for holder in (case.path_parameters, case.query):
        for name in list(holder or {}):
            draw = rng.random()
            if name in known and draw < 0.5:
                holder[name] = str(rng.choice(known[name]))
            elif draw < 0.7:
                holder[name] = str(rng.choice(HOSTILE))
    if isinstance(case.body, dict) and case.media_type == "application/json" and rng.random() < 0.8:
        case.body = {**case.body, **extras} if rng.random() < 0.3 else extras
    if case.path in _TASKS and case.method.upper() == "POST":
        # Tasks of several minutes must not be started.
        case.query = {**(case.query or {}), "run_sync": "true"}
        if case.path == "/train/{model}" and isinstance(case.body, dict):
            case.body = {**case.body, "members": 0}
        elif case.path == "/train/{model}":
            case.path_parameters["model"] = "nobody"


def fuzz_uploads(asker: Asker, wanted: int, number: int) -> Tally:
    """Damaged volumes as labels, images, sessions and inputs of a model."""
    tally, valid, images = Tally("uploads"), volumes(), asker.known["image"]
    for name, content in valid.items():  # imports at first use are not caused by the file
        packed = pack(name, content, content, [], whole=True)
        asker.http.put(
            "/datastore/image", params={"image": "fuzzed"}, files={"file": (name, packed)}
        ).raise_for_status()
        asker.http.delete("/datastore/image", params={"id": "fuzzed"}).raise_for_status()
    tally.rest_mib = resident_mib(asker.process)
    targets = [
        ("PUT", "/datastore/label", "label", {"image": images[0]}),
        ("PUT", "/datastore/label", "label", {"image": images[-1], "tag": "original"}),
        ("PUT", "/datastore/image", "file", {"image": "fuzzed"}),
        ("PUT", "/session/", "files", {}),
        ("PUT", "/session/", "files", {"uncompress": "true"}),
        ("POST", "/infer/query_region", "file", {}),
    ]
    cases = st.tuples(
        st.sampled_from(sorted(valid)),
        st.sampled_from(range(len(targets))),
        EDITS,
        st.integers(0, 3),
        _EXTRAS,
        st.data(),
    )

    def one(case: tuple[str, int, list[Any], int, dict[str, Any], Any]) -> None:
        name, target, edits, kind, extras, data = case
        content = damaged(valid[name], edits, packed_after=kind > 0)
        content = pack(name, content, valid[name], edits, whole=kind > 0)
        method, path, field, query = targets[target]
        named = name if kind else data.draw(st.one_of(st.just(name), st.sampled_from(HOSTILE)))
        sent = {"params": json.dumps(extras)}
        example = {"request": f"{method} {path} {query}", "name": named, "params": sent["params"], **shown(content)}
        _ask(
            asker,
            tally,
            example,
            lambda: asker.http.request(method, path, params=query, data=sent, files={field: (named, content)}),
        )
        if path == "/datastore/image":
            asker.http.delete("/datastore/image", params={"id": "fuzzed"})

    drive(tally, cases, wanted, number, one)
    tally.check_memory()
    return tally


def fuzz_bodies(asker: Asker, wanted: int, number: int) -> Tally:
    """Bodies of any bytes under any content type, on routes that read one."""
    tally = Tally("raw bodies", rest_mib=resident_mib(asker.process))
    targets = [
        ("POST", "/activelearning/random"),
        ("POST", "/activelearning/precomputed"),
        ("POST", "/activelearning/renew"),
        ("POST", "/patchwise/answers/1/withdraw"),
        ("POST", "/infer/query_region?image=" + asker.known["image"][0]),
        ("PUT", "/datastore/image/info?image=" + asker.known["image"][0]),
        ("PUT", "/datastore/label?image=" + asker.known["image"][0]),
        ("PUT", "/session/"),
    ]
    kinds = [
        "application/json",
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
    ]
    pieces = st.sampled_from(
        [
            *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b"null", b"\xff"),
            *(b"--b\r\n", b"--b--\r\n", b'Content-Disposition: form-data; name="params"\r\n\r\n', b"\r\n", b"params="),
            *(b'Content-Disposition: form-data; name="label"; filename="a.nii.gz"\r\n\r\n', b'{"batch":', b'"queries"'),
        ]
    )
    bodies = st.lists(st.one_of(pieces, st.binary(max_size=8)), max_size=12).map(b"".join)
    values = st.dictionaries(st.sampled_from(_KEYS), _JUNK, max_size=4).map(lambda v: json.dumps(v).encode())
    cases = st.tuples(st.sampled_from(targets), st.sampled_from(kinds), st.one_of(bodies, values))

    def one(case: tuple[tuple[str, str], str, bytes]) -> None:
        (method, path), kind, body = case
        headers = {"Content-Type": kind} if kind else {}
        example = {"request": f"{method} {path}", "content_type": kind, **shown(body)}
        _ask(asker, tally, example, lambda: asker.http.request(method, path, content=body, headers=headers))

    drive(tally, cases, wanted, number, one)
    tally.check_memory()
    return tally


def _ask(asker: Asker, tally: Tally, example: dict[str, Any], send: Callable[[], httpx.Response]) -> None:
    try:
        reply = send()
    except httpx.TransportError as error:
        tally.fail("no answer", example, f"{type(error).__name__}: {error}")
        return
    asker.judge(tally, reply.status_code, reply.text, example["request"], example)
