# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import json

import pytest

from lib.querying.methods import REGISTRY, REQUEST_KEYS, MethodError, compose, describe, listed, options_of, resolve
from lib.querying.registry import ALIASES, RECOMMENDED, SELECTORS


@pytest.mark.parametrize("name", REGISTRY)
def test_every_registered_method_resolves(name: str) -> None:
    method = resolve(name)
    assert method.name == name
    assert method.paper
    assert method.section
    assert method.summary
    assert set(method.options) == set(options_of(method))
    for key, option in options_of(method).items():
        assert option.parse(key, option.default) == option.default
        assert option.help
        assert key not in REQUEST_KEYS


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_resolves(alias: str) -> None:
    assert resolve(alias).name == ALIASES[alias][0]


def test_names_presets_and_lists() -> None:
    assert resolve("power_bald_b10").options["beta"] == 10
    assert resolve("power_bald_b10", {"beta": 3}).options["beta"] == 3
    assert resolve("random_fg33").options["foreground"] == "33"
    assert listed() == list(RECOMMENDED)
    assert listed(["all"]) == list(REGISTRY)
    assert listed(["pred_entropy", "bald", "bald"]) == ["predictive_entropy", "bald"]


def test_options_from_json_and_from_forms() -> None:
    assert resolve("power_pe", {"beta": 5}).options["beta"] == 5.0
    assert resolve("power_pe", {"options": {"beta": "2.5"}}).options["beta"] == 2.5
    assert resolve("power_pe", {"posterior": "mc_dropout", "passes": "20"}).options["passes"] == 20
    assert resolve("power_pe", {"posterior": "ensemble*tta", "flips": "false"}).options["flips"] is False
    assert resolve("power_pe", {"unit": "slice", "uncertainty": "bald"}).unit == "slice"


def test_keys_of_clients_are_passed_over() -> None:
    resolve("random", dict.fromkeys(REQUEST_KEYS - {"options"}, "x"))


@pytest.mark.parametrize(
    ("name", "request_", "sentence"),
    [
        ("power_pee", {}, "unknown method 'power_pee': did you mean 'power_pe'"),
        ("zzz", {}, "unknown method 'zzz': see"),
        ("power_pe", {"betta": 1}, "unknown option 'betta' of power_pe: did you mean 'beta'"),
        ("power_pe", {"beta": 0}, "beta must lie between"),
        ("power_pe", {"beta": float("nan")}, "beta must lie between"),
        ("power_pe", {"beta": "high"}, "beta must be of the kind float"),
        ("power_pe", {"beta": True}, "beta must be of the kind float"),
        ("random_fg33", {"foreground": "50"}, "foreground must be one of 33, 66"),
        ("starting_budget", {"per_class": 1.5}, "per_class must be of the kind int"),
        ("power_pe", {"unit": "cube"}, "unit patch or slice or volume"),
        ("power_pe", {"uncertainty": "entropie"}, "unknown uncertainty 'entropie'"),
        ("power_pe", {"posterior": "ensemblé"}, "unknown posterior"),
        ("power_pe", {"posterior": "tta*tta"}, "each factor once"),
        ("bald", {"posterior": "single"}, "members disagree"),
        ("random", {"uncertainty": "bald"}, "ranks by no uncertainty"),
        ("random", {"posterior": "ensemble"}, "uses no model"),
        ("power_pe", {"options": [1]}, "options must be an object"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, request_: dict, sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        resolve(name, request_)


def test_composition() -> None:
    method = compose(
        {"posterior": "mc_dropout", "uncertainty": "margin", "unit": "slice", "selector": "power", "beta": 4}
    )
    assert (method.name, method.selector, method.options["beta"]) == ("composed", "power", 4.0)
    assert method.needs == {"model", "mc_dropout"}
    assert compose({"selector": "random", "name": "mine"}).name == "mine"


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({}, "needs a selector"),
        ({"selector": "greedyy"}, "unknown selector 'greedyy': did you mean 'greedy'"),
        ({"selector": "greedy", "posterior": "ensemble"}, "ranks by an uncertainty, found none"),
        ({"selector": "greedy", "uncertainty": "bald"}, "name a posterior"),
        ({"selector": "random", "uncertainty": "bald", "posterior": "ensemble"}, "ranks by no uncertainty"),
    ],
)
def test_compositions_without_sense(parts: dict, sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        compose(parts)


def test_listing_is_json_and_complete() -> None:
    listing = json.loads(json.dumps(describe()))
    assert [entry["name"] for entry in listing] == list(REGISTRY)
    for entry in listing:
        assert entry["units"] == list(SELECTORS[entry["selector"]].units)
        assert entry["cost"] in ("none", "posterior", "features", "gradients")
    power = next(entry for entry in listing if entry["name"] == "power_bald")
    assert power["options"]["beta"]["default"] == 1.0
    assert "power_bald_b40" in power["aliases"]
