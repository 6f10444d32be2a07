# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Annotators that continue during faults of the server, and record all acknowledged answers."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

# Permitted refusals after a fault: no free region, expired lease, query lost with a log, full or read-only disk.
EXPECTED = frozenset({400, 404, 409, 507})
CLASSES = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]


@dataclass
class Told:
    """Acknowledged submissions, and those that were sent without a response."""

    answers: dict[int, tuple[str, int]] = field(default_factory=dict)
    withdrawn: set[int] = field(default_factory=set)
    sent: set[tuple[str, int]] = field(default_factory=set)
    unsure: set[int] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Annotator(threading.Thread):
    """Annotator that answers regions with the ground truth in a loop, and sometimes withdraws an answer.

    Args:
        name: client id.
        url: address of the server.
        labels: image -> file of its true label.
        told: record of all annotators.
        working: cleared during a pause.
        ended: set at the end.
        pause: seconds between requests.
    """

    def __init__(
        self,
        name: str,
        url: str,
        labels: Mapping[str, Path],
        told: Told,
        working: threading.Event,
        ended: threading.Event,
        pause: float,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.http = httpx.Client(base_url=url, timeout=90)
        self.labels, self.told, self.working, self.ended, self.pause = labels, told, working, ended, pause
        self.rng = np.random.default_rng(sum(name.encode()))
        self.busy = threading.Lock()

    def run(self) -> None:
        while not self.ended.is_set():
            self.working.wait(timeout=1)
            with self.busy:
                if not self.working.is_set():
                    continue
                try:
                    self._work()
                except httpx.TransportError:
                    pass
                except Exception as error:
                    self.told.failures.append(f"{self.name}: {type(error).__name__}: {error}")
                    return
            time.sleep(self.pause)

    def _work(self) -> None:
        request = {"client_id": self.name, "unit": "patch", "size": [4, 4, 4], "lease_minutes": 0.2}
        reply = self._checked(self.http.post("/activelearning/random", json=request))
        if reply is None or not reply:
            return
        region = reply["regions"][0]
        self._answer(region["image"], region["query"])
        if self.rng.random() < 0.1:
            self._take_back()

    def _answer(self, image: str, query: int) -> None:
        self.told.sent.add((image, query))
        params = {"queries": [query], "client_id": self.name, "label_info": CLASSES}
        with open(self.labels[image], "rb") as stream:
            reply = self.http.put(
                "/datastore/label",
                params={"image": image, "tag": "final"},
                data={"params": json.dumps(params)},
                files={"label": ("label.nii.gz", stream)},
            )
        stored = self._checked(reply)
        if stored is not None:
            self.told.answers[stored["answer"]] = (image, query)

    def _take_back(self) -> None:
        mine = list(self.told.answers)
        number = mine[int(self.rng.integers(len(mine)))] if mine else 0
        if not number or number in self.told.unsure:
            return
        back = number in self.told.withdrawn
        self.told.unsure.add(number)
        step = "restore" if back else "withdraw"
        reply = self._checked(self.http.post(f"/patchwise/answers/{number}/{step}", json={"client_id": self.name}))
        if reply is not None:
            (self.told.withdrawn.discard if back else self.told.withdrawn.add)(number)
            self.told.unsure.discard(number)

    def _checked(self, reply: httpx.Response) -> Any:
        """Content of a good answer, None for an expected refusal, which is one sentence."""
        self.told.statuses[reply.status_code] += 1
        if reply.status_code == 200:
            return reply.json()
        assert reply.status_code in EXPECTED, f"{reply.request.url.path}: {reply.status_code} {reply.text[:300]}"
        assert isinstance(reply.json()["detail"], str), reply.text[:300]
        return None
