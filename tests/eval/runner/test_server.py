# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Server processes: busy port, early exit, children, remains of a killed run. A fake `monailabel` serves."""

import json
import os
import signal
import socket
import subprocess
import time

import psutil
import pytest

from eval.errors import RefereeError
from eval.runner.server import ServerProcess, free_port

FAKE = """
import http.server, subprocess, sys
arguments = sys.argv[1:]
if "dies" in arguments:
    sys.exit("the fake server cannot load its app")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "monailabel"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path):
    package = tmp_path / "fake" / "monailabel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(FAKE)

    def make(conf=None, port=None):
        env = {"PYTHONPATH": str(tmp_path / "fake")}
        log = tmp_path / "server.log"
        return ServerProcess(tmp_path / "studies", conf or {}, log=log, threads=1, env=env, port=port)

    return make


def child_of(server) -> psutil.Process:
    return psutil.Process(int(server.log.read_text().split("child ")[1].split()[0]))


def gone(process, seconds=10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_stop_ends_the_server_and_its_children(fake):
    server = fake()
    server.start(30)
    child = child_of(server)
    assert child.is_running()
    server.stop()
    server.stop()  # harmless
    assert gone(child)
    assert not server.note.exists()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port)):
        pass


def test_busy_port_is_one_sentence(fake):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = fake(port=other.getsockname()[1])
        with pytest.raises(RefereeError, match=rf"port {server.port} is in use by another program"):
            server.start(30)
    assert server.process is None


def test_a_server_that_dies_quotes_its_log(fake):
    server = fake(conf={"models": "dies"})
    with pytest.raises(RefereeError, match="the fake server cannot load its app"):
        server.start(30)
    assert server.process is None


def test_the_next_start_stops_what_a_killed_run_left(fake):
    first = fake()
    first.start(30)
    leader, child = psutil.Process(first.process.pid), child_of(first)
    # The referee forgets it, as after kill -9; the trainer outlives the server.
    os.kill(leader.pid, signal.SIGKILL)
    first.process.wait()
    assert child.is_running()
    second = fake()
    second.start(30)
    try:
        assert gone(child)
    finally:
        second.stop()


def test_a_stranger_with_the_same_number_is_left_alone(fake, tmp_path):
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        server = fake()
        server.note.write_text(json.dumps({"group": stranger.pid, "started": time.time() - 5}))
        server.start(30)
        server.stop()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_free_ports_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_folders_that_upstream_would_make_are_there_before_it_looks(fake, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.runner.server.APP", tmp_path / "app")
    (tmp_path / "app").mkdir()
    server = fake(conf={"dies": "now"})
    for _ in range(2):
        with pytest.raises(RefereeError):
            server.start()
        assert sorted(path.name for path in (tmp_path / "app").iterdir()) == ["bin", "logs", "model"]
