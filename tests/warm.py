# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Servers forked from a process that has imported everything: the same program, without the seconds of its imports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from eval.runner.server import ServerProcess

PROGRAM = Path(__file__).parent / "faults" / "warm_monailabel.py"


class Forked:
    """A server that is a child of the warm process, with the interface that `ServerProcess` needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return None if psutil.pid_exists(self.pid) else 1

    def wait(self) -> None:
        while psutil.pid_exists(self.pid):
            time.sleep(0.01)


class WarmProcess:
    """Starts with the first server; each server is a child of it, in an environment and a folder of its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def fork(self, arguments: list[str], log: Path, env: Mapping[str, str]) -> Forked:
        if self._process is None:
            with open(log, "ab") as stream:
                self._process = subprocess.Popen(
                    [sys.executable, str(PROGRAM)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stream,
                    text=True,
                    env=dict(env),
                )
            assert self._line() == "ready", log.read_text()[-2000:]
        wanted = {"arguments": arguments, "log": str(log), "folder": str(log.parent), "env": dict(env)}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._line()))

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _line(self) -> str:
        assert self._process
        assert self._process.stdout
        return self._process.stdout.readline().strip()


class WarmServer(ServerProcess):
    """A server that starts without waiting for its imports."""

    def __init__(self, *arguments: Any, warm: WarmProcess, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.warm = warm

    def _launch(self, arguments: list[str]) -> Any:
        return self.warm.fork(arguments, self.log, self._environment())
