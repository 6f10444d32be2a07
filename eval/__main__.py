# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Command line of the referee: `python -m eval COMMAND`; `--help` lists the commands.

Exit codes: 0 done, 2 an error that the caller can correct (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.errors import RefereeError

if TYPE_CHECKING:
    from eval.runner.run import Options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    options = _parser().parse_args(arguments)
    _stop_like_interrupt(signal.SIGTERM)
    try:
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
    except RefereeError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(_interrupted(options))
        return 130
    return 0


def _interrupted(options: argparse.Namespace) -> str:
    """Advice for the next step; only runs can be resumed."""
    folder = {_run: getattr(options, "out", None), _resume: getattr(options, "folder", None)}.get(options.command)
    if folder is None:
        return "interrupted\n"
    cluster = f" --scheduler {options.scheduler}" if options.scheduler else ""
    return f"interrupted; finished steps are kept, `python -m eval resume {folder}{cluster}` goes on\n"


def _run(options: argparse.Namespace) -> None:
    from eval.runner.grid import load_grid, plan_grid
    from eval.runner.run import start_grid

    studies = load_grid(options.study)
    if options.dry_run:
        sys.stdout.write("\n".join(plan_grid(studies, options.only, options.calibrate)) + "\n")
        return
    if options.out is None:
        raise RefereeError("run needs --out DIR, the new folder for its results")
    folders = start_grid(studies, options.out, _how(options))
    _report_on(folders, pictures=True)


def _how(options: argparse.Namespace) -> Options:
    from eval.runner.run import Options

    if options.scheduler is not None and (options.server is not None or options.workers != 1):
        raise RefereeError("--scheduler uses the cluster's workers, one server each; leave --workers and --server out")
    mixed = getattr(options, "mixed", False)
    only = getattr(options, "only", None)
    return Options(options.workers, options.server, options.quiet, mixed, options.scheduler, options.gpu, only)


def _resume(options: argparse.Namespace) -> None:
    from eval.runner.run import resume_grid

    folders = resume_grid(options.folder, _how(options))
    _report_on(folders, pictures=True)


def _merge(options: argparse.Namespace) -> None:
    from eval.records.merge import merge_parts

    there, planned = merge_parts(options.folders, options.out, mixed=options.mixed)
    sys.stdout.write(f"{there} of {planned} cells: {options.out}\n")
    _report_on([options.out], pictures=True)


def _report(options: argparse.Namespace) -> None:
    from eval.reporting.report import check_folders

    check_folders(options.folders, claim=options.claim, mixed=options.mixed)
    _report_on(options.folders, pictures=not options.no_pictures, deidentify=options.deidentify)


def _report_on(folders: Sequence[Path], pictures: bool, deidentify: bool = False) -> None:
    from eval.records.tables import read_table
    from eval.reporting.report import summary_text, write_report

    rounds = {folder.name: read_table(folder, "rounds") for folder in folders}
    for folder in folders:
        others = rounds if len(folders) > 1 else None
        path = write_report(folder, pictures=pictures, others=others, deidentify=deidentify)
        sys.stdout.write(f"{summary_text(folder)}\n\nreport: {path}\n")


def _export(options: argparse.Namespace) -> None:
    if options.studies is not None:
        return _export_studies(options)
    from eval.reporting.deidentify import hidden_of
    from eval.reporting.exchange import write_loops, write_nnunet

    if options.folder is None or options.method is None or options.seed is None:
        raise RefereeError("export needs the folder of a run with --method and --seed, or --studies DIR of a project")
    if options.nnactive is None and options.nnunet is None:
        raise RefereeError("export needs --nnactive FOLDER or --nnunet FOLDER, where to write to")
    names = hidden_of(options.folder).names if options.deidentify else None
    if options.nnactive is not None:
        paths = write_loops(options.folder, options.method, options.seed, options.nnactive, names)
        sys.stdout.write(f"{len(paths)} loop files: {options.nnactive}\n")
    if options.nnunet is not None:
        written = write_nnunet(options.folder, options.method, options.seed, options.round, options.nnunet, names)
        sys.stdout.write(f"nnU-Net dataset: {written}\n")


def _export_studies(options: argparse.Namespace) -> None:
    from eval.app_tools.export_studies import export_studies

    of_runs = {"folder": "the folder of a run", "method": "--method", "seed": "--seed", "nnactive": "--nnactive"}
    given = [text for name, text in of_runs.items() if getattr(options, name) is not None]
    if given or options.nnunet is None:
        found = f"found {given[0]}; leave it out" if given else "found no --nnunet"
        raise RefereeError(f"export --studies needs --nnunet FOLDER and no part of a run: {found}")
    card = export_studies(options.studies, options.nnunet, options.deidentify)
    sys.stdout.write(f"nnU-Net dataset of {card['numTraining']} images: {options.nnunet}\n")


def _bench(options: argparse.Namespace) -> None:
    from eval.app_tools.bench import bench

    bench(options.name, options.json, options.cases, options.seed)


def _methods(options: argparse.Namespace) -> None:
    from eval.app_tools.list_methods import methods_json

    rows: list[dict[str, Any]] = methods_json()
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    for row in rows:
        sys.stdout.write(f"{row['name']:<28} {row.get('summary', '')}\n")


def _plan(options: argparse.Namespace) -> None:
    from eval.app_tools.planning.show_plan import plan_text

    text = plan_text(options.folder, options.bundle, options.device, options.memory, options.out)
    sys.stdout.write(f"{text}\n")


def _configurations(options: argparse.Namespace) -> None:
    from eval.app_tools.planning.configurations import configurations_text

    def notice(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    chosen = options.device, options.memory, options.folds, options.steps, options.subject, options.seed
    sys.stdout.write(f"{configurations_text(options.folder, *chosen, notice)}\n")


def _gallery(options: argparse.Namespace) -> None:
    from eval.app_tools.gallery import write_gallery

    sys.stdout.write(f"gallery: {write_gallery(options.out)}\n")


def _backup(options: argparse.Namespace) -> None:
    from eval.app_tools.backup import backup

    sys.stdout.write(backup(options.studies, options.folder).text() + "\n")


def _audit(options: argparse.Namespace) -> None:
    from eval.app_tools.audit import audit, audit_json, audit_text

    found = audit(options.studies)
    sys.stdout.write((audit_json(found) if options.json else audit_text(found)) + "\n")
    if found.problems:
        raise RefereeError(f"{options.studies}: {len(found.problems)} files do not match the ledger; see above")


def _doctor(options: argparse.Namespace) -> None:
    from eval.app_tools.doctor import as_json, as_table, findings

    found = findings(options.studies, options.port)
    sys.stdout.write((as_json(found) if options.json else as_table(found)) + "\n")
    problems = [finding for finding in found if finding.state == "problem"]
    if problems:
        raise RefereeError(f"{len(problems)} problems, first: {problems[0].check}: {problems[0].found}")


def _workers(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100_000:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, found {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Replay active learning against ground truth.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.set_defaults(command=command)
        return made

    run = add("run", _run, "run a study from its YAML file")
    run.add_argument("study", type=Path)
    run.add_argument("--out", type=Path, help="new folder for the results")
    run.add_argument("--dry-run", action="store_true", help="print the cells, the expected hours and disk, and stop")
    run.add_argument("--only", metavar="FILTER", help="some cells: method=NAME,seed=NUMBER, each as often as needed")
    run.add_argument("--calibrate", type=Path, metavar="DIR", help="with --dry-run: seconds from this finished run")
    merge = add("merge", _merge, "join the finished cells of several runs of one study")
    merge.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    merge.add_argument("--out", type=Path, required=True, help="new folder for the whole")
    merge.add_argument("--mixed", action="store_true", help="join runs of different hardware or versions, and note it")
    resume = add("resume", _resume, "go on with a run that was stopped or killed")
    resume.add_argument("folder", type=Path)
    resume.add_argument("--mixed", action="store_true", help="go on with other hardware or versions, and note it")
    for made in (run, resume):
        made.add_argument("--workers", type=_workers, default=1, help="cells at a time, one server each")
        made.add_argument("--server", metavar="URL", help="use this running server instead of starting one")
        made.add_argument("--scheduler", metavar="ADDRESS", help="run the cells on the workers of this Dask scheduler")
        made.add_argument("--gpu", action="store_true", help="with --scheduler: a cell takes a worker's GPU")
        made.add_argument("--quiet", action="store_true", help="no progress bar")
    report = add("report", _report, "write report.html, plots and tables of finished rounds")
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    report.add_argument("--claim", action="store_true", help="refuse fewer seeds than a ranking needs")
    report.add_argument("--mixed", action="store_true", help="report runs of different hardware or versions together")
    report.add_argument("--no-pictures", action="store_true", help="leave pictures of scans out")
    report.add_argument(
        "--deidentify", action="store_true", help="into DIR/deidentified: case_001, ... for images, no paths or hosts"
    )
    export = add("export", _export, "write the labels of a project, or the regions of a run, for other tools")
    export.add_argument("folder", type=Path, nargs="?", help="a run; with --method and --seed")
    export.add_argument("--studies", type=Path, metavar="DIR", help="a project instead of a run; with --nnunet")
    export.add_argument("--method")
    export.add_argument("--seed", type=int)
    export.add_argument("--round", type=int, default=10_000, help="annotated up to this round; default: all")
    export.add_argument("--nnactive", type=Path, metavar="FOLDER", help="loop_XXX.json of every round")
    export.add_argument("--nnunet", type=Path, metavar="FOLDER", help="annotated pool with its ignore label")
    export.add_argument("--deidentify", action="store_true", help="case_001, ... for images, and plain headers")
    bench = add("bench", _bench, "measure against the plain way of doing the same")
    bench.add_argument("name")
    bench.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="rows, versions and hardware, to FILE or stdout",
    )
    bench.add_argument("--cases", type=_workers, default=50_000, help="of fuzz: how many, over all surfaces")
    bench.add_argument("--seed", type=int, default=0, help="of fuzz: another seed draws other cases")
    methods = add("methods", _methods, "list the query methods")
    methods.add_argument("--json", action="store_true")
    compared = add("configurations", _configurations, "train each kind of network shortly, compare them out of fold")
    compared.add_argument("folder", type=Path)
    compared.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    compared.add_argument("--memory", type=_gib, metavar="GIB", help="memory of a training step; default: measured")
    compared.add_argument("--folds", type=int, default=2, metavar="N")
    compared.add_argument("--steps", type=int, metavar="N", help="of each training; default: a quarter of `quick`")
    compared.add_argument("--subject", metavar="REGEX", help="its first group is the subject of an image id")
    compared.add_argument("--seed", type=int, default=0)
    plan = add("plan", _plan, "plan spacing, crops, network and normalisation for a folder of scans")
    plan.add_argument("folder", type=Path)
    plan.add_argument("--bundle", default="auto", metavar="NAME", help="default: the one that suits the images")
    plan.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    plan.add_argument("--memory", type=_gib, metavar="GIB", help="memory of a training step; default: measured")
    plan.add_argument("--out", type=Path, metavar="FILE", help="write the plan as YAML, for --conf plan FILE")
    gallery = add("gallery", _gallery, "draw the picks of every method on the same phantom posterior")
    gallery.add_argument("--out", type=Path, default=Path("gallery.html"), help="the page to write")
    audited = add("audit", _audit, "compare every label on disk with its rebuild from the raw answers")
    audited.add_argument("studies", type=Path)
    audited.add_argument("--json", action="store_true")
    saved = add("backup", _backup, "copy ledger, raw answers and models while the server is in use")
    saved.add_argument("studies", type=Path)
    saved.add_argument("folder", type=Path, help="a new folder")
    doctor = add("doctor", _doctor, "check the installation, and a studies folder")
    doctor.add_argument("studies", type=Path, nargs="?")
    doctor.add_argument("--port", type=int, default=8000, help="port of the future server")
    doctor.add_argument("--json", action="store_true")
    return parser


def _stop_like_interrupt(number: int) -> None:
    """A polite kill stops servers as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(number, stop)


if __name__ == "__main__":
    raise SystemExit(main())
