# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cells on many machines: the same grid as tasks of a Dask cluster that shares the run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distributed import Client, Future, get_worker

from eval.errors import RefereeError
from eval.files import read_json, write_json
from eval.protocol.dataset import read_dataset
from eval.protocol.study import FULL_DATA, load_study, split_cases
from eval.runner.cell import CancelledError, Cell, Material
from eval.runner.full_data import FullDataCell

STOP = ".stop"
_POLL_SECONDS = 1.0
_LEAVING_SECONDS = 20.0


def run_on_cluster(
    cells: Sequence[tuple[str, int]], out: Path, address: str, gpu: bool, progress: Callable[[], None]
) -> list[str]:
    """Run cells (method label, seed) on the workers of the scheduler at `address`; the sentences of those that failed.

    Every worker must see the data and `out` under the same paths. A cell whose worker is lost is given to another one
    and continues from its folder (three times, Dask's default). With `gpu` a cell asks for the resource GPU, of which a
    worker started with `--resources GPU=1` has one. `progress` is called while they run.

    Raises:
        RefereeError: no scheduler at the address, or no worker with a GPU.
    """
    (out / STOP).unlink(missing_ok=True)
    try:
        client = Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RefereeError(
            f"no Dask scheduler answers at {address} ({error}); start one or check the address"
        ) from error
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if gpu and workers and not any(worker["resources"].get("GPU") for worker in workers):
            raise RefereeError(
                f"no worker of {address} has a GPU; start workers with --resources GPU=1 or leave --gpu out"
            )
        named = {
            client.submit(
                run_cell,
                str(out.resolve()),
                method,
                seed,
                key=f"{method}_s{seed}-{os.urandom(4).hex()}",
                pure=False,
                resources={"GPU": 1} if gpu else None,
            ): f"{method}_s{seed}"
            for method, seed in cells
        }
        try:
            _watch(list(named), progress)
        except BaseException:
            (out / STOP).touch()
            client.cancel(list(named))
            _until_left([out / "cells" / name for name in named.values()])
            raise
        ended = {name: future.exception() for future, name in named.items()}
        return [f"{name}: {error}" for name, error in ended.items() if error is not None]


def run_cell(out: str, method: str, seed: int) -> None:
    """Bring one cell to its end on this worker, from wherever its folder stands.

    Raises:
        RefereeError: the cell failed; another worker would fail too, so only the message matters.
    """
    folder = Path(out)
    study = load_study(folder / "study.yaml")
    dataset = read_dataset(study.data)
    pool, test = split_cases(study, dataset)
    threads = max(1, (os.cpu_count() or 1) // max(1, get_worker().state.nthreads))
    line = next(m for m, _ in study.lines if m.label == method)
    kind = FullDataCell if method == FULL_DATA else Cell
    cell = kind(Material(study, dataset, pool, test, threads), line, seed, folder / "cells" / f"{method}_s{seed}")
    with _mine(cell.folder), _stopped_by(folder / STOP, cell), contextlib.suppress(CancelledError):
        cell.run()


@contextlib.contextmanager
def _mine(folder: Path) -> Iterator[None]:
    """One worker a cell: a worker that only seemed lost must not write beside the one that took over."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = read_json(folder / "worker.json") or {}
            raise RefereeError(f"{folder.name} is still run by {holder.get('host', 'another worker')}; wait") from error
        write_json(folder / "worker.json", {"host": socket.gethostname(), "process": os.getpid()})
        yield


def _until_left(folders: Sequence[Path]) -> None:
    """Wait a while for workers to leave their cells, so that `resume` finds none taken."""
    end = time.monotonic() + _LEAVING_SECONDS
    for folder in folders:
        while (folder / ".lock").exists() and time.monotonic() < end:
            with open(folder / ".lock", "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    time.sleep(0.1)


@contextlib.contextmanager
def _stopped_by(path: Path, cell: Cell) -> Iterator[None]:
    """Abort the cell as soon as `path` exists."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_POLL_SECONDS):
            if path.exists():
                cell.abort()
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(futures: list[Future[Any]], progress: Callable[[], None]) -> None:
    while not all(future.done() for future in futures):
        time.sleep(_POLL_SECONDS)
        progress()
