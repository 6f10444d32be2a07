# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Conditions of a run: versions, hardware, data digests."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PROJECT = Path(__file__).resolve().parents[2]
_CODE = frozenset({".py", ".json", ".yaml"})
_MEASURING = ("cell.py", "dataset.py", "full_data.py", "measure.py", "oracle.py", "profiles.py")
PACKAGES = ("monailabel", "monai", "torch", "numpy", "scipy", "nibabel", "scikit-learn", "pytorch-ignite")


def now() -> str:
    """Current time as ISO 8601, UTC, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe_run(program: str = "eval") -> dict[str, Any]:
    """Command, versions, hardware and time of a run: the beginning of every committed result."""
    return {
        "command": " ".join([f"python -m {program}", *sys.argv[1:]]),
        "started": now(),
        "versions": describe_versions(),
        "hardware": describe_machine(),
    }


def describe_versions() -> dict[str, Any]:
    """Versions of Python, of the packages that results depend on, and of this project (git commit)."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "patchwise": _git("rev-parse", "HEAD"),
        "code": code_digest(),
        "patchwise_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def code_digest(root: Path = _PROJECT) -> str:
    """SHA-256 over the files that decide a study's numbers: app, bundles, and the referee's measures."""
    files = [p for folder in ("apps", "bundles") for p in (root / folder).rglob("*") if p.suffix in _CODE]
    files += [root / "eval" / name for name in _MEASURING] + sorted((root / "eval" / "metrics").glob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.is_file()):
        digest.update(f"{path.relative_to(root)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator; results from different machines are not to be mixed."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def data_digest(image_digests: Mapping[str, str], labels: Sequence[Path]) -> str:
    """SHA-256 over case ids, image contents and label files; the same data anywhere gives the same digest."""
    digest = hashlib.sha256()
    for case_id, label in sorted(zip(image_digests, labels, strict=True)):
        digest.update(f"{case_id} {image_digests[case_id]} ".encode())
        digest.update(hashlib.sha256(label.read_bytes()).digest())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    return _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).resolve().parent), *arguments)


def _output(*command: str) -> str | None:
    """Output of a small program, or None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
