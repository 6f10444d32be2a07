# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Patchwise: the MONAI Label app. Wires the parts of `lib` together, and nothing else."""

from __future__ import annotations

import logging
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from lib.adapters.batch_planner import BatchPlanner
from lib.adapters.infer_tasks import QueryRegionTask, SegmentationTask
from lib.adapters.pool_evidence import COMPOSE
from lib.adapters.query_strategy import QueryStrategy
from lib.adapters.region_choice import ChoiceParts
from lib.adapters.scoring_method import MomentsScoring
from lib.adapters.train_task import EnsembleTrainTask
from lib.agreement import summarise
from lib.annotator.explanations import Explanations
from lib.annotator.predicted_regions import PredictedRegions
from lib.automation import background_tasks
from lib.automation.auto_rounds import AutoRounds
from lib.automation.auto_scoring import AutoScoring
from lib.automation.background_tasks import Failures, Kind, one_at_a_time
from lib.automation.server_rounds import ServerWork
from lib.automation.shutdown import end_start, end_tasks_with_server, end_with_server
from lib.automation.ticker import Ticker
from lib.dashboard.counts import Counts
from lib.dashboard.snapshot import Snapshot
from lib.dicom.datastore import DicomDatastore, state_folder
from lib.dicom.web_client import DicomWebClient
from lib.errors import PatchwiseError, refuse
from lib.ledger.queries import QueryLedger
from lib.middleware.bind_check import check_listening
from lib.middleware.client_identity import Clients
from lib.models.checkpoints import ModelStore
from lib.models.class_names import check_same_ids, resolve_classes
from lib.models.plan import Plan
from lib.models.precision import check_device
from lib.options import AppOptions, OptionError, describe_options, parse_options
from lib.planning.bundle_choice import load_bundles
from lib.prediction.moments_cache import MomentsCache
from lib.querying.methods import listed, resolve
from lib.querying.registry import REGISTRY
from lib.routes.install import install
from lib.routes.services import Services
from lib.storage.folder_lock import hold_folder
from lib.studies.datastore import STATE_FOLDER, PartialLabelDatastore
from lib.studies.folder_listing import FolderListing
from lib.studies.request_context import saved_answer
from lib.studies.startup_repair import repair_studies
from lib.uncertainty import SCORE_MAPS

logger = logging.getLogger(__name__)

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


