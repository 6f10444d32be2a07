# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The registry of published methods: a table from the published name to its composition. Data, no code."""

from __future__ import annotations

from lib.registry_schema import Option, QueryMethod, Selector

_NNACTIVE = "Lüth et al. 2025, nnActive (TMLR)"
_BETA = Option(1.0, "float", 1e-3, 1e6, help="strength of the score against the noise: the higher, the greedier")

_SHARE = Option("66", "str", choices=("33", "66"), help="per cent of regions centred on foreground")

POSTERIOR_OPTIONS: dict[str, dict[str, Option]] = {
    "single": {},
    "ensemble": {},
    "mc_dropout": {
        "passes": Option(10, "int", 2, 200, help="stochastic passes"),
        "dropout": Option(0.1, "float", 0.0, 0.95, help="dropout rate while querying"),
    },
    "tta": {
        "flips": Option(True, "bool", help="mirrored copies"),
        "rotations": Option(7, "int", 0, 50, help="rotated copies, by whole degrees from -10 to 10"),
        "noise": Option(0.01, "float", 0.0, 1.0, help="standard deviation of noise added to each copy"),
    },
}

SELECTORS: dict[str, Selector] = {
    "greedy": Selector("the highest scores, no two overlapping"),
    "power": Selector("greedy on log score plus Gumbel noise", options={"beta": _BETA}),
    "softrank": Selector("greedy on minus log rank plus Gumbel noise", options={"beta": _BETA}),
    "random": Selector("uniform over positions, images in turn", scored=False),
    "random_fg": Selector(
        "random, a share of it centred on foreground of the hints",
        scored=False,
        needs=frozenset({"hints"}),
        options={"foreground": _SHARE},
    ),
    "random_fg_predicted": Selector(
        "random, a share of it centred on predicted foreground",
        scored=False,
        needs=frozenset({"model"}),
        options={"foreground": _SHARE},
    ),
    "starting_budget": Selector(
        "regions of every hinted class in different images, then random with 33 % foreground",
        scored=False,
        needs=frozenset({"hints"}),
        options={"per_class": Option(2, "int", 1, 100, help="regions of every class")},
    ),
    "precomputed": Selector("the regions of the request, in their order", scored=False, needs=frozenset({"regions"})),
}

_ENTRIES = (
    QueryMethod(
        "predictive_entropy", "ensemble", "predictive_entropy", "patch", "greedy",
        paper=_NNACTIVE, section="4", summary="highest entropy of the mean prediction",
    ),
    QueryMethod(
        "expected_entropy", "ensemble", "expected_entropy", "patch", "greedy",
        paper=_NNACTIVE, section="4", summary="highest mean entropy of the members",
    ),
    QueryMethod(
        "bald", "ensemble", "bald", "patch", "greedy",
        paper=_NNACTIVE, section="4", summary="highest mutual information: where members disagree",
    ),
    QueryMethod(
        "power_bald", "ensemble", "bald", "patch", "power",
        paper=_NNACTIVE, section="4.1", summary="mutual information with power noise",
    ),
    QueryMethod(
        "power_pe", "ensemble", "predictive_entropy", "patch", "power",
        paper=_NNACTIVE, section="4.1", summary="predictive entropy with power noise",
    ),
    QueryMethod(
        "softrank_bald", "ensemble", "bald", "patch", "softrank",
        paper=_NNACTIVE, section="4.2", summary="mutual information with noise on its ranks",
    ),
    QueryMethod(
        "random", None, None, "patch", "random",
        paper=_NNACTIVE, section="4.6", summary="uniform random regions",
    ),
    QueryMethod(
        "random_fg33", None, None, "patch", "random_fg", {"foreground": "33"},
        paper=_NNACTIVE, section="4.6", summary="random, one third centred on foreground of the hints",
    ),
    QueryMethod(
        "random_fg66", None, None, "patch", "random_fg", {"foreground": "66"},
        paper=_NNACTIVE, section="4.6", summary="random, two thirds centred on foreground of the hints",
    ),
    QueryMethod(
        "random_fg_predicted", "ensemble", None, "patch", "random_fg_predicted",
        paper=_NNACTIVE, section="4.6", summary="random, two thirds centred on predicted foreground",
    ),
    QueryMethod(
        "starting_budget", None, None, "patch", "starting_budget",
        paper=_NNACTIVE, section="5", summary="first batch: every hinted class in two images, then random",
    ),
    QueryMethod(
        "precomputed", None, None, "patch", "precomputed",
        paper=_NNACTIVE, section="4", summary="replay of the regions another run asked for",
    ),
)  # fmt: skip

REGISTRY: dict[str, QueryMethod] = {m.name: m for m in _ENTRIES}

ALIASES: dict[str, tuple[str, dict[str, object]]] = {
    "pred_entropy": ("predictive_entropy", {}),
    "exp_entropy": ("expected_entropy", {}),
    "mutual_information": ("bald", {}),
    **{f"power_bald_b{beta}": ("power_bald", {"beta": float(beta)}) for beta in (5, 10, 20, 40)},
    "random-label": ("random_fg66", {}),
    "random-label2": ("random_fg33", {}),
    "random-label2-all-classes": ("starting_budget", {}),
    "precomputed-queries": ("precomputed", {}),
}

RECOMMENDED: tuple[str, ...] = ("power_pe", "predictive_entropy", "random")
