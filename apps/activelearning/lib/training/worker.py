# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A process that trains members of a job: `python -m lib.training.worker FOLDER DEVICE RANK WORLD PORT`.

Reads lines `member threads` from its standard input and answers lines of JSON: progress, and `done` for each member.
It ends at once when its input does, so a training that is killed leaves nothing running.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lib.training.ensemble import Job, train_one
from lib.training.trainer import Progress, Replica


def main(folder: Path, device: torch.device, replica: Replica, port: int) -> None:
    """Train members of the job in `folder` until the input ends."""
    say = _speaker()
    wanted: queue.Queue[tuple[int, int]] = queue.Queue()
    threading.Thread(target=_listen, args=(wanted,), daemon=True).start()
    if replica.world > 1:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=replica.rank,
            world_size=replica.world,
        )
    job, cases = Job.load(folder)
    while True:
        member, threads = wanted.get()
        torch.set_num_threads(threads)

        def report(progress: Progress, member: int = member) -> None:
            say({"member": member, "step": progress.step, "steps": progress.steps, "loss": progress.loss})

        train_one(job, cases, member, device, report, replica if replica.world > 1 else None)
        say({"member": member, "done": True})


def _listen(wanted: queue.Queue[tuple[int, int]]) -> None:
    for line in sys.stdin:
        member, threads = map(int, line.split())
        wanted.put((member, threads))
    os._exit(0)


def _speaker() -> Callable[[dict[str, Any]], None]:
    """Return a writer of JSON lines to the original standard output; output of libraries then goes to the log."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: dict[str, Any]) -> None:
        stream.write(json.dumps(what) + "\n")
        stream.flush()

    return say


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.device(sys.argv[2]), Replica(int(sys.argv[3]), int(sys.argv[4])), int(sys.argv[5]))
