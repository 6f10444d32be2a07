# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Start-up: refused options, and a broken torchvision without effect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from eval.runner.server import free_port
from main import PatchwiseApp
from tests.eval.answered import Studies
from tests.system.conftest import BUNDLE, ROOT, fill

APP = ROOT / "apps" / "activelearning"


def start(studies: Path, *conf: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Load the app as the server does, in a separate process."""
    code = (
        "import sys; from monailabel.interfaces.utils.app import app_instance;"
        f"app = app_instance({str(APP)!r}, {str(studies)!r}, dict(zip(sys.argv[1::2], sys.argv[2::2])));"
        "print(sorted(app.info()['models']), 'torchvision' in sys.modules, app._auto_update_scoring);"
        "print(list(app.info()['patchwise']['chosen'].values()))"
    )
    path = os.pathsep.join(filter(None, [env.pop("PATHS", ""), str(APP)]))
    return subprocess.run(
        [sys.executable, "-c", code, *conf],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_app_loads_where_torchvision_is_broken_and_starts_no_scoring(tmp_path: Path, phantoms: Path) -> None:
    fill(tmp_path / "studies", phantoms, 1)
    broken = tmp_path / "broken" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    # Upstream's default would start a scoring process for every request; the app never does.
    env = {"PATHS": str(broken.parent), "MONAI_LABEL_AUTO_UPDATE_SCORING": "true"}
    done = start(tmp_path / "studies", "models", BUNDLE, **env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-2:] == [f"['query_region', '{BUNDLE}'] False False", "['as asked for']"]


@pytest.mark.slow
def test_the_app_takes_the_bundle_that_suits_the_images(tmp_path: Path) -> None:
    (tmp_path / "thick").mkdir()
    for name in "ab":
        image = nib.Nifti1Image(np.zeros((40, 40, 9), np.int16), np.diag([1, 1, 7, 1]))
        nib.save(image, tmp_path / "thick" / f"{name}.nii.gz")
    done = start(tmp_path / "thick", "labels", "organ")
    loaded, why = done.stdout.strip().splitlines()[-2:]
    assert loaded == "['query_region', 'segmentation_dynunet_2d'] False False"
    assert "slices are 7.0 times as far apart as their voxels, and the median image has 9 of them" in why


def refused(studies: Path, *conf: str) -> SystemExit:
    """Error of the app with such options, without a separate process."""
    with pytest.raises(SystemExit) as ended:
        PatchwiseApp(str(APP), str(studies), dict(zip(conf[::2], conf[1::2], strict=True)))
    return ended.value


@pytest.mark.parametrize(
    ("conf", "sentence"),
    [
        (("modelz", BUNDLE), "--conf modelz is not an option of this app; known options are models, "),
        (("models", "unet"), "no bundle unet in .*; known bundles are .*segmentation_dynunet_3d"),
        (("members", "0"), "--conf members: .*found '0'"),
        (("labels", '{"a": 2, "b": 5}'), "--conf labels: class ids must be 1, 2, "),
        (("methods", "power_pi"), "unknown method 'power_pi'"),
        (("auto_method", "power_pi"), "unknown method 'power_pi'"),
        (("auto_train", '{"stepz": 5}'), "unknown training option stepz"),
    ],
)
def test_unusable_options_end_with_one_sentence_and_code_2(
    tmp_path: Path, phantoms: Path, caplog: pytest.LogCaptureFixture, conf: tuple[str, str], sentence: str
) -> None:
    fill(tmp_path / "studies", phantoms, 1)
    before = sorted(p.name for p in (tmp_path / "studies").iterdir())
    assert refused(tmp_path / "studies", *conf).code == 2
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert re.search(sentence, record.message)
    assert record.exc_info is None
    assert sorted(p.name for p in (tmp_path / "studies").iterdir()) == before


def test_classes_that_answers_exist_for_cannot_be_renumbered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    studies = Studies(tmp_path / "studies")
    before = studies.ledger.get_meta("classes")
    assert refused(studies.folder, "labels", "posterior,anterior").code == 2
    assert "answers were given with {'anterior': 1, 'posterior': 2}, and now anterior is 2" in caplog.text
    assert studies.ledger.get_meta("classes") == before


def test_the_server_itself_ends_with_one_sentence_and_no_traceback(tmp_path: Path, phantoms: Path) -> None:
    # Access from every network must be explicit. Within the running server the process ends at once, before exit
    # handlers.
    fill(tmp_path / "studies", phantoms, 1)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(APP), "--studies"]
    env = {**os.environ, "PYTHONPATH": str(APP)}
    command += [str(tmp_path / "studies"), "--port", str(free_port())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert "without --host every network of this machine could read and write the studies" in output
    assert "Traceback" not in output
    assert not (tmp_path / "studies" / ".patchwise").exists()


def test_a_process_that_loads_the_app_ends_with_one_sentence_and_no_traceback(tmp_path: Path) -> None:
    # As trainings and scorings load it.
    done = start(tmp_path / "nowhere")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()
