# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Faults one after the other: `python -m tests.faults --count 500 --seed 0 --images 2000 --out FILE.jsonl`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.protocol.manifest import describe_machine, describe_versions
from tests.faults.kinds import FAULTS, LONG_FAULTS, Fault
from tests.faults.referee import BackgroundStudy
from tests.faults.world import RESTART_SECONDS, World


def deck(count: int, rng: np.random.Generator, faults: Mapping[Fault, int] = FAULTS) -> list[Fault]:
    """`count` faults in random order, each kind by its share and at least once."""
    shares = {fault: share * count / sum(faults.values()) for fault, share in faults.items()}
    chosen = [fault for fault, share in shares.items() for _ in range(max(1, int(share)))]
    left = sorted(shares, key=lambda fault: shares[fault] % 1, reverse=True)
    chosen += [left[i % len(left)] for i in range(max(0, count - len(chosen)))]
    return [chosen[i] for i in rng.permutation(len(chosen))][:count]


def strike(world: World, faults: Sequence[Fault], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Cause one fault after the other, restart the server after each and check everything; yield a row per fault."""
    world.working.set()
    for number, fault in enumerate(faults, start=1):
        before = len(world.told.answers)
        time.sleep(float(rng.uniform(0, world.trouble)))
        fault(world, rng)
        seconds = world.restart()
        if number == len(faults):
            world.verified.clear()  # the last look is at everything
        with world.quiet():
            problems = world.problems()
        world.working.set()
        yield {
            "number": number,
            "fault": fault.__name__,
            "cold": world.server.was_cold,
            "restart_s": round(seconds, 2),
            "answers": len(world.told.answers) - before,
            "problems": problems,
        }


def summary(rows: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """Counts and the longest restart; `wrong_voxels` is of every label at the end."""
    cold = [row["restart_s"] for row in rows if row["cold"]]
    return {
        "faults": len(rows),
        "kinds": dict(Counter(row["fault"] for row in rows)),
        "answers": len(world.told.answers),
        "statuses": {str(status): count for status, count in sorted(world.told.statuses.items())},
        "problems": sum(len(row["problems"]) for row in rows),
        "wrong_voxels": world.wrong_voxels(),
        "restart_s_median": round(float(np.median([row["restart_s"] for row in rows])), 2),
        "restart_s_longest": max(row["restart_s"] for row in rows),
        "cold_restarts": len(cold),
        "cold_restart_s_median": round(float(np.median(cold)), 2) if cold else None,
        "restart_s_bar": RESTART_SECONDS,
    }


def main(arguments: list[str]) -> int:
    """Exit code 0 when nothing was lost or wrong and every restart was in time."""
    from tests.faults.pool import make_pool

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--cold", type=int, default=5, help="every so-manyth start is that of a new process; 1: all")
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each fault, then a summary")
    options = parser.parse_args(arguments)
    # Neither the server nor the file system may remain after the end of the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    began, rows, rng = time.monotonic(), [], np.random.default_rng(options.seed)
    setting = {"images": options.images, "seed": options.seed, "cold": options.cold}
    setting |= {"versions": describe_versions(), "hardware": describe_machine()}
    with tempfile.TemporaryDirectory() as name, open(options.out, "w") as out:
        folder = Path(name)
        images, labels = make_pool(folder / "phantoms", options.images)
        lasting = {"pause": 0.5, "trouble": 1.0, "standstill": 60.0}
        world = World(folder / "world", images, labels, cold=options.cold, room="8g", **lasting)
        try:
            world.referee = BackgroundStudy(folder / "referee", folder / "phantoms")
            world.prepare()
            for row in strike(world, deck(options.count, rng, LONG_FAULTS), rng):
                rows.append(row)
                print(json.dumps(row), file=out, flush=True)
            study = world.referee.finish()
            found = {**summary(rows, world), "referee_kills": world.referee.kills, "referee_problems": study}
            found |= {"minutes": round((time.monotonic() - began) / 60, 1), **setting}
            print(json.dumps({"summary": found}), file=out, flush=True)
        finally:
            world.close()
    print(json.dumps(found, indent=1))
    return int(
        bool(found["problems"] or study or found["wrong_voxels"] or found["restart_s_longest"] > RESTART_SECONDS)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
