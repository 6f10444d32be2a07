# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""The registry of published methods: a table from the published name to its composition. Data, no code."""

from __future__ import annotations

from dataclasses import replace

from lib.querying.method import Option, QueryMethod, Selector
from lib.selectors.core_set import core_set_steps
from lib.selectors.representative import cluster_steps, distance_steps
from lib.selectors.typiclust import typiclust_steps

_NNACTIVE = "Lüth et al. 2025, nnActive (TMLR)"
_CLASP = "Lüth et al. 2026, ClaSP PE"
_USIM = "Föllmer et al. 2024, USIM"
_BURMEISTER = "Burmeister et al. 2022, Less Is More"
_GAILLOCHET = "Gaillochet et al. 2023, Stochastic batches"
_CHLEBUS = "Chlebus et al. 2022, Uncertain slice sampling"
_BETA = Option(1.0, "float", 1e-3, 1e6, help="strength of the score against the noise: the higher, the greedier")

_SHARE = Option("66", "str", choices=("33", "66"), help="per cent of regions centred on foreground")

_LAYERS = ("last_decoder", "bottleneck", "decoder")
_FEATURES = frozenset({"model", "features"})
_GRADIENTS = frozenset({"model", "gradients"})
_COMPONENTS = Option(10, "int", 1, 1000, help="principal components of the features")
_BLOCKS = {
    "thickness": Option(5, "int", 1, 1000, help="slices of a block, both annotated ends included"),
    "pseudo_labels": Option(
        "off", "str", choices=("off", "signed_distance", "morphological"), help="how the slices between are filled"
    ),
}

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
    "class_stratified": Selector(
        "a stream of candidates for each class and one for all, with power noise on a schedule",
        options={
            "ratio": Option(0.66, "float", 0.0, 1.0, help="share of the batch given to the classes"),
            "schedule": Option(
                "none",
                "str",
                choices=("none", "constant", "exponential", "sigmoid", "sharp_sigmoid"),
                help="how beta goes from its first to its last value; none is without noise",
            ),
            "beta": replace(_BETA, help="strength of the score against the noise in the first round"),
            "beta_last": Option(100.0, "float", 1e-3, 1e6, help="the same in the last round of the plan"),
            "planned_rounds": Option(5, "int", 1, 1000, help="planned number of rounds, unless the request has one"),
        },
    ),
    "stochastic_batch": Selector(
        "random groups of units, of which the most uncertain one is taken whole",
        options={
            "groups": Option(0, "int", 0, 1_000_000, help="groups compared; 0 for as many as the pool holds"),
            "resample": Option(False, "bool", help="draw each group from the whole pool"),
            "statistic": Option("mean", "str", choices=("mean", "sum", "max"), help="score of a group"),
            "keep_last": Option(False, "bool", help="include the shorter last group"),
        },
    ),
    "peaks": Selector(
        "slices at the peaks of each image's profile",
        units=("slice",),
        options={"distance": Option(5, "int", 1, 10_000, help="least distance of two peaks in slices")},
    ),
    "masked_volume": Selector(
        "whole images by their uncertainty inside the dilated prediction",
        units=("volume",),
        options={"dilation": Option(11, "int", 1, 101, help="width of the dilation in voxels")},
    ),
    "stratified": Selector(
        "units spread evenly over the images",
        scored=False,
        options={"equal": Option("fraction", "str", choices=("fraction", "count"), help="quantity to equalise")},
    ),
    "strided": Selector(
        "outer slices of random blocks",
        scored=False,
        units=("slice",),
        options=_BLOCKS,
    ),
    "strided_uncertainty": Selector("outer slices of the most uncertain blocks", units=("slice",), options=_BLOCKS),
    "core_set": Selector("k-center over features", scored=False, needs=_FEATURES, steps=core_set_steps),
    "cluster": Selector(
        "even shares of clusters of features",
        scored=False,
        needs=_FEATURES,
        options={
            "components": _COMPONENTS,
            "bandwidth": Option(0.0, "float", 0.0, 1e9, help="of the mean shift; 0 to estimate it"),
        },
        steps=cluster_steps,
    ),
    "distance": Selector(
        "largest mean distance to the labelled regions",
        scored=False,
        needs=_FEATURES,
        options={"components": _COMPONENTS},
        steps=distance_steps,
    ),
    "typiclust": Selector(
        "the most typical unit of each cluster of features",
        scored=False,
        needs=frozenset({"features"}),
        options={"neighbours": Option(20, "int", 1, 1000, help="neighbours that make a unit typical")},
        steps=typiclust_steps,
    ),
    "diverse_top": Selector("the best units of every image, then those farthest apart in features", needs=_FEATURES),
    "kmeans_plus_plus": Selector(
        "k-means++ on gradients",
        scored=False,
        needs=_GRADIENTS,
        options={"layer": Option("last_decoder", "str", choices=_LAYERS, help="weights the gradients are taken of")},
    ),
    "usim": Selector(
        "similar in gradient to a sample of the most uncertain units",
        scored=False,
        needs=_GRADIENTS,
        options={
            "kind": Option("c", "str", choices=("c", "f"), help="similarity: cosine or Fisher"),
            "layer": Option("bottleneck", "str", choices=_LAYERS, help="weights the gradients are taken of"),
            "eta": Option(1.0, "float", 0.0, 1e6, help="weight of relevance against coverage"),
            "parameters": Option(10_000, "int", 1, 100_000_000, help="entries of the gradients that are compared"),
            "published": Option(False, "bool", help="the knee and Fisher diagonal of the published code"),
        },
    ),
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
        "clasp_pe", "ensemble", "predictive_entropy", "patch", "class_stratified",
        {"schedule": "exponential"}, _CLASP, "method", summary="class-stratified entropy, power noise on a schedule",
    ),
    QueryMethod(
        "class_stratified", "ensemble", "predictive_entropy", "patch", "class_stratified",
        paper=_CLASP, section="method", summary="class-stratified predictive entropy without noise",
    ),
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
        paper=_NNACTIVE, section="4", summary="mutual information with power noise",
    ),
    QueryMethod(
        "power_pe", "ensemble", "predictive_entropy", "patch", "power",
        paper=_NNACTIVE, section="4", summary="predictive entropy with power noise",
    ),
    QueryMethod(
        "softrank_bald", "ensemble", "bald", "patch", "softrank",
        paper=_NNACTIVE, section="4", summary="mutual information with noise on its ranks",
    ),
    QueryMethod(
        "kmeans_bald", "ensemble", "bald", "patch", "diverse_top",
        paper=_NNACTIVE, section="4", summary="best mutual information of every image, spread in features",
    ),
    QueryMethod(
        "random", None, None, "patch", "random",
        paper=_NNACTIVE, section="4", summary="uniform random regions",
    ),
    QueryMethod(
        "random_fg33", None, None, "patch", "random_fg", {"foreground": "33"},
        paper=_NNACTIVE, section="4", summary="random, one third centred on foreground of the hints",
    ),
    QueryMethod(
        "random_fg66", None, None, "patch", "random_fg", {"foreground": "66"},
        paper=_NNACTIVE, section="4", summary="random, two thirds centred on foreground of the hints",
    ),
    QueryMethod(
        "random_fg_predicted", "ensemble", None, "patch", "random_fg_predicted",
        paper=_NNACTIVE, section="4", summary="random, two thirds centred on predicted foreground",
    ),
    QueryMethod(
        "starting_budget", None, None, "patch", "starting_budget",
        paper=_NNACTIVE, section="5.1", summary="first batch: every hinted class in two images, then random",
    ),
    QueryMethod(
        "precomputed", None, None, "patch", "precomputed",
        paper=_NNACTIVE, section="4", summary="replay of the regions another run asked for",
    ),
    QueryMethod(
        "max_entropy", "single", "predictive_entropy", "slice", "greedy",
        paper=_USIM, section="4.2", summary="highest entropy of one prediction",
    ),
    QueryMethod(
        "mean_std", "mc_dropout", "mean_std", "slice", "greedy",
        paper=_USIM, section="4.2", summary="highest mean standard deviation over dropout passes",
    ),
    QueryMethod(
        "core_set", "single", None, "slice", "core_set",
        paper=_USIM, section="appendix C", summary="units farthest in features from all that is labelled",
    ),
    QueryMethod(
        "badge", "single", None, "slice", "kmeans_plus_plus",
        paper=_USIM, section="appendix C", summary="k-means++ on gradients of pseudo labels",
    ),
    QueryMethod(
        "usim_c", "mc_dropout", None, "slice", "usim", {"kind": "c", "layer": "bottleneck"},
        _USIM, "3.3", summary="submodular mutual information, cosine of bottleneck gradients",
    ),
    QueryMethod(
        "usim_f", "mc_dropout", None, "slice", "usim", {"kind": "f", "layer": "decoder"},
        _USIM, "3.3", summary="submodular mutual information, Fisher kernel of decoder gradients",
    ),
    QueryMethod(
        "least_confidence", "single", "least_confidence", "slice", "greedy",
        paper=_BURMEISTER, section="3.1", summary="lowest probability of the predicted class",
    ),
    QueryMethod(
        "burmeister_confidence", "single", "burmeister_confidence", "slice", "greedy",
        paper=_BURMEISTER, section="3.1", summary="nearest to the uniform distribution, as published (LCUS)",
    ),
    QueryMethod(
        "burmeister_entropy", "single", "burmeister_entropy", "slice", "greedy",
        paper=_BURMEISTER, section="3.1", summary="the published score EntrUS, which is not Shannon's entropy",
    ),
    QueryMethod(
        "stratified", None, None, "slice", "stratified",
        paper=_BURMEISTER, section="3.1", summary="the same share of every image (StrRS)",
    ),
    QueryMethod(
        "cluster", "single", None, "slice", "cluster",
        paper=_BURMEISTER, section="3.1", summary="the same share of every cluster of features (ClustRS)",
    ),
    QueryMethod(
        "distance", "single", None, "slice", "distance",
        paper=_BURMEISTER, section="3.1", summary="largest mean distance to labelled features (DistRS)",
    ),
    QueryMethod(
        "strided", None, None, "slice", "strided",
        paper=_BURMEISTER, section="3.1", summary="outer slices of random blocks",
    ),
    QueryMethod(
        "strided_uncertainty", "single", "burmeister_confidence", "slice", "strided_uncertainty",
        paper=_BURMEISTER, section="3.1", summary="outer slices of the most uncertain blocks",
    ),
    QueryMethod(
        "stochastic_batch", "single", "predictive_entropy", "slice", "stochastic_batch",
        paper=_GAILLOCHET, section="3", summary="the most uncertain of many random batches",
    ),
    QueryMethod(
        "uss", "mc_dropout", "predictive_entropy", "slice", "peaks", {"passes": 20},
        _CHLEBUS, "II.E", summary="slices at the peaks of uncertainty",
    ),
    QueryMethod(
        "uvs", "mc_dropout", "predictive_entropy", "volume", "masked_volume", {"passes": 20},
        _CHLEBUS, "II.E", summary="volumes most uncertain around the predicted structure",
    ),
    QueryMethod("rss", None, None, "slice", "random", paper=_CHLEBUS, section="II.E", summary="random slices"),
    QueryMethod("rvs", None, None, "volume", "random", paper=_CHLEBUS, section="II.E", summary="random volumes"),
    QueryMethod(
        "typiclust", None, None, "patch", "typiclust",
        paper="Hacohen et al. 2022, TypiClust (ICML)", section="3.3", summary="a typical first batch without any label",
    ),
)  # fmt: skip

