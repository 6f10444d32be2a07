# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`python -m eval doctor`: what an installation needs, checked one by one."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from eval.manifest import PACKAGES, describe_versions
from eval.server import APP, PROJECT, free_port

_NEEDED_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is as it should be, and one line that says so or what to do."""

    ok: bool
    text: str


def findings() -> list[Finding]:
    """Everything that is checked, in the order in which a newcomer would trip over it."""
    return [_python(), *_packages(), _app(), _loopback(), _disk(), _accelerator()]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Finding(ok, f"Python {found}" + ("" if ok else "; 3.10 to 3.12 is needed"))


def _packages() -> list[Finding]:
    pinned = _pins(PROJECT / "requirements.txt")
    rows = []
    for name, found in describe_versions()["packages"].items():
        wanted = pinned.get(name)
        # A CPU or CUDA build carries a local version behind a plus.
        ok = found is not None and (wanted is None or found.split("+")[0] == wanted)
        text = f"{name} {found or 'is missing'}"
        rows.append(Finding(ok, text if ok else f"{text}; install {name}=={wanted} (requirements.txt)"))
    return rows


def _pins(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name: wanted for name, wanted in pairs if name in PACKAGES}


def _app() -> Finding:
    ok = (APP / "main.py").is_file() and importlib.util.find_spec("monailabel") is not None
    return Finding(ok, f"app {APP}" + ("" if ok else " is incomplete; restore the checkout and the environment"))


def _loopback() -> Finding:
    try:
        return Finding(True, f"loopback ports can be opened (tried {free_port()})")
    except OSError as error:
        return Finding(False, f"no port of 127.0.0.1 can be opened ({error}); allow local connections")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    ok = free >= _NEEDED_GIB
    return Finding(ok, f"{free:.1f} GiB free here" + ("" if ok else f"; at least {_NEEDED_GIB:g} GiB are needed"))


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(False, "torch is missing; install requirements.txt")
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, networks run on the CPU"
    return Finding(True, f"accelerator: {name}")
