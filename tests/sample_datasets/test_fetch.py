# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Fetching from a server of our own: good, broken, hostile and interrupted archives."""

import hashlib
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TASK = "Task04_Hippocampus"


def archive(*extra, top=TASK):
    """A small tar of a task; `extra` are (TarInfo, bytes) put in at its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in (
            (f"{top}/dataset.json", b"{}"),
            (f"{top}/imagesTr/a.nii.gz", os.urandom(50_000)),
            (f"{top}/imagesTr/._a.nii.gz", b"macOS"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
        for info, text in extra:
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serve `content` by path, by range unless disabled, and break off after `limit` bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.limit, self.ranges, self.asked = {}, None, True, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/mirror"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        body = server.content.get(self.path)
        if not isinstance(body, bytes):
            self.send_error(body or 404)
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if server.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][: server.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def serve(server, content, task=TASK):
    server.content[f"/mirror/{task}.tar"] = content


def run(fetch, server, out, *extra, checksum=None, task=TASK):
    content = server.content.get(f"/mirror/{TASK}.tar")
    checksum = checksum or (md5(content) if isinstance(content, bytes) else "0" * 32)
    return fetch.main([task, "--out", str(out), "--mirror", server.url + "/", "--checksum", checksum, *extra])


@pytest.mark.parametrize("given", [TASK, "Task04", "4", "hippocampus"])
def test_a_task_is_fetched_checked_and_unpacked(fetch, server, tmp_path, given):
    serve(server, archive())
    assert run(fetch, server, tmp_path, task=given) == 0
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        f"{TASK}/dataset.json",
        f"{TASK}/imagesTr/a.nii.gz",
    ]


def test_sha256_and_keeping_the_archive(fetch, server, tmp_path):
    content = archive()
    serve(server, content)
    assert run(fetch, server, tmp_path, "--keep", checksum=hashlib.sha256(content).hexdigest().upper()) == 0
    assert (tmp_path / f"{TASK}.tar").read_bytes() == content


def test_public_checksums_are_used_where_none_is_given(fetch, server, tmp_path, capsys):
    serve(server, archive())
    assert fetch.main([TASK, "--out", str(tmp_path), "--mirror", server.url]) == 2
    assert "expected 9d24dba78a72977dbd1d2e110310f31b" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_archive_is_removed(fetch, server, tmp_path, capsys):
    content = archive()
    serve(server, content[:3000] + b"x" + content[3001:])
    assert run(fetch, server, tmp_path, checksum=md5(content)) == 2
    assert "the file was removed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_goes_on_where_it_stopped(fetch, server, tmp_path, capsys):
    content = archive()
    serve(server, content)
    server.limit = 20_000
    assert run(fetch, server, tmp_path) == 2
    assert "run again to go on" in capsys.readouterr().err
    part = tmp_path / f"{TASK}.tar.part"
    assert part.read_bytes() == content[:20_000]
    server.limit = None
    assert run(fetch, server, tmp_path) == 0
    assert server.asked == [None, "bytes=20000-"]
    assert not part.exists()
    assert (tmp_path / TASK / "imagesTr" / "a.nii.gz").stat().st_size == 50_000


def test_a_server_without_ranges_starts_over(fetch, server, tmp_path):
    serve(server, archive())
    server.ranges = False
    (tmp_path / f"{TASK}.tar.part").write_bytes(b"older bytes")
    assert run(fetch, server, tmp_path) == 0


def test_a_complete_part_needs_no_byte_and_a_longer_one_is_dropped(fetch, server, tmp_path, capsys):
    content = archive()
    serve(server, content)
    part = tmp_path / f"{TASK}.tar.part"
    part.write_bytes(content + b"more")
    assert run(fetch, server, tmp_path) == 2
    assert "the part was removed" in capsys.readouterr().err
    part.write_bytes(content)
    assert run(fetch, server, tmp_path) == 0


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (member("../evil"), "outside"),
        (member(f"{TASK}/../../evil"), "outside"),
        (member("/tmp/patchwise-evil"), "outside"),
        (member("Other/file"), "outside"),
        (member(f"{TASK}/link", tarfile.SYMTYPE, "/etc/passwd"), "link or device"),
        (member(f"{TASK}/hard", tarfile.LNKTYPE, "/etc/passwd"), "link or device"),
        (member(f"{TASK}/pipe", tarfile.FIFOTYPE), "link or device"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_hostile_members_leave_nothing(fetch, server, tmp_path, capsys, info, words):
    serve(server, archive((info, b"x" if info.isreg() else b"")))
    assert run(fetch, server, tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["out", f"{TASK}.tar"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist (404)"),
        (503, "answers 503"),
        (b"no tar at all", "not a complete tar"),
        (archive(top="Task04_Other"), "outside"),
    ],
    ids=["missing", "unavailable", "no tar", "another task"],
)
def test_refusals_say_why(fetch, server, tmp_path, capsys, content, words):
    serve(server, content)
    assert run(fetch, server, tmp_path) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / TASK).exists()


def test_a_full_disk_is_said_before_the_first_byte(fetch, server, tmp_path, capsys, monkeypatch):
    serve(server, archive())
    usage = fetch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert run(fetch, server, tmp_path) == 2
    assert "100 left; make room" in capsys.readouterr().err


def test_a_disk_that_fills_on_the_way_is_said(fetch, server, tmp_path, capsys, monkeypatch):
    serve(server, archive())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.shutil, "copyfileobj", full)
    assert run(fetch, server, tmp_path) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / TASK).exists()


def test_an_existing_folder_unknown_task_dead_mirror_and_odd_checksum(fetch, server, tmp_path, capsys):
    (tmp_path / TASK).mkdir()
    assert run(fetch, server, tmp_path) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert fetch.main(["Task11", "--out", str(tmp_path)]) == 2
    assert "known are Task01_BrainTumour" in capsys.readouterr().err
    assert fetch.main(["5", "--out", str(tmp_path), "--mirror", "http://127.0.0.1:9"]) == 2
    assert "run again" in capsys.readouterr().err
    serve(server, archive())
    assert run(fetch, server, tmp_path / "b", checksum="abc") == 2
    assert "neither an MD5" in capsys.readouterr().err


def test_list_names_ten_tasks(fetch, capsys):
    assert fetch.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[3] == f"{TASK} 9d24dba78a72977dbd1d2e110310f31b"
