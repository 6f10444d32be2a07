# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""One MONAI Label server process: started on a free port, waited for, stopped with everything it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from eval.errors import RefereeError
from eval.files import read_json, write_json

PROJECT = Path(__file__).resolve().parents[2]
APP = PROJECT / "apps" / "activelearning"
_APP_FOLDERS = ("model", "logs", "bin")
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


def free_port() -> int:
    """Return a free port of the loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class ServerProcess:
    """`monailabel start_server` on one studies folder.

    The process leads its own group, which is noted beside the log: a run that was killed leaves a server behind, and
    the next one stops it before it starts its own on the same folder.
    """

    def __init__(
        self,
        studies: Path,
        conf: Mapping[str, Any],
        *,
        log: Path,
        threads: int,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        # The server runs in a folder of its own, where relative paths would mean something else.
        self.studies = studies.resolve()
        # A study says itself when the pool is scored.
        self.conf = {"auto_score": False, **conf}
        self.log = log.resolve()
        self.note = self.log.with_suffix(".pid.json")
        self.threads = threads
        self.env = dict(env or {})
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of the running server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, seconds: float = 180) -> None:
        """Start and wait until GET /info/ answers.

        Raises:
            RefereeError: the process ended or did not answer in `seconds`; quotes the last lines of its log.
        """
        stop_leftover(self.note)
        if self.port is not None and not _is_free(self.port):
            raise RefereeError(f"port {self.port} is in use by another program; choose another or stop that one")
        self.port = self.port or free_port()
        for name in _APP_FOLDERS:
            # Upstream makes them too, and fails where two servers that start at once do so for the first time.
            (APP / name).mkdir(exist_ok=True)
        self.studies.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["start_server", "--app", str(APP), "--studies", str(self.studies)]
        arguments += ["--host", "127.0.0.1", "--port", str(self.port)]
        for name, value in self.conf.items():
            arguments += ["--conf", name, str(value)]
        self.process = self._launch(arguments)
        write_json(self.note, {"group": self.process.pid, "started": psutil.Process(self.process.pid).create_time()})
        try:
            self._wait(seconds)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and everything in its process group; harmless when it is not running."""
        process, self.process = self.process, None
        if process is not None:
            _end_group(process.pid)
            process.wait()
        self.note.unlink(missing_ok=True)

    def last_lines(self, n: int = 5) -> str:
        """The end of the server's log, in one line."""
        if not self.log.exists():
            return "(no log)"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-n:]) or "(empty log)"

    def _launch(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "monailabel.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self.log.parent,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        env = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(self.threads))}
        # Threads that spin while they wait slow down all processes as soon as the machine has other work.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env["MONAI_LABEL_AUTO_UPDATE_SCORING"] = "false"
        env["MONAI_LABEL_TRACKING_ENABLED"] = "false"
        env["MONAI_LABEL_SESSION_PATH"] = str(self.log.parent / "sessions")
        env["MONAI_LABEL_SESSION_EXPIRY"] = str(365 * 24 * 3600)
        # MONAI Label appends to PYTHONPATH with a bare `+`; an empty entry there would mean the working directory.
        env["PYTHONPATH"] = env.get("PYTHONPATH") or str(APP)
        return {**env, **self.env}

    def _wait(self, seconds: float) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                if "address already in use" in self.log.read_text(errors="replace").lower():
                    raise RefereeError(
                        f"port {self.port} is in use by another program; choose another or stop that one"
                    )
                raise RefereeError(f"the server ended while starting; its log {self.log} says: {self.last_lines()}")
            try:
                if httpx.get(f"{self.url}/info/", timeout=30).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RefereeError(f"the server did not answer in {seconds:g} s; its log {self.log} says: {self.last_lines()}")


def stop_leftover(note: Path) -> None:
    """Stop the processes that a killed run left behind, by the recorded process group."""
    noted = read_json(note)
    if noted is None:
        return
    ours = [p for p in _group(noted["group"]) if p.create_time() >= noted["started"] - 1 and _is_server(p)]
    if ours:
        _end_group(noted["group"])
    note.unlink(missing_ok=True)


def _group(group: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            continue
    return members


def _is_server(process: psutil.Process) -> bool:
    try:
        return any("monailabel" in word for word in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _end_group(group: int, patience: float = 10) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(group, sign)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not _group(group):
                return
            time.sleep(0.05)