class PatchwiseApp(MONAILabelApp):
    """Active learning on regions: `monailabel start_server --app apps/activelearning --studies DIR`."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        try:
            self._wire(app_dir, studies, conf)
        except (PatchwiseError, OSError, sqlite3.Error) as error:
            end_start(error)

    def _wire(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        end_with_server()
        check_listening(sys.argv[1:], settings.MONAI_LABEL_AUTH_ENABLE)
        self.options = parse_options(dict(conf or {}))
        check_device(self.options.device)
        root = _root(studies, self.options)
        folder = self.options.bundles or BUNDLES
        written = [root, Path(settings.MONAI_LABEL_SESSION_PATH or Path.home() / ".cache" / "monailabel")]
        state = root / STATE_FOLDER
        images = FolderListing(root).paths()
        self.bundles, self.chosen = load_bundles(self.options, folder, images, state / "models", written)
        first = next(iter(self.bundles.values()))
        self.classes = resolve_classes(self.options.labels, root, first.metadata)
        self.listed_methods = listed(self.options.methods)
        self.segmenters = {
            name: SegmentationTask(bundle, ModelStore(state / "models", name), self.classes, self.options)
            for name, bundle in self.bundles.items()
        }
        self.trainers = {
            name: EnsembleTrainTask(bundle, self.segmenters[name].store, self.classes, self.options, state)
            for name, bundle in self.bundles.items()
        }
        resolve(self.options.auto_method or self.listed_methods[0])
        next(iter(self.trainers.values())).parse(self.options.auto_train)
        self._lock = hold_folder(root, state) if "start_server" in sys.argv[1:] else None
        self.ledger = QueryLedger(state / "ledger.sqlite", idle_minutes=self.options.idle_minutes)
        if self.ledger.answers.images(withdrawn=True):
            check_same_ids(self.classes, self.ledger.get_meta("classes"))
        # A later check of the labels needs the meaning of their values.
        if self.ledger.get_meta("classes") != self.classes:
            self.ledger.set_meta("classes", self.classes)
        self.clients = Clients()
        self.root = root
        self.store = self._open(studies)
        self.cache = MomentsCache(
            root / STATE_FOLDER / "moments", self.store.image_path, self.store.image_digest, self.options.keep_moments
        )
        self.reasons = Explanations(root / STATE_FOLDER / "reasons")
        self.proposals = PredictedRegions(root / STATE_FOLDER / "proposals", self.cache)
        self.planner = BatchPlanner(self.ledger)
        self.failures = Failures(self.ledger)
        self.scorings = AutoScoring(self.segmenters, self.store, self.cache, self.options.auto_score)
        self.rounds = self._auto_rounds()
        self._supervise()
        super().__init__(
            app_dir,
            studies,
            conf,
            name="Patchwise",
            description="Active learning on regions of 3D scans",
            version="0.1.0",
            labels=list(self.classes),
        )
        # Upstream would start a scoring process after every request; here, scoring is requested explicitly.
        self._auto_update_scoring = False

    def init_datastore(self) -> Datastore:
        return self.store

    def init_infers(self) -> dict[str, InferTask]:
        # First in the list: Slicer runs it by itself when a sample is loaded.
        return {"query_region": QueryRegionTask(self.ledger, self.classes), **self.segmenters}

    def init_trainers(self) -> dict[str, TrainTask]:
        return dict(self.trainers)

    def init_strategies(self) -> dict[str, Strategy]:
        return {name: self._strategy(name) for name in self.listed_methods}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        return {
            name: MomentsScoring(name, self.segmenters, self.cache, self._strategy, self.listed_methods)
            for name in SCORE_MAPS
        }

    def _open(self, studies: str) -> PartialLabelDatastore:
        if not _is_remote(studies):
            return PartialLabelDatastore(self.root, self.classes, self.ledger)
        return DicomDatastore(
            self.root,
            self.classes,
            self.ledger,
            DicomWebClient(studies),
            poll_seconds=self.options.poll_seconds,
            store_segmentations=self.options.store_segmentations,
        )

    def on_init_complete(self) -> None:
        try:
            self._lock = self._lock or hold_folder(self.root, self.root / STATE_FOLDER)
            self._complete()
        except (PatchwiseError, OSError, sqlite3.Error) as error:
            end_start(error)

    def _complete(self) -> None:
        if isinstance(self.store, DicomDatastore):
            self.store.connect()
        images = {image: self.store.image_path(image) for image in self.store.list_images()}
        self.store.unused()
        models = [segmenter.store for segmenter in self.segmenters.values()]
        for sentence in repair_studies(self.store.annotations, images, models):
            logger.warning("%s", sentence)
        super().on_init_complete()
        self.ledger.stay_open()
        install(self._services())
        end_tasks_with_server(self.background.stop)
        if isinstance(self.store, DicomDatastore):
            self.store.watch()
        # The first query needs the grid of every image, and reading them takes a while.
        threading.Thread(target=self._look_at_pool, name="pool", daemon=True).start()
        if self.rounds is not None or self.options.auto_score:
            self.background.start()

    def _services(self) -> Services:
        return Services(
            options=self.options,
            classes=self.classes,
            studies=self.studies,
            store=self.store,
            ledger=self.ledger,
            trainers=self.trainers,
            segmenters=self.segmenters,
            clients=self.clients,
            reasons=self.reasons,
            predictions=self.proposals,
            progress=self.progress,
            background=self.background,
            sessions=self.sessions,
            opened=self.opened,
        )

    def info(self) -> dict[str, Any]:
        model = next(iter(self.segmenters.values())).store.current()
        meta: dict[str, Any] = super().info()
        meta["patchwise"] = {
            "labels": self.classes,
            "options": describe_options(self.options),
            "chosen": self.chosen,
            "model": model.facts.model_dump(mode="json") if model else None,
            "methods": {name: {"posterior": m.posterior, "unit": m.unit} for name, m in REGISTRY.items()},
            "queries": self.ledger.counts(),
            "agreement": summarise(self.ledger.answers.agreements(), self.classes),
            "plans": {name: plan.model_dump(mode="json") for name, plan in self._plans().items()},
            "training": {name: task.progress() for name, task in self.trainers.items()},
            "failures": {"train": self.failures.get("train"), "scoring": self.failures.get("scoring")},
            "rounds": self.rounds.told() if self.rounds else None,
            "left_out": self.store.left_out(),
        }
        if isinstance(self.store, DicomDatastore):
            meta["patchwise"]["pacs"] = self.store.pacs_status()
        return meta

    def _plans(self) -> dict[str, Plan]:
        """The plan in force of each bundle; none before its first training."""
        found = {name: task.plans.current() for name, task in self.trainers.items()}
        return {name: plan for name, plan in found.items() if plan}

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Regions by any registry name, listed or not."""
        name = str(request.get("strategy") or self.listed_methods[0])
        if name != COMPOSE:
            try:
                resolve(name)
            except PatchwiseError as error:
                refuse(str(error), 404)
            name, request = self._in_turn(name, request)
        try:
            answer = self._strategy(name)({**request, "client_id": self.clients.identify(request)}, self.store)
        except PatchwiseError as refused:
            if refused.status == 409 and self.rounds and self.rounds.step in ("score", "plan"):
                refuse("every region is taken and the next batch is being prepared; ask again in a minute", 409)
            raise
        if not answer:
            return {}
        if isinstance(self.store, DicomDatastore):
            answer["PatientID"] = self.store.with_patient(answer["id"], answer["PatientID"])
        return {**answer, "path": self.store.get_image_uri(answer["id"])}

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Keep the image's id, which upstream replaces by its path; inference on an image counts as work on it."""
        image, client = request.get("image"), self.clients.identify(request)
        if isinstance(image, str):
            self.ledger.leases.touch(client, image, opening=True)
        result: dict[str, Any] = super().infer({**request, "image_id": image, "client_id": client}, datastore)
        return result

    def opened(self, image: str) -> None:
        """Record a download of an image by a holder of a region there; the request has an address, but no client id."""
        for client in self.clients.here():
            if self.ledger.leases.touch(client, image, opening=True):
                return

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        with one_at_a_time(self.root / STATE_FOLDER / "train.lock", wait=not self._server_mode):
            return self._run("train", super().train, request)

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        return self._run("scoring", super().scoring, request)

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """Response to the client about its submission."""
        number = saved_answer()
        answer = None if number is None else self.ledger.answers.get(number)
        if answer is None:
            return {}
        return {
            "answer": answer.id,
            "queries": [query for query, _ in answer.regions if query is not None],
            "labelled_voxels": sum(region.voxels for _, region in answer.regions),
        }

    def _look_at_pool(self) -> None:
        try:
            self.store.left_out()
        except PatchwiseError as error:
            logger.warning("%s", error)

    def _strategy(self, name: str) -> QueryStrategy:
        description = "a combination without a name" if name == COMPOSE else resolve(name).summary
        return QueryStrategy(
            name,
            description,
            self._parts(),
            self.planner,
        )

    def _parts(self) -> ChoiceParts:
        stores = self.cache, self.reasons, self.proposals
        return ChoiceParts(self.classes, self.options, self.segmenters, *stores, self.scorings.want)

    def _in_turn(self, name: str, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """In automatic mode, serve single-region requests from the planned batch, regardless of the client's method.

        Before the first training that is a random batch; while a new model's batch is being prepared, it is the batch
        planned with the last one.
        """
        if self.rounds is None or request.get("batch"):
            return name, request
        model = next(iter(self.segmenters.values())).store.current()
        if planned := self.ledger.overview.planned_method(model.round + 1 if model else 0):
            return planned, request
        if model is None:
            return "random" if resolve(name).posterior else name, request
        if self.rounds.step != "wait" and (left := self.ledger.overview.planned_method(model.round)):
            return left, {**request, "round": model.round}
        return name, request

    def _auto_rounds(self) -> AutoRounds | None:
        """Automatic rounds, if the option is on."""
        if not self.options.auto_rounds:
            return None
        bundle, trainer = next(iter(self.trainers.items()))
        method = resolve(self.options.auto_method or self.listed_methods[0])
        return AutoRounds(
            ServerWork(
                bundle,
                method.name,
                trainer.store,
                self.store,
                self.cache,
                self._strategy,
                self.options,
                self.failures,
            )
        )

    def _supervise(self) -> None:
        """Create the data of the progress page and the background thread."""
        self.measures = Counts(self.root / STATE_FOLDER / "measures.sqlite", self.store, self.proposals)
        self.progress = Snapshot(
            self.store,
            self.measures,
            self.trainers,
            self.cache,
            self.reasons,
            self.options,
            self.rounds,
            self.failures,
            background_tasks,
            lambda: self.scorings.waiting,
        )
        ticks = [self.rounds.tick] if self.rounds else [self.scorings.tick]
        self.background = Ticker([*ticks, self.measures.catch_up, self.progress.refresh])

    def _run(self, what: Kind, work: Any, request: dict[str, Any]) -> dict[str, Any]:
        """Run a task; in a child process a refusal ends with one sentence and exit code 2, not a traceback."""
        try:
            result: dict[str, Any] = work(request)
        except PatchwiseError as refused:
            self.failures.note(what, str(refused))
            if self._server_mode:
                raise
            logger.error("%s refused: %s", what, refused)
            raise SystemExit(2) from refused
        except Exception as error:
            self.failures.note(what, f"{type(error).__name__}: {error}")
            raise
        self.failures.note(what, None)
        return result


def _is_remote(studies: str) -> bool:
    return studies.startswith(("http://", "https://"))


def _root(studies: str, options: AppOptions) -> Path:
    """The studies folder, or the state folder of a DICOMweb server.

    Raises:
        OptionError: no such folder, or a state folder although the studies folder has its own.
    """
    if _is_remote(studies):
        return state_folder(studies, options.state)
    if options.state is not None:
        raise OptionError("--conf state: a studies folder keeps its state itself; leave the option out")
    root = Path(studies).resolve()
    if not root.is_dir():
        raise OptionError(f"--studies {studies}: no such folder; make it and put images into it")
    return root
