# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The parts of a ledger: one store for all of them, statuses as parameters, rows with names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lib.ledger
from lib.ledger import QueryLedger
from lib.ledger.records import STATUSES, Asked
from lib.regions import Region
from tests.lib.clock import Clock

MODULES = sorted(Path(lib.ledger.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_statement_spells_a_status_out(module):
    assert not re.findall(rf"'({'|'.join(STATUSES)})'", module.read_text())


def test_parts_share_one_store_and_name_their_rows(tmp_path):
    ledger = QueryLedger(tmp_path / "ledger.sqlite", Clock())
    parts = (ledger.leases, ledger.answers, ledger.overview)
    assert all(part.store is ledger.store for part in parts)
    region = Region("a", (0, 0, 0), (2, 3, 4))
    (query,) = ledger.ask("b", "random", 0, [Asked(region, "patch", 0.5, {})])
    ledger.leases.lease([query.id], "ann", 60)
    answer = ledger.answers.record("a", "r", "0", {}, "ann", [(query.id, region)])
    ledger.answers.mark_merged("a", answer, "00")
    (standing,) = ledger.overview.standing()
    (answered,) = ledger.answers.get(answer).regions
    assert (standing.status, standing.client, standing.regions, standing.voxels) == ("answered", "ann", 1, 24)
    assert (answered.query, answered.region) == (query.id, region)
    assert ledger.overview.after_round(-1).answered == 1
    assert (ledger.answers.merged("a").answer, ledger.answers.merged("a").sha256) == (answer, "00")
