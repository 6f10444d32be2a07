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

import yaml
from tqdm import tqdm

from eval.errors import RefereeError
from eval.files import read_json, write_json, write_text
from eval.protocol.cell_filter import filtered_cells
from eval.protocol.dataset import load_scan, read_dataset, refuse_overlap
from eval.protocol.guards import Steps, check_cells, check_same_origin
from eval.protocol.manifest import data_digest, describe_machine, describe_run, describe_versions, now
from eval.protocol.study import FULL_DATA, Method, Study, load_study, read_study, save_study, split_cases
from eval.records.state import STEPS
from eval.records.tables import write_tables
from eval.runner.cell import CancelledError, Cell, Material
from eval.runner.full_data import FullDataCell

GRID = "grid.yaml"


@dataclass(frozen=True)
class Options:
    """Execution of a run; no option here may change its numbers."""

    workers: int = 1
    url: str | None = None
    quiet: bool = False
    mixed: bool = False
    scheduler: str | None = None
    gpu: bool = False
    only: str | None = None


def start_grid(studies: Sequence[Study], out: Path, options: Options) -> list[Path]:
    """Run every study of a grid, each in a folder of its own below `out`; gives the folders.

    Raises:
        RefereeError: as `start_run`.
    """
    if len(studies) == 1:
        start_run(studies[0], out, options)
        return [out]
    if out.exists() and any(out.iterdir()):
        raise RefereeError(f"{out} is not empty; use `python -m eval resume {out}` or name a new folder")
    write_text(out / GRID, "".join(f"--- # {study.name}\n{save_study(study)}" for study in studies))
    return resume_grid(out, options)


def resume_grid(out: Path, options: Options) -> list[Path]:
    """Go on with a study, or with every study of a grid: those that were not begun are started.

    Raises:
        RefereeError: as `resume_run`.
    """
    if not (out / GRID).is_file():
        resume_run(out, options)
        return [out]
    studies = [read_study(content, out / GRID) for content in yaml.safe_load_all((out / GRID).read_text())]
    for study in studies:
        folder = out / study.name
        if (folder / "study.yaml").is_file():
            resume_run(folder, options)
        else:
            start_run(study, folder, options)
    return [out / study.name for study in studies]


def start_run(study: Study, out: Path, options: Options) -> None:
    """Check the data, write study.yaml and manifest.json, and run every cell.

    Raises:
        RefereeError: a folder in use, unusable data, overlapping pool and test, a cell that failed.
    """
    if out.exists() and any(p.name not in {".lock", "manifest.json"} for p in out.iterdir()):
        raise RefereeError(f"{out} is not empty; use `python -m eval resume {out}` or name a new folder")
    chosen = None if options.only is None else sorted(filtered_cells(options.only, study))
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        material, data = _prepare(study, options)
        manifest = {
            "study": study.name,
            **describe_run(),
            "finished": None,
            "workers": options.workers,
            "threads_per_server": material.threads,
            "seeds": list(study.seeds),
            "methods": [method.label for method, _ in study.lines],
            "data": data,
        }
        if chosen is not None:
            manifest["only"] = chosen  # `resume` keeps to them
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
        here = {"hardware": describe_machine(), "versions": describe_versions()}
        if not options.mixed:
            check_same_origin([(str(out), manifest), ("this machine", here)])
        elif {key: manifest[key] for key in here} != here:
            manifest = {**manifest, "mixed": [*manifest.get("mixed", []), here]}
            write_json(out / "manifest.json", manifest)
        _run_cells(material, out, options)


def cells_of(material: Material, out: Path, **options: Any) -> list[Cell]:
    """Every cell of the study, seeds in the outer loop so that methods can be compared early."""
    study = material.study
    return [
        (FullDataCell if method.label == FULL_DATA else Cell)(
            material, method, seed, out / "cells" / f"{method.label}_s{seed}", **options
        )
        for method, seed in chosen_cells(study, out)
    ]


def chosen_cells(study: Study, out: Path) -> list[tuple[Method, int]]:
    """(method, seed) of every cell that the run in `out` is to run: all, or those that its `--only` kept."""
    only = (read_json(out / "manifest.json") or {}).get("only")
    lines = [(method, seed) for seed in study.seeds for method, _ in study.lines]
    return [(m, seed) for m, seed in lines if only is None or f"{m.label}_s{seed}" in only]


def _prepare(study: Study, options: Options) -> tuple[Material, dict[str, Any]]:
    """Data, checked file by file, and its description for the manifest."""
    dataset = read_dataset(study.data)
    for sentence in () if options.quiet else dataset.unused:
        print(sentence, file=sys.stderr)
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
        "unused": list(dataset.unused),
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
    rounds_of = {method.label: rounds for method, rounds in study.lines}
    total = len(STEPS) * sum(rounds_of[method.label] for method, _ in chosen_cells(study, out))
    bar = tqdm(total=total, desc=study.name, unit="step", disable=options.quiet, smoothing=0.05)

    def notice(cell: Cell, text: str) -> None:
        with lock:
            bar.set_postfix_str(f"{cell.name}: {text}")

    def finished_step(cell: Cell, step: str) -> None:
        with lock:
            bar.n = _finished_steps(cells)
            bar.refresh()
            check_cells([Steps(c.method.label, c.seed, c.state.content["steps"]) for c in cells])
            if step == "test":
                write_tables(study, out)

    cells = cells_of(material, out, url=options.url, stop=stop, notice=notice, finished_step=finished_step)
    if options.url is not None and len(cells) > 1:
        raise RefereeError(f"--server serves one method and seed, but the study has {len(cells)} cells; leave it out")
    bar.update(_finished_steps(cells))
    if options.scheduler is not None:
        with bar:
            failed = _on_cluster(material, out, options, bar)
        _finish(study, out, failed)
        return
    failed = []

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
    _finish(study, out, failed)


def _on_cluster(material: Material, out: Path, options: Options, bar: Any) -> list[str]:
    from eval.runner.cluster import run_on_cluster

    study, seen = material.study, [0]

    def progress() -> None:
        states = [Steps(c.method.label, c.seed, c.state.content["steps"]) for c in cells_of(material, out)]
        steps = sum(len(state.steps) for state in states)
        if steps > seen[0]:
            seen[0] = bar.n = steps
            bar.refresh()
            check_cells(states)
            write_tables(study, out)

    cells = [(method.label, seed) for method, seed in chosen_cells(study, out)]
    return run_on_cluster(cells, out, options.scheduler or "", options.gpu, progress)


def _finish(study: Study, out: Path, failed: Sequence[str]) -> None:
    """Write the tables, and the end into the manifest unless a cell failed."""
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
