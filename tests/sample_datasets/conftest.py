# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Scripts of `sample-datasets`, loaded from their files: the folder's name is not a module name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "sample-datasets"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def phantoms() -> ModuleType:
    return load_script("phantoms")


@pytest.fixture(scope="session")
def dicom() -> ModuleType:
    return load_script("dicom")


@pytest.fixture(scope="session")
def fetch() -> ModuleType:
    return load_script("fetch")
