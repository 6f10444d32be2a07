# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval doctor [STUDIES]`: is this machine, this installation and this studies folder as it should be?"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil

from eval.app_path import add_app
from eval.app_tools.doctor_studies import studies_findings
from eval.app_tools.finding import Finding
from eval.protocol.manifest import PACKAGES, describe_versions
from eval.runner.server import APP, PROJECT, free_port

_GIB = 2**30
_NEEDED_GIB = 2.0
_EVERYWHERE = frozenset({"0.0.0.0", "::"})


def findings(studies: Path | None = None, port: int = 8000) -> list[Finding]:
    """All checks, in the order in which a new user would meet their problems.

    `port` and `studies` are the port and the folder of the future server.
    """
    found = [_python(), *_packages(), _app(), _loopback(), _port(port), *_open_to_all(), _memory(), _accelerator()]
    if studies is None:
        return [*found, _disk(Path.cwd())]
    return [*found, _disk(studies if studies.is_dir() else Path.cwd()), *studies_findings(studies)]


def as_table(found: list[Finding]) -> str:
    """One line a finding, advice below those that need it."""
    width = max(len(finding.check) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.state:<8} {finding.check:<{width}}  {finding.found}")
        lines += [f"{'':<8} {'':<{width}}  -> {finding.advice}"] if finding.advice else []
    return "\n".join(lines)


def as_json(found: list[Finding]) -> str:
    """The same for programs."""
    rows = [asdict(finding) for finding in found]
    return json.dumps({"ok": not any(f.state == "problem" for f in found), "findings": rows}, indent=1)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Finding("Python", "ok", found)
    return Finding("Python", "problem", found, "use 3.10, 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    pinned = _pins(PROJECT / "requirements.txt")
    for name, found in describe_versions()["packages"].items():
        wanted = pinned.get(name)
        if found is None:
            yield Finding(name, "problem", "missing", "install requirements.txt")
        elif wanted is not None and found.split("+")[0] != wanted:  # a build for CPU or CUDA has a plus
            yield Finding(name, "problem", found, f"install {name}=={wanted} (requirements.txt)")
        else:
            yield Finding(name, "ok", found)


def _pins(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name: wanted for name, wanted in pairs if name in PACKAGES}


def _app() -> Finding:
    if (APP / "main.py").is_file() and importlib.util.find_spec("monailabel") is not None:
        return Finding("app", "ok", str(APP))
    return Finding("app", "problem", f"{APP} is incomplete", "restore the checkout and the environment")


def _loopback() -> Finding:
    try:
        return Finding("loopback", "ok", f"ports of 127.0.0.1 can be opened (tried {free_port()})")
    except OSError as error:
        return Finding("loopback", "problem", f"no port of 127.0.0.1 can be opened: {error}", "allow local connections")


def _port(port: int) -> Finding:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            advice = "stop the program that has it, or start the server with another --port"
            return Finding(f"port {port}", "warning", f"cannot be opened: {error.strerror}", advice)
    return Finding(f"port {port}", "ok", "free")


def _open_to_all() -> Iterator[Finding]:
    """Warn of servers that listen on every network of the machine without a password."""
    for process in psutil.process_iter(["cmdline"]):
        if not any("monailabel" in part for part in process.info["cmdline"] or []):
            continue
        try:
            listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            asks = process.environ().get("MONAI_LABEL_AUTH_ENABLE", "").lower() in {"1", "true", "yes", "on"}
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        for address in sorted({c.laddr.port for c in listening if c.laddr.ip in _EVERYWHERE}):
            if not asks:
                found = f"process {process.pid} listens on 0.0.0.0:{address}, every network, without a password"
                advice = "start it with --host 127.0.0.1, or with MONAI Label's authentication"
                yield Finding("network", "warning", found, advice)


def _memory() -> Finding:
    add_app()
    from lib.planning.memory_budget import measure_budget

    memory, budget = psutil.virtual_memory(), measure_budget("cpu").memory_gib
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free; a CPU training plans for {budget:g}"
    if memory.available / _GIB < budget:
        return Finding("memory", "warning", found, "free some, or plan for less with --conf memory")
    return Finding("memory", "ok", found)


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("accelerator", "problem", "torch is missing", "install requirements.txt")
    import torch

    if not torch.cuda.is_available():
        bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
        return Finding("accelerator", "ok", f"none; networks run on {os.cpu_count()} CPU threads {bf16} native bf16")
    from lib.planning.memory_budget import measure_budget

    gib = torch.cuda.get_device_properties(0).total_memory / _GIB
    plans = f"a training plans for {measure_budget('cuda:0').memory_gib:g}"
    return Finding(
        "accelerator", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {gib:.0f} GiB; {plans}"
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / _GIB
    if free < _NEEDED_GIB:
        return Finding("disk", "problem", f"{free:.1f} GiB free", f"at least {_NEEDED_GIB:g} GiB are needed")
    return Finding("disk", "ok", f"{free:.1f} GiB free")
