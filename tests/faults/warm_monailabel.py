# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Starts servers from a process that has imported everything: the same program, without the seconds of its imports.

Reads a line of JSON for each (`arguments`, `log`, `folder`, `env`), writes the number of the process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback

MODULES = (
    "monailabel.main",
    "monailabel.app",
    "monailabel.interfaces.app",
    "monai.bundle",
    "monai.inferers",
    "monai.networks.nets",
    "sklearn.cluster",
    "matplotlib",
    "lib.querying.selection",
    "lib.routes.install",
    "lib.adapters.query_strategy",
    "lib.adapters.train_task",
    "lib.studies.startup_repair",
    "lib.dashboard.snapshot",
)


def serve(wanted: dict) -> None:
    """In the child: becomes the server."""
    from monailabel.config import settings

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(wanted["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for place, handle in enumerate((nothing, log, log)):
        os.dup2(handle, place)
    os.environ.clear()
    os.environ.update(wanted["env"])
    # Both were read from the environment of this process's parent.
    tempfile.tempdir = None
    settings.__init__()  # type: ignore[misc]
    os.chdir(wanted["folder"])
    sys.argv = ["monailabel", *wanted["arguments"]]
    from monailabel.main import Main

    Main().run()


def main() -> None:
    # Output of the imports goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in MODULES:
        importlib.import_module(module)
    # Children are not waited for, so they vanish when they end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                serve(json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, file=answers, flush=True)


if __name__ == "__main__":
    main()
