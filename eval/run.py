# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A run: all cells of a study in one folder, resumable, with its tables and manifest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.cell import STEPS, CancelledError, Cell, Material
from eval.dataset import load_scan, read_dataset, refuse_overlap
from eval.errors import RefereeError
from eval.files import read_json, write_json, write_text
from eval.full_data import FullDataCell
from eval.manifest import data_digest, describe_machine, describe_versions, now
from eval.study import FULL_DATA, Study, load_study, save_study, split_cases
from eval.tables import check_same_start, write_tables


@dataclass(frozen=True)
class Options:
    """How a run is carried out; nothing here may change its numbers."""

    workers: int = 1
    url: str | None = None
    quiet: bool = False


def plan(study: Study) -> list[str]:
    """One line a cell, for `--dry-run`."""
    start = study.starting_budget.batch if study.starting_budget else 0
    per_round = [start] + [study.batch] * (study.rounds - 1)
    total = f"{study.rounds} rounds, {sum(per_round)} regions ({' + '.join(map(str, per_round))})"
    what = {FULL_DATA: "1 round, every label of the pool"}
    return [f"{m.label} seed {seed}: {what.get(m.label, total)}" for seed in study.seeds for m, _ in study.lines]


def start_run(study: Study, out: Path, options: Options) -> None:
    """Check the data, write study.yaml and manifest.json, and run every cell.

    Raises:
        RefereeError: a folder in use, unusable data, overlapping pool and test, a cell that failed.
    """
    if out.exists() and any(p.name not in {".lock", "manifest.json"} for p in out.iterdir()):
        raise RefereeError(f"{out} is not empty; use `python -m eval resume {out}` or name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        material, data = _prepare(study, options)
        manifest = {
            "study": study.name,
            "started": now(),
            "finished": None,
            "command": " ".join(["python -m eval", *sys.argv[1:]]),
            "workers": options.workers,
            "threads_per_server": material.threads,
            "seeds": list(study.seeds),
            "methods": [method.label for method, _ in study.lines],
            "versions": describe_versions(),
            "hardware": describe_machine(),
            "data": data,
        }
        write_json(out / "manifest.json", manifest)
        # Written last: a folder with study.yaml has everything that `resume` needs.
        write_text(out / "study.yaml", save_study(study))
        _run_cells(material, out, options)


def resume_run(out: Path, options: Options) -> None:
    """Go on with a run after its last finished steps.

    Raises:
        RefereeError: no run in `out`, data that changed since it began, a cell that failed.
    """
    if not (out / "study.yaml").is_file():
        raise RefereeError(f"{out} holds no study.yaml, so no run to resume; start one with `python -m eval run`")
    study = load_study(out / "study.yaml")
    with _only_one(out):
        manifest = read_json(out / "manifest.json")
        material, data = _prepare(study, options)
        if data["digest"] != manifest["data"]["digest"]:
            raise RefereeError(f"{study.data} changed since {out} was started; restore it or start a new run")
        versions = describe_versions()
        if versions["packages"] != manifest["versions"]["packages"]:
            raise RefereeError(f"{out} was started with other package versions; restore them or start a new run")
        _run_cells(material, out, options)


def cells_of(material: Material, out: Path, **options: Any) -> list[Cell]:
    """Every cell of the study, seeds in the outer loop so that methods can be compared early."""
    study = material.study
    return [
        (FullDataCell if method.label == FULL_DATA else Cell)(
            material, method, seed, out / "cells" / f"{method.label}_s{seed}", **options
        )
        for seed in study.seeds
        for method, _ in study.lines
    ]


def _prepare(study: Study, options: Options) -> tuple[Material, dict[str, Any]]:
    """Data checked file by file, and what the manifest says about it."""
    dataset = read_dataset(study.data)
    pool, test = split_cases(study, dataset)
    digests = refuse_overlap(pool, test)
    totals = dict.fromkeys(dataset.labels, 0)
    voxels = 0
    pool_ids = {case.id for case in pool}
    for case in tqdm([*pool, *test], desc="checking data", unit="case", disable=options.quiet, leave=False):
        scan = load_scan(case, dataset.labels)
        if case.id in pool_ids:
            voxels += scan.label_xyz.size
            for name, value in dataset.labels.items():
                totals[name] += int((scan.label_xyz == value).sum())
    data = {
        "name": dataset.name,
        "labels": dataset.labels,
        "digest": data_digest(digests, [case.label for case in (*pool, *test)]),
        "pool": {"cases": len(pool), "voxels": voxels, "classes": totals, "images": _of(digests, pool)},
        "test": {"cases": len(test), "images": _of(digests, test)},
    }
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    return Material(study, dataset, pool, test, threads), data


def _of(digests: dict[str, str], cases: Sequence[Any]) -> dict[str, str]:
    return {case.id: digests[case.id] for case in cases}


def _run_cells(material: Material, out: Path, options: Options) -> None:
    stop, lock = threading.Event(), threading.Lock()
    study = material.study
    total = sum(rounds for _, rounds in study.lines) * len(study.seeds) * len(STEPS)
    bar = tqdm(total=total, desc=study.name, unit="step", disable=options.quiet, smoothing=0.05)

    def notice(cell: Cell, text: str) -> None:
        with lock:
            bar.set_postfix_str(f"{cell.name}: {text}")

    def finished_step(cell: Cell, step: str) -> None:
        with lock:
            bar.n = _finished_steps(cells)
            bar.refresh()
            if step == "query":
                check_same_start(cells)
            elif step == "test":
                write_tables(study, out)

    cells = cells_of(material, out, url=options.url, stop=stop, notice=notice, finished_step=finished_step)
    if options.url is not None and len(cells) > 1:
        raise RefereeError(f"--server serves one method and seed, but the study has {len(cells)} cells; leave it out")
    bar.update(_finished_steps(cells))
    failed: list[str] = []

    def work(cell: Cell) -> None:
        try:
            cell.run()
        except CancelledError:
            pass
        except RefereeError as error:
            failed.append(f"{cell.name}: {error}")
            if not options.quiet:
                bar.write(failed[-1], file=sys.stderr)

    with bar, ThreadPoolExecutor(max_workers=options.workers) as pool:
        try:
            for future in [pool.submit(work, cell) for cell in cells]:
                future.result()
        except BaseException:
            stop.set()
            for cell in cells:
                cell.abort()
            pool.shutdown(cancel_futures=True)
            raise
    write_tables(study, out)
    if failed:
        raise RefereeError("; ".join(failed) + f"; finished steps are kept, so `python -m eval resume {out}` goes on")
    manifest = read_json(out / "manifest.json")
    write_json(out / "manifest.json", {**manifest, "finished": manifest["finished"] or now()})


def _finished_steps(cells: Sequence[Cell]) -> int:
    return sum(len(cell.state.content["steps"]) for cell in cells)


@contextlib.contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two referees on one folder would overwrite each other's steps."""
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RefereeError(f"another referee works in {out}; wait for it or stop it") from error
        yield
