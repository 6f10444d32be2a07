# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""`make annotate`: a server on phantoms, or on the scans of DATA, and the page to annotate them in the browser."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from eval.demo import phantoms
from eval.errors import RefereeError
from eval.files import place
from eval.runner.server import PROJECT, ServerProcess


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the server, open the page, and serve until interrupted; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.annotate", description="Annotate regions in the browser.")
    parser.add_argument(
        "--data", type=Path, help="folder of scans, or with dataset.json and imagesTr; default: phantoms"
    )
    parser.add_argument("--labels", help="class names 'a,b', if the folder has no dataset.json that names them")
    parser.add_argument("--out", type=Path, default=PROJECT / "runs" / "annotate", help="folder for phantoms and links")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)
    conf = {"auto_score": True, **({"labels": options.labels} if options.labels else {})}
    try:
        studies = studies_of(options.data or phantoms(options.out / "data"), options.out / "studies")
        server = ServerProcess(studies, conf, log=options.out / "server.log", threads=os.cpu_count() or 1)
        server.start()
    except RefereeError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    address = f"{server.url}/patchwise/annotate"
    sys.stdout.write(f"annotate: {address}\nanswers:  {studies / 'labels' / 'final'}\nCtrl-C ends the server.\n")
    sys.stdout.flush()
    try:
        if not options.no_browser:
            webbrowser.open(address)
        ended.wait()
    finally:
        server.stop()
    return 0


def studies_of(data: Path, made: Path) -> Path:
    """Studies folder of `data`: itself, or for a dataset `made` with links to its images and without its labels.

    Raises:
        RefereeError: no such folder.
    """
    if not data.is_dir():
        raise RefereeError(f"DATA={data}: no such folder; give a folder of NIfTI or NRRD scans")
    images = data / "imagesTr"
    if not images.is_dir():
        return data
    made.mkdir(parents=True, exist_ok=True)
    for image in sorted(images.iterdir()):
        if not image.name.startswith(".") and not (made / image.name).exists():
            place(image, made / image.name)
    if (data / "dataset.json").is_file():
        shutil.copyfile(data / "dataset.json", made / "dataset.json")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