REGISTRY: dict[str, QueryMethod] = {m.name: m for m in _ENTRIES}

_SCHEDULES = {
    "": "constant", "_exp": "exponential", "_smooth_sigmoid": "sigmoid", "_sharp_sigmoid": "sharp_sigmoid",
}  # fmt: skip

ALIASES: dict[str, tuple[str, dict[str, object]]] = {
    "pred_entropy": ("predictive_entropy", {}),
    "exp_entropy": ("expected_entropy", {}),
    "mutual_information": ("bald", {}),
    **{f"power_bald_b{beta}": ("power_bald", {"beta": float(beta)}) for beta in (5, 10, 20, 40)},
    "class_pe66": ("class_stratified", {"ratio": 0.66}),
    "class_pe33": ("class_stratified", {"ratio": 0.33}),
    **{
        f"class_power_pe{ratio}{suffix}": ("class_stratified", {"ratio": ratio / 100, "schedule": schedule})
        for ratio in (33, 66)
        for suffix, schedule in _SCHEDULES.items()
    },
    "entropy_stochastic_batch": ("stochastic_batch", {}),
    "dropout_jsd": (
        "stochastic_batch",
        {"posterior": "mc_dropout", "uncertainty": "bald", "passes": 8, "dropout": 0.5},
    ),
    "tta_jsd": ("stochastic_batch", {"posterior": "tta", "uncertainty": "bald", "flips": False}),
    "learning_loss": ("stochastic_batch", {"posterior": "ensemble", "uncertainty": "learning_loss"}),
    "random-label": ("random_fg66", {}),
    "random-label2": ("random_fg33", {}),
    "random-label2-all-classes": ("starting_budget", {}),
    "precomputed-queries": ("precomputed", {}),
}

RECOMMENDED: tuple[str, ...] = ("clasp_pe", "power_pe", "predictive_entropy", "random")
