# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""A cell of a study: one method with one seed, replayed round by round against its own server.

Every finished step is in `state.json` before the next begins. Each step is harmless to repeat: a query carries a
request id, a training its seed, an answer the numbers of its queries. So a killed cell continues at its last step.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.errors import RefereeError
from eval.files import place, write_json
from eval.metrics.cost import region_costs
from eval.protocol.annotator_profiles import answers
from eval.protocol.dataset import UNLABELLED, Case, Dataset, Scan, content_digest, load_truth
from eval.protocol.guards import check_no_test_image
from eval.protocol.oracle import child_rng, count_voxels, draw_hints, region_slices, to_nifti
from eval.protocol.study import AUTO, Method, Study
from eval.records.rows import case_rows
from eval.records.state import STEPS, State
from eval.runner.client import LabelClient
from eval.runner.query_pictures import keep_pictures
from eval.runner.replayed_queries import replayed
from eval.runner.server import ServerProcess
from eval.runner.shared_start import SharedStart

# Methods with hints of an annotator (here the oracle): points of classes that were seen in a screening.
HINTED = frozenset({"starting_budget", "random_fg33", "random_fg66"})


class CancelledError(Exception):
    """The run was stopped."""


@dataclass(frozen=True)
class Material:
    """Material that all cells of a study share: data, split and the number of threads per server."""

    study: Study
    dataset: Dataset
    pool: Sequence[Case]
    test: Sequence[Case]
    threads: int


