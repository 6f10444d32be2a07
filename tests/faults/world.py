# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A studies folder with annotators at work, whose server is restarted and whose record is checked after each fault."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import nibabel as nib
import numpy as np
import psutil

from eval.app_tools.audit import audit
from eval.runner.client import LabelClient
from eval.runner.server import APP, ServerProcess
from tests.faults.stream import CLASSES, Annotator, Told
from tests.warm import WarmProcess, WarmServer

BUNDLE = "segmentation_dynunet_3d"
FOLDER = Path(__file__).parent
STATE = ".patchwise"
UNLABELLED = 255
KEPT = ("models", "moments")
RESTART_SECONDS = 20.0


if TYPE_CHECKING:
    from tests.faults.referee import BackgroundStudy


class FaultsServer(WarmServer):
    """A warm server, but for every `cold`th start (0: never)."""

    cold = 0
    starts = 0
    was_cold = False

    def _launch(self, arguments: list[str]) -> Any:
        self.starts += 1
        self.was_cold = bool(self.cold) and self.starts % self.cold == 0
        return ServerProcess._launch(self, arguments) if self.was_cold else super()._launch(arguments)


class World:
    """Server, studies and annotators that a fault can break.

    - `folder` is empty at first; the studies are in a separate file system below it, if it can be mounted.
    - `labels` and `images` map images to the files of true labels and scans.
    - `annotators` is the number of concurrent annotators, `pause` their seconds between two requests.
    - Every `cold`-th start is that of a new process, as in a hospital; 0 for none. Other starts use a process with all
      imports.
    - `room` is the size of the file system, in the format of mount.
    - `trouble` is the longest time of a full disk and the like, `standstill` that of a stopped clock, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        images: dict[str, Path],
        labels: dict[str, Path],
        *,
        annotators: int = 3,
        cold: int = 0,
        pause: float = 0.1,
        room: str = "400m",
        trouble: float = 1.0,
        standstill: float = 2.0,
    ) -> None:
        self.folder, self.labels = folder, labels
        self.trouble, self.standstill = trouble, standstill
        self.referee: BackgroundStudy | None = None
        self.verified: dict[str, tuple[Any, ...]] = {}
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        self.mounted = _mount(self.disk, room)
        self.studies = self.disk / "studies"
        self.studies.mkdir()
        for image, path in images.items():
            shutil.copy(path, self.studies / f"{image}.nii.gz")
        names = {"background": 0, **{entry["name"]: entry["idx"] for entry in CLASSES}}
        (self.studies / "dataset.json").write_text(json.dumps({"labels": names}))
        self.clock = folder / "clock"
        env = {"STOPPED_CLOCK": str(self.clock), "PYTHONPATH": os.pathsep.join([str(APP), str(FOLDER / "clock")])}
        log, warm = folder / "server" / "log", WarmProcess()
        self.server = FaultsServer(self.studies, {"models": BUNDLE}, log=log, threads=1, env=env, warm=warm)
        self.server.cold = cold
        self.server.start()
        self.told, self.working, self.ended = Told(), threading.Event(), threading.Event()
        self.people = [
            Annotator(f"ann{i}", self.server.url, labels, self.told, self.working, self.ended, pause)
            for i in range(annotators)
        ]
        for person in self.people:
            person.start()
        self.http = httpx.Client(base_url=self.server.url, timeout=120)

    def prepare(self) -> None:
        """Two models and the moments of the newer one, kept aside for when a fault has used them up."""
        self.working.set()
        deadline = time.monotonic() + 60
        while len(self.told.answers) < 10:
            assert time.monotonic() < deadline, f"{len(self.told.answers)} answers in a minute: {self.told}"
            time.sleep(0.1)
        with closing(LabelClient(self.server.url)) as client:
            for _ in range(2):
                client.train(BUNDLE, {"members": 1, "steps": 3, "patch": [16, 16, 16]})
                time.sleep(0.5)
            client.score("predictive_entropy", {})
        for name in KEPT:
            shutil.copytree(self.state / name, self.folder / "kept" / name)

    def restore_models(self) -> None:
        """Restore models and moments of `prepare`, after a fault has removed them."""
        for name in KEPT:
            shutil.copytree(self.folder / "kept" / name, self.state / name, dirs_exist_ok=True)

    # --- what faults use ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> Path:
        return self.studies / STATE

    @property
    def pid(self) -> int:
        assert self.server.process
        return self.server.process.pid

    def kill(self, alone: bool = False) -> None:
        """SIGKILL for the server; `alone` leaves its trainings and scorings running, as a lack of memory would."""
        process = self.server.process
        if process is None:
            return
        with suppress(ProcessLookupError):
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()

    def child(self, kind: str, request: dict[str, Any], path: str) -> psutil.Process:
        """The process of a training or scoring; started unless one runs."""
        if kind == "scoring" and self.http.get("/info/").json()["patchwise"]["model"] is None:
            self.restore_models()
        deadline, asked = time.monotonic() + 30, False
        while time.monotonic() < deadline:
            for process in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if kind in process.cmdline():
                        return process
            if not asked:
                reply = self.http.post(path, json=request)
                # Another one that was left behind by a killed server may still be at work.
                asked = reply.status_code == 200
            time.sleep(0.1)
        raise AssertionError(
            f"no {kind} to kill within half a minute; the server said {reply.status_code} {reply.text}"
        )

    @contextmanager
    def full(self) -> Iterator[None]:
        """No room for anything."""
        if self.mounted:
            size = shutil.disk_usage(self.disk).total
            # Concurrent writes may need more than was used a moment ago.
            assert any(_remount(self.disk, shutil.disk_usage(self.disk).used) for _ in range(100))
            try:
                yield
            finally:
                assert _remount(self.disk, size)
            return
        process = psutil.Process(self.pid)
        before = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            if process.is_running():
                process.rlimit(psutil.RLIMIT_FSIZE, before)

    @contextmanager
    def read_only(self, paths: list[Path]) -> Iterator[None]:
        """Files and folders that cannot be written to; the super-user needs more than a mode for that."""
        there = [path for path in paths if path.exists()]
        root = os.geteuid() == 0
        try:
            for path in there:
                if root:
                    subprocess.run(["chattr", "+i", str(path)], check=True)
                else:
                    path.chmod(path.stat().st_mode & ~0o222)
                assert not _is_writable(path), f"{path} is still writable, so this fault would test nothing"
            yield
        finally:
            for path in there:
                if root:
                    subprocess.run(["chattr", "-i", str(path)], check=False)
                else:
                    path.chmod(path.stat().st_mode | 0o200)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def restart(self) -> float:
        """Kill the remains of the server and start it; return the seconds until it answers."""
        self.kill()
        began = time.monotonic()
        self.server.start()
        return time.monotonic() - began

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Pause all annotators; inside of the block no request is in progress."""
        self.working.clear()
        for person in self.people:
            person.busy.acquire()
        try:
            yield
        finally:
            for person in self.people:
                person.busy.release()

    def problems(self) -> list[str]:
        """Missing or wrong entries of the record; only valid without requests in progress."""
        told = self.told
        found = list(told.failures)
        kept = {answer["answer"]: answer for answer in self.http.get("/patchwise/answers").raise_for_status().json()}
        for number, (image, query) in told.answers.items():
            answer = kept.get(number)
            if answer is None or (answer["image"], answer["queries"]) != (image, [query]):
                found.append(f"answer {number} to query {query} on {image} was lost: {answer}")
            elif number not in told.unsure and answer["active"] == (number in told.withdrawn):
                found.append(f"answer {number}: active is {answer['active']}, against what was acknowledged")
        for number, answer in kept.items():
            if not all((answer["image"], query) in told.sent for query in answer["queries"]):
                found.append(f"answer {number} was never sent: {answer}")
        # The outcome of unacknowledged requests is final now.
        for number in list(told.unsure):
            told.unsure.discard(number)
            (told.withdrawn.discard if kept[number]["active"] else told.withdrawn.add)(number)
        return found + [f"{row['file']}: {row['problem']}" for row in audit(self.studies, self.verified).problems]

    def label_files(self) -> list[Path]:
        """Every merged label; a killed server leaves unfinished files beside them, whose names start with a dot."""
        return sorted((self.studies / "labels" / "final").glob("[!.]*.nii.gz"))

    def wrong_voxels(self) -> int:
        """Labelled voxels that are not what the annotators drew, over all images."""
        wrong = 0
        for path in self.label_files():
            label = np.asarray(nib.load(path).dataobj)
            truth = np.asarray(nib.load(self.labels[path.name.removesuffix(".nii.gz")]).dataobj)
            wrong += int(((label != truth) & (label != UNLABELLED)).sum())
        return wrong

    def close(self) -> None:
        if self.referee is not None:
            self.referee.stop()
        self.ended.set()
        self.working.set()
        for person in self.people:
            person.join(timeout=100)
        self.server.stop()
        self.server.warm.close()
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)


def _mount(folder: Path, room: str) -> bool:
    """A file system of its own that can be full; False where this user may not have one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0


def _remount(folder: Path, size: int) -> bool:
    """Set the size of the file system; return False if it holds more already."""
    command = ["mount", "-o", f"remount,size={size}", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _is_writable(path: Path) -> bool:
    try:
        if path.is_dir():
            (path / ".written").touch()
            (path / ".written").unlink()
        else:
            with open(path, "ab"):
                pass
    except OSError:
        return False
    return True
