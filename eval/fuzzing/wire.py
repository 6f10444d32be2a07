# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Requests written byte by byte: headers, lengths, origins and identifiers that no HTTP library would send."""

from __future__ import annotations

import json
import re
import socket
import unicodedata
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import numpy as np
from hypothesis import strategies as st

from eval.fuzzing.http import HOSTILE, Asker
from eval.fuzzing.readers import shown
from eval.fuzzing.tally import Tally, drive, resident_mib

TIMEOUT_SECONDS = 30.0
_CHANGING = frozenset({"POST", "PUT", "DELETE", "PATCH"})
# Values of Origin whose pages the server must not serve; {host} is its own name and port.
_FOREIGN = (
    *("null", "http://evil.example", "https://{host}.evil.example", "http://evil.example/{host}", "file://"),
    *("http://{host}@evil.example", "http://evil.example#{host}", "http://127.0.0.1:1", "http://localhost:1"),
    *("http://[::1]:1", "http://127.0.0.1.nip.io", "chrome-extension://abc", "HTTP://EVIL.example", "//{host}", "x"),
)
# Names of Host that are not a loopback name.
_OTHER_HOSTS = (
    *("evil.example", "evil.example:80", "127.0.0.1.nip.io", "localhost.evil.example", "10.0.0.1", "0x7f000001"),
    *("127.0.0.1@evil.example", "evil.example/127.0.0.1", "[2001:db8::1]", "", " ", "a b", "localhost,evil.example"),
)
_NAMES = (
    *("Authorization", "Cookie", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded", "Range"),
    *("Accept", "Accept-Encoding", "If-None-Match", "If-Modified-Since", "Expect", "Upgrade", "Connection", "TE"),
    *("Transfer-Encoding", "Content-Encoding", "Content-Type", "X-HTTP-Method-Override", "Sec-Fetch-Mode", "Cookie"),
    *("X-Patchwise-Client", "Access-Control-Request-Method", "Access-Control-Request-Headers", "X" * 60),
)
_VALUES = (
    *("", "*", "0", "-1", "bytes=0-0", "bytes=-1", "100-continue", "websocket", "gzip", "chunked", "identity"),
    *("Bearer x", "Bearer ", "Basic Og==", "same-origin", "cross-site", "null", "text/html", "application/json"),
    *("multipart/form-data", "multipart/form-data; boundary=", "a; q=0", "PUT", "\xff\xfe", "%00", "x" * 5000),
)
_NO_LABEL = b'--b\r\nContent-Disposition: form-data; name="label"; filename="a.nii.gz"\r\n\r\nx\r\n--b--\r\n'
OWNER = "owner@hospital.example"


@dataclass(frozen=True)
class Wire:
    """One request as bytes, and the judgement that its headers call for.

    Args:
        head: request line and header lines, without the last empty line.
        body: bytes after the head. They may be fewer or more than the head declares.
        forbidden: reason why no 2xx may answer it. "" where any status may.
        broken: whether an HTTP server may close the connection without an answer.
    """

    head: list[bytes]
    body: bytes
    forbidden: str = ""
    broken: bool = False

    def to_bytes(self) -> bytes:
        return b"\r\n".join([*self.head, b"", b""]) + self.body


def fuzz_wire(asker: Asker, wanted: int, number: int) -> Tally:
    """Headers, declared lengths, origins and hosts, on routes that read and on routes that change.

    A case fails if a request of a foreign page or under a foreign name is served, if a wrong length is accepted, if the
    response is a 5xx, or if a complete request gets none.
    """
    tally = Tally("headers and lengths", rest_mib=resident_mib(asker.process))
    address = urlsplit(asker.url).netloc
    draws = st.tuples(st.integers(0, 2**32), st.lists(st.tuples(st.sampled_from(_NAMES), st.sampled_from(_VALUES))))

    def one(case: tuple[int, list[tuple[str, str]]]) -> None:
        chance, extras = case
        wire = drawn_request(np.random.default_rng(chance), extras[:5], address, asker)
        _judge(asker, tally, wire)

    drive(tally, draws, wanted, number, one)
    tally.check_memory()
    return tally


def drawn_request(rng: np.random.Generator, extras: list[tuple[str, str]], address: str, asker: Asker) -> Wire:
    """A request with at most one error that must be refused, among arbitrary other headers."""
    method, path, body = _targets(asker)[int(rng.integers(len(_targets(asker))))]
    kind = str(rng.choice(["origin", "host", "length", "site", "none"]))
    host, lines, forbidden, broken = address, list[bytes](), "", False
    length = f"{len(body)}"
    if kind == "origin":
        origin = str(rng.choice(_FOREIGN)).format(host=address)
        lines.append(f"Origin: {origin}".encode())
        forbidden = f"a page of {origin}"
    elif kind == "host":
        host = str(rng.choice(_OTHER_HOSTS))
        forbidden, broken = f"a server called {host!r}", True
    elif kind == "site":
        lines += [b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Mode: cors"]
        forbidden = "a page of another site"
    elif kind == "length":
        length = str(rng.choice(["-1", "+5", "0x10", "1e3", "9" * 30, "99999999999", " ", "5, 6", "\xb2", "many"]))
        forbidden, broken = f"a body of {length!r} bytes", True
    names = {"host", "content-length"} | ({"transfer-encoding"} if kind == "length" else set())
    for name, value in extras:
        if name.lower() in names or (kind == "none" and name.lower().startswith("sec-fetch")):
            continue
        # Such a header may change the framing or the protocol, so that the connection may end without an answer.
        broken = broken or name.lower() in ("transfer-encoding", "expect", "upgrade", "connection", "te")
        lines.append(f"{name}: {value}".encode("latin-1"))
    if body.startswith(b"{") and not any(line.lower().startswith(b"content-type") for line in lines):
        lines.append(b"Content-Type: application/json")
    rng.shuffle(lines)
    if method in _CHANGING or kind == "length":
        lines.append(f"Content-Length: {length}".encode("latin-1"))
    if kind == "host" and rng.random() < 0.2:
        lines.append(f"Host: {address}".encode())  # two names; the first one must not win over the second
    head = [f"{method} {path} HTTP/1.1".encode(), f"Host: {host}".encode("latin-1"), *lines]
    return Wire(head, body, forbidden, broken)


def fuzz_identifiers(asker: Asker, wanted: int, number: int) -> Tally:
    """Identifiers of clients, tags, images and sessions.

    A case fails if a client may have an id with a control character or the mark of derived ids, or if a client renews
    the lease of another one.
    """
    tally = Tally("identifiers", rest_mib=resident_mib(asker.process))
    address = urlsplit(asker.url).netloc
    ids = st.one_of(
        st.sampled_from([*HOSTILE, "~127.0.0.1", "~a", OWNER, "ann", "Ann", "ANN", "ａｎｎ", "ann "]),
        st.text(max_size=20),
    )

    def one(case: tuple[str, int]) -> None:
        name, target = case
        _judge(asker, tally, _named_request(name, target, address, asker, leased))

    # Renewed by its owner only.
    lease = asker.http.post("/activelearning/random", json={"client_id": OWNER}).raise_for_status().json()
    leased = int(lease["regions"][0]["query"])
    drive(tally, st.tuples(ids, st.integers(0, 4)), wanted, number, one)
    tally.check_memory()
    return tally


def _named_request(name: str, target: int, address: str, asker: Asker, leased: int) -> Wire:
    image, label = asker.known["image"][0], quote(name.encode("utf-8", "replace"), safe="")
    method, path, body = [
        ("POST", "/activelearning/random", json.dumps({"client_id": name}).encode()),
        ("POST", "/activelearning/renew", json.dumps({"client_id": name, "query": leased}).encode()),
        ("PUT", f"/datastore/label?image={image}&tag={label}", _NO_LABEL),
        ("GET", f"/datastore/image?image={label}", b""),
        ("GET", f"/session/{label}", b""),
    ][target]
    forbidden = f"the identifier {name!r}" if _is_forbidden(name) else ""
    if target == 1 and _folded(name) != _folded(OWNER):
        forbidden = f"the lease of {OWNER}, asked for by {name!r}"
    if method == "PUT":
        forbidden = "a label that is no file"
    kind = b"multipart/form-data; boundary=b" if method == "PUT" else b"application/json"
    head = [f"{method} {path} HTTP/1.1".encode(), f"Host: {address}".encode(), b"Content-Type: " + kind]
    return Wire([*head, f"Content-Length: {len(body)}".encode()], body, forbidden)


def _folded(name: str) -> str:
    """The name as a case-insensitive file system sees it."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _is_forbidden(name: str) -> bool:
    """Return whether no client may have this id: control characters, or the mark of a derived id."""
    return name.startswith("~") or bool(re.search(r"[\x00-\x1f\x7f]", name))


def _targets(asker: Asker) -> list[tuple[str, str, bytes]]:
    image = asker.known["image"][0]
    return [
        ("GET", "/info/", b""),
        ("GET", f"/datastore/image?image={image}", b""),
        ("GET", "/patchwise/progress", b""),
        ("POST", "/activelearning/random", b'{"batch": 1}'),
        ("POST", "/activelearning/release", b'{"query": 1}'),
        ("POST", "/patchwise/answers/1/withdraw", b""),
        ("DELETE", "/datastore/label?id=nothing&tag=final", b""),
        ("PUT", "/session/", b"x"),
        ("OPTIONS", "/activelearning/random", b""),
        ("HEAD", "/info/", b""),
    ]


def _judge(asker: Asker, tally: Tally, wire: Wire) -> None:
    sent = wire.to_bytes()
    example = shown(sent)
    try:
        found = exchange(asker.url, sent)
    except TimeoutError:
        tally.fail("no answer", example, f"none within {TIMEOUT_SECONDS:g} s")
        return
    status, text = parsed(found)
    if status is None:
        if wire.broken:
            tally.outcomes["closed"] += 1
        else:
            tally.fail("no answer", example, "the connection was closed")
        return
    if wire.forbidden and status < 300:
        tally.fail("served", example, f"{status} for {wire.forbidden}")
    # A head that is no HTTP is answered by the HTTP parser, which has its own words.
    asker.judge(tally, status, "" if text.startswith("Invalid HTTP") else text, "wire", example)


def exchange(url: str, sent: bytes) -> bytes:
    """The bytes that answer `sent`; the connection is closed for writing behind it, as by a client that went away.

    Raises:
        TimeoutError: no end of the answer within TIMEOUT_SECONDS.
    """
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    found = bytearray()
    with socket.create_connection((parts.hostname, parts.port), TIMEOUT_SECONDS) as line:
        try:
            line.sendall(sent)
            while not _is_whole(found, sent):
                received = line.recv(1 << 16)
                if not received:
                    break
                found += received
        except (ConnectionResetError, BrokenPipeError):
            pass
    return bytes(found)


def _is_whole(found: bytes | bytearray, sent: bytes) -> bool:
    """Return whether an answer is complete by its Content-Length; others end with the connection."""
    head, separator, body = bytes(found).partition(b"\r\n\r\n")
    if not separator or head.split(b" ", 2)[1:2] == [b"100"]:
        return False
    if sent.startswith(b"HEAD"):
        return True
    length = re.search(rb"(?im)^content-length:\s*(\d+)", head)
    if length:
        return len(body) >= int(length[1])
    return body.endswith(b"0\r\n\r\n") if b"chunked" in head.lower() else b" 204 " in head[:20]


def parsed(found: bytes) -> tuple[int | None, str]:
    """Status and text of an answer; None where there is none."""
    while found.startswith(b"HTTP/1.1 100"):
        found = found.partition(b"\r\n\r\n")[2]
    head, _, body = found.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    return (int(status[1]) if status else None), body.decode("utf-8", "replace")