class Cell:
    """Run of one method with one seed; `stop` ends it between requests.

    `notice(cell, text)` is called before each action, `finished_step(cell, step)` after a step is in the state.
    """

    def __init__(
        self,
        material: Material,
        method: Method,
        seed: int,
        folder: Path,
        *,
        url: str | None = None,
        stop: threading.Event | None = None,
        notice: Callable[[Cell, str], None] | None = None,
        finished_step: Callable[[Cell, str], None] | None = None,
    ) -> None:
        self.material = material
        self.study = material.study
        self.method = method
        self.seed = seed
        self.folder = folder
        self.url = url
        self.stop = stop or threading.Event()
        self.notice = notice or (lambda cell, text: None)
        self.finished_step = finished_step or (lambda cell, step: None)
        self.state = State(folder / "state.json")
        self.server: ServerProcess | None = None
        self.rounds = material.study.rounds
        # Of a study with `auto`, known once the server runs.
        self.bundle = material.study.bundle
        self._by_id = {case.id: case for case in material.pool}

    @property
    def name(self) -> str:
        """Name of the cell in messages and folders."""
        return f"{self.method.label}_s{self.seed}"

    @property
    def finished(self) -> bool:
        """Return whether the last step of the last round is done."""
        return self.state.get(self.rounds - 1, "test") is not None

    def run(self) -> None:
        """Complete the cell, from its present state.

        Raises:
            RefereeError: a request that failed, with the server's sentence.
            CancelledError: `stop` was set.
        """
        if self.finished:
            return
        self._watch()
        server = self.server = None if self.url else self._server()
        if server is not None:
            self._fill_studies(server.studies)
            self.notice(self, "starting server")
            server.start(self.study.server.start_seconds)
        client = LabelClient(self.url or server.url)  # type: ignore[union-attr]
        try:
            self._check_server(client)
            for round_ in range(self.rounds):
                self._round(client, round_)
        finally:
            client.close()
            if server is not None:
                server.stop()

    def abort(self) -> None:
        """End the cell from another thread: its server stops, so that a request in progress fails at once."""
        self.stop.set()
        if self.server is not None:
            self.server.stop()

    def _round(self, client: LabelClient, round_: int) -> None:
        work: dict[str, Callable[[LabelClient, int], dict[str, Any]]] = {
            "score": self._score,
            "query": self._query,
            "annotate": self._annotate,
            "train": self._train,
            "test": self._test,
        }
        for step in STEPS:
            # Scoring is repeated before an unfinished query: cached moments take no time, missing ones are computed.
            done = "query" if step == "score" else step
            if self.state.get(round_, done) is not None:
                continue
            self._watch()
            self.notice(self, f"round {round_} {step}")
            began = time.monotonic()
            result = work[step](client, round_)
            self.state.put(round_, step, {**result, "seconds": round(time.monotonic() - began, 3)})
            self.finished_step(self, step)

    def _score(self, client: LabelClient, round_: int) -> dict[str, Any]:
        """Moments of the pool under the model of the round before; round 0 has no model."""
        if round_ == 0 or not self._needs_scores(client):
            return {}
        request = {"model": self.bundle, "round": round_, "seed": self.seed, "query_method": self.method.name}
        client.score(self.study.uncertainty, {**request, **self.method.options, **self.study.score})
        return {}

    def _needs_scores(self, client: LabelClient) -> bool:
        """Return whether the method reads a posterior: as in the study, else as in the server's list."""
        if self.method.score is not None:
            return self.method.score
        if "posterior" in self.method.options:
            return bool(self.method.options["posterior"])
        listed = (client.info().get("patchwise") or {}).get("methods", {}).get(self.method.name)
        return listed is None or listed["posterior"] is not None

    def _query(self, client: LabelClient, round_: int) -> dict[str, Any]:
        start = self.study.starting_budget
        assert start is not None
        method = Method(name=start.method, options=start.options) if round_ == 0 else self.method
        request: dict[str, Any] = {
            "batch": start.batch if round_ == 0 else self.study.batch,
            "unit": self.study.unit,
            "seed": self.seed,
            "round": round_,
            "rounds": self.study.rounds,
            "model": self.bundle,
            "request_id": f"{self.method.label}/{self.seed}/{round_}",
            **self.study.query,
            **method.options,
        }
        if round_ > 0 and method.queries_from is not None:
            request["regions"] = replayed(*method.queries_from, self.seed, round_)
        if self.study.size is not None:
            request.setdefault("size", list(self.study.size))
        if self.study.oracle.profile == "late" and self.study.oracle.late_by == "lease" and round_ > 0:
            request["lease_minutes"] = self.study.oracle.lease_minutes
        if method.name in HINTED:
            request["hints"] = self._hints(round_, with_background=method.name == "starting_budget")
        regions = client.query(method.name, request)
        if not regions:
            raise RefereeError(f"{self.name}: round {round_}: {method.name} has no region left; use fewer rounds")
        keep_pictures(client, regions, self.folder / "pictures")
        return {"regions": [self._described(region) for region in regions]}

    def _described(self, region: Mapping[str, Any]) -> dict[str, Any]:
        """A region from the server, with the voxels of every class in the ground truth."""
        image = region["image"]
        if image not in self._by_id:
            raise RefereeError(f"{self.name}: the server asked for image {image}, which is not in the pool")
        kept = {key: region.get(key) for key in ("query", "image", "start", "size", "unit", "score", "reason")}
        return {**kept, **self._inside(region)}

    def _inside(self, region: Mapping[str, Any]) -> dict[str, Any]:
        """Ground truth of a region: voxels per class, and the cost of its annotation."""
        truth = self._truth(region["image"])
        return {
            "classes": count_voxels(truth.label_xyz, region, self.material.dataset.labels),
            "costs": region_costs(
                truth.label_xyz[region_slices(region)],
                truth.spacing,
                unit=region.get("unit", self.study.unit),
                axis=self.study.slice_axis,
                minutes=self.study.minutes.model_dump(),
            ),
        }

    def _annotate(self, client: LabelClient, round_: int) -> dict[str, Any]:
        queried = self.state.get(round_, "query")
        assert queried is not None
        by_image: dict[str, list[dict[str, Any]]] = {}
        for region in self._answered_now(round_):
            by_image.setdefault(region["image"], []).append(region)
        classes = [{"name": name, "idx": value} for name, value in self.material.dataset.foreground.items()]
        digest = hashlib.sha256()
        for image, regions in sorted(by_image.items()):
            self._watch()
            truth = self._truth(image)
            painted_xyz = answers(
                truth.label_xyz,
                regions,
                self.study.oracle,
                self.seed,
                foreground=self.material.dataset.foreground,
                spacing=truth.spacing,
                axis=self.study.slice_axis,
            )
            label = to_nifti(painted_xyz, truth.affine)
            digest.update(f"{image} {[r['start'] for r in regions]} ".encode() + label)
            client.save(image, label, {**self._addressed(regions), "label_info": classes})
        if not self.study.minutes.recorded:
            return {"digest": digest.hexdigest()}
        numbers = [r["query"] for r in queried["regions"] if r["query"] is not None]
        return {"digest": digest.hexdigest(), "minutes": {str(number): client.minutes(number) for number in numbers}}

    def _answered_now(self, round_: int) -> list[dict[str, Any]]:
        """Regions that the oracle answers in this round: its own, those left from the one before, without late ones."""
        oracle = self.study.oracle
        own: list[dict[str, Any]] = (self.state.get(round_, "query") or {"regions": []})["regions"]
        if oracle.profile != "late" or round_ == 0:
            return own
        late = {r["query"] for r in own if oracle.is_late(self.seed, r["query"])}
        if oracle.late_by == "lease":
            time.sleep(60 * oracle.lease_minutes + 0.1 if late else 0)
            return own
        before = self.state.get(round_ - 1, "query") if round_ > 1 else None
        left = [r for r in (before or {"regions": []})["regions"] if oracle.is_late(self.seed, r["query"])]
        return left + [r for r in own if r["query"] not in late]

    def _addressed(self, regions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Fields of a submission that link it to its queries."""
        return {"queries": [region["query"] for region in regions]}

    def _train(self, client: LabelClient, round_: int) -> dict[str, Any]:
        def watch() -> None:
            self._watch()
            self.notice(self, f"round {round_} train{_progress(client.info(), self.bundle)}")

        start = SharedStart(self.folder, self.seed, self.bundle) if round_ == 0 and self.server else None
        client.train(self.bundle, {**self.study.train, "seed": self.seed, "round": round_}, watch)
        said = client.info().get("patchwise") or {}
        shared = start is not None and start.keep(str((said.get("model") or {}).get("digest", "")))
        told = {"model": said.get("model"), "options": said.get("options"), "agreement": said.get("agreement")}
        return {**told, "shared": shared}

    def _test(self, client: LabelClient, round_: int) -> dict[str, Any]:
        sessions: dict[str, str] = self.state.content["sessions"]
        rows: list[dict[str, Any]] = []
        for case in self.material.test:
            self._watch()
            if case.id not in sessions or not client.has_session(sessions[case.id]):
                sessions[case.id] = client.open_session(case.image)
                self.state.save()
            predicted_xyz, affine = client.infer(self.bundle, sessions[case.id])
            truth = load_truth(case)
            if predicted_xyz.shape != truth.label_xyz.shape or not np.allclose(affine, truth.affine, atol=1e-3):
                raise RefereeError(
                    f"the prediction for {case.id} has shape {predicted_xyz.shape} or an affine that is not its "
                    f"image's {truth.label_xyz.shape}; the server must answer on the original grid"
                )
            # Of voxels that nobody annotated no prediction is wrong.
            ignored_xyz = truth.label_xyz == UNLABELLED
            found = case_rows(
                np.where(ignored_xyz, 0, predicted_xyz).astype(np.uint8),
                np.where(ignored_xyz, 0, truth.label_xyz).astype(np.uint8),
                self.material.dataset.foreground,
                truth.spacing,
                tolerance=self.study.surface_tolerance,
                axis=self.study.slice_axis,
            )
            rows += [{"case": case.id, **row} for row in found]
        return {"rows": rows}

    def _hints(self, round_: int, with_background: bool) -> list[dict[str, Any]]:
        labels = self.material.dataset.labels if with_background else self.material.dataset.foreground
        hints = []
        for case in self.material.pool:
            rng = child_rng(self.seed, round_, "hints", case.id)
            label_xyz = self._truth(case.id).label_xyz
            hints += draw_hints(label_xyz, labels, case.id, self.study.hints_per_class, rng)
        return hints

    def _truth(self, image: str) -> Scan:
        return load_truth(self._by_id[image])

    def _watch(self) -> None:
        if self.stop.is_set():
            raise CancelledError

    def _server(self) -> ServerProcess:
        conf = {"models": self.study.bundle, **self.study.server.conf}
        return ServerProcess(
            self.folder / "studies",
            conf,
            log=self.folder / "server.log",
            threads=self.material.threads,
            env=self.study.server.env,
        )

    def _fill_studies(self, studies: Path) -> None:
        """Pool images and class names; labels stay with the oracle."""
        studies.mkdir(parents=True, exist_ok=True)
        for case in self.material.pool:
            target = studies / case.image.name
            if not target.exists():
                place(case.image, target)
        card = {"name": self.material.dataset.name, "labels": _decathlon_labels(self.material.dataset.labels)}
        write_json(studies / "dataset.json", card)

    def _check_server(self, client: LabelClient) -> None:
        """Check that the server has the bundle and holds exactly the pool.

        Raises:
            RefereeError: another bundle, an image missing, or a test case where it could be learnt from.
        """
        info = client.info()
        models = info.get("models", {})
        if self.study.bundle == AUTO:
            self.bundle = next(iter(info.get("trainers", {})), AUTO)
        if self.bundle not in models:
            raise RefereeError(f"the server has no bundle {self.bundle}; it offers {', '.join(sorted(models))}")
        held = client.images()
        missing = sorted(self._by_id.keys() - held)
        if missing:
            raise RefereeError(f"the server does not hold pool image {missing[0]} ({len(missing)} missing); add them")
        leaked = sorted({case.id for case in self.material.test} & held)
        if leaked:
            raise RefereeError(f"the server's pool holds test case {leaked[0]} ({len(leaked)} in all); remove them")
        if self.url is not None:  # another client filled that server
            digests = [
                {c.id: content_digest(c.image) for c in cases} for cases in (self.material.test, self.material.pool)
            ]
            with tempfile.TemporaryDirectory() as folder:
                check_no_test_image({image: client.image_digest(image, Path(folder)) for image in held}, *digests)


def _progress(info: Mapping[str, Any], bundle: str) -> str:
    """Progress of a training, as reported by the server in /info; empty when it is not reported."""
    said = (info.get("patchwise") or {}).get("training", {}).get(bundle) or {}
    if not said:
        return ""
    return f" member {said['member']}/{said['members']} step {said['step']}/{said['steps']}"


def _decathlon_labels(labels: Mapping[str, int]) -> dict[str, str]:
    return {str(value): name for name, value in labels.items()}
