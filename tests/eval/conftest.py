# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Shared parts of the referee's tests: a small dataset, a study on it, and the stand-in server."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from tests.eval.standin import StandIn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def phantoms():
    spec = importlib.util.spec_from_file_location("phantoms", ROOT / "sample-datasets" / "phantoms.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["phantoms"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(phantoms, tmp_path) -> Path:
    folder = tmp_path / "data"
    phantoms.make_dataset(folder, phantoms.PRESETS["hippocampus"], cases=6, seed=2)
    return folder


@pytest.fixture
def write_study(data, tmp_path, monkeypatch):
    """Write a valid study with some entries replaced, or removed if the value is None."""
    monkeypatch.delenv("DATA", raising=False)

    def write(**changes) -> Path:
        content = {
            "name": "small",
            "data": str(data),
            "split": {"test_fraction": 0.34},
            "bundle": "net",
            "size": [12, 12, 12],
            "starting_budget": {"batch": 3},
            "rounds": 3,
            "batch": 2,
            "methods": ["random", "power_pe"],
            "seeds": [1],
            "train": {"members": 2, "steps": 3},
            **changes,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr("eval.runner.cell.ServerProcess", StandIn)
    monkeypatch.setattr(StandIn, "calls", [])
    monkeypatch.setattr(StandIn, "fail_on", None)
    monkeypatch.setattr(StandIn, "minutes_each", None)
    return StandIn
