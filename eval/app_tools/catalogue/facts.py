# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Equations, cost and advice of every query method, for the catalogue: the facts that the registry does not hold.

Formulas are LaTeX. The probability of class c by member m at voxel v is p_mc(v), and s(R) is the mean of the
uncertainty u(v) over the region R. The batch is k, L are the annotated regions, A the batch so far. Features and
gradients of R are f_R and g_R.
"""

from __future__ import annotations

from typing import NamedTuple


class Facts(NamedTuple):
    """Equation, cost of the choice after the posterior is known, and the situation that suits the method."""

    equation: str
    cost: str
    advice: str


POSTERIORS: dict[str, str] = {
    "single": "one member of the ensemble",
    "ensemble": "all members, trained on different folds",
    "mc_dropout": "one member, several passes with active dropout",
    "tta": "one member, several passes over mirrored, rotated and noisy copies",
}
"""Meaning of each posterior."""

UNCERTAINTIES: dict[str, str] = {
    "predictive_entropy": r"H(\bar p) = -\sum_c \bar p_c \log \bar p_c",
    "expected_entropy": r"-\frac{1}{M} \sum_m \sum_c p_{mc} \log p_{mc}",
    "bald": r"\max(0,\ H(\bar p) + \frac{1}{M} \sum_m \sum_c p_{mc} \log p_{mc})",
    "mean_std": r"\frac{1}{C} \sum_c \sqrt{\frac{1}{M} \sum_m (p_{mc} - \bar p_c)^2}",
    "mean_variance": r"\frac{1}{C} \sum_c \frac{1}{M - 1} \sum_m (p_{mc} - \bar p_c)^2",
    "least_confidence": r"1 - \max_c \bar p_c",
    "margin": r"1 - (\bar p_{(1)} - \bar p_{(2)})",
    "mixed_entropy": r"\frac{1}{2} H(\bar p) - \frac{1}{2M} \sum_m \sum_c p_{mc} \log p_{mc}",
    "burmeister_confidence": r"2 \frac{C - 1}{C} - \sum_c \lvert \frac{1}{C} - \bar p_c \rvert",
    "burmeister_entropy": (
        r"\sum_c \max(0,\ \frac{1}{e} + d_c \log d_c),\quad d_c = \lvert \frac{1}{C} - \bar p_c \rvert"
    ),
    "learning_loss": r"\hat\ell(v)\ \text{of a head that predicts the loss}",
}
"""Formula of each uncertainty u(v), with the mean over members written as a bar."""

_SCORED = "one mean per position of every image"
_DRAWS = "draws only"
_GREEDY = r"A = \text{the } k \text{ largest } s(R),\ \text{none overlapping}"
_POWER = r"\log s(R) + G_R,\quad G_R \sim \text{Gumbel}(0, 1/\beta)"
_STREAMS = (
    r"s_c(R) = \text{mean of } u(v)\,\bar p_c(v) \text{ over } R;\quad "
    r"\lfloor 0.66\,k \rfloor \text{ regions spread evenly over the classes, the rest by } s(R)"
)
_COVER = (
    r"u(R) = \sum_c w_c \operatorname{Var}_c(R),\ w_c \propto 1/f_c,\ w_0 = 0;\quad "
    r"Q \sim u(R) / \textstyle\sum u;\quad "
    r"\max_A \sum_{q \in Q} \max(0, \max_{a \in A} S_{aq}) + \eta \sum_{a \in A} \max(0, \max_{q \in Q} S_{aq})"
)
_HINTED = r"\text{place} \sim \text{(anywhere, inside a class, border of a class) with probabilities } "

FACTS: dict[str, Facts] = {
    "clasp_pe": Facts(
        _STREAMS + r";\quad \log s_c(R) + G_R,\ \beta_t = \beta_1 (\beta_T / \beta_1)^{(t - 1)/(T - 1)}",
        "one mean per class and position",
        "Several classes of different frequency, over a planned number of rounds: early batches are spread by noise, "
        "late ones follow the score.",
    ),
    "class_stratified": Facts(
        _STREAMS, "one mean per class and position", "As `clasp_pe`, for a single batch without a plan of rounds."
    ),
    "predictive_entropy": Facts(
        _GREEDY + r",\quad u = H(\bar p)",
        _SCORED,
        "Small batches and a well-trained model. Without noise, a large batch repeats similar regions.",
    ),
    "expected_entropy": Facts(
        _GREEDY + r",\quad u = -\tfrac{1}{M} \textstyle\sum_m \sum_c p_{mc} \log p_{mc}",
        _SCORED,
        "A reference beside `bald`: it measures the part of the entropy on which the members agree.",
    ),
    "bald": Facts(
        _GREEDY + r",\quad u = \text{mutual information}",
        _SCORED,
        "Ambiguous images, whose noise raises the entropy of every member alike.",
    ),
    "power_bald": Facts(
        _POWER + r",\quad u = \text{mutual information}",
        _SCORED,
        "Large batches: noise spreads them over the pool. A higher `beta` is closer to `bald`.",
    ),
    "power_pe": Facts(
        _POWER + r",\quad u = H(\bar p)",
        _SCORED,
        "Large batches: noise spreads them over the pool. A higher `beta` is closer to `predictive_entropy`.",
    ),
    "softrank_bald": Facts(
        r"-\log \operatorname{rank}(R) + G_R,\quad G_R \sim \text{Gumbel}(0, 1/\beta)",
        _SCORED,
        "As `power_bald`, if the scale of the scores should not matter but only their order.",
    ),
    "kmeans_bald": Facts(
        r"\text{candidates: the } 2k \text{ largest } s(R) \text{ per image};\quad "
        r"\arg\max_R \min_{a \in A} \lVert f_R - f_a \rVert",
        "k distances per candidate",
        "Large batches whose regions must differ in content.",
    ),
    "random": Facts(
        r"R \sim \text{Uniform(free positions)},\ \text{images in turn}",
        _DRAWS,
        "The baseline of every study, and the choice before the first training.",
    ),
    "random_fg33": Facts(
        _HINTED + r"\left(\tfrac{4}{6}, \tfrac{1}{6}, \tfrac{1}{6}\right)",
        _DRAWS,
        "The baseline for images that are mostly background. The time for finding foreground is not counted.",
    ),
    "random_fg66": Facts(
        _HINTED + r"\left(\tfrac{1}{3}, \tfrac{1}{3}, \tfrac{1}{3}\right)",
        _DRAWS,
        "As `random_fg33` with more foreground.",
    ),
    "random_fg_predicted": Facts(
        _HINTED + r"\left(\tfrac{1}{3}, \tfrac{1}{3}, \tfrac{1}{3}\right),\ \text{classes by } \arg\max_c \bar p_c",
        "draws, one predicted label map per image drawn from",
        "The deployable form of `random_fg66`: foreground comes from the model instead of hints.",
    ),
    "starting_budget": Facts(
        r"\text{per class: 2 regions in different images, rarest class first; then } \texttt{random\_fg33}",
        _DRAWS,
        "Round 0: every training fold sees every class.",
    ),
    "precomputed": Facts(
        r"A = \text{the regions of the request}", "none", "Replaying another run, or regions chosen by a person."
    ),
    "max_entropy": Facts(
        _GREEDY + r",\quad u = H(p)", "one mean per slice", "Slices and a single network, if an ensemble is too costly."
    ),
    "mean_std": Facts(
        _GREEDY + r",\quad u = \tfrac{1}{C} \textstyle\sum_c \sigma_m(p_{mc})",
        "one mean per slice",
        "Slices and a network with dropout.",
    ),
    "core_set": Facts(
        r"\arg\max_R \min_{l \in L \cup A} \lVert f_R - f_l \rVert",
        "one distance per region and pick",
        "Varied pools (scanners, protocols), to cover all of them. Uncertainty is not considered.",
    ),
    "badge": Facts(
        r"\text{first: } \arg\max_R \lVert g_R \rVert;\quad P(R) \propto \min_{a \in A} \lVert g_R - g_a \rVert^2",
        "one backward pass per region, one distance per region and pick",
        "Small pools and batches that should be both uncertain (long gradients) and diverse.",
    ),
    "usim_c": Facts(
        _COVER + r",\ S_{aq} = \cos(g_a, g_q)",
        "one backward pass per region, one similarity per region and sampled region",
        "Rare classes, which the weights favour, and batches that represent many uncertain regions.",
    ),
    "usim_f": Facts(
        _COVER + r",\ S_{aq} = \tfrac{1}{P} \textstyle\sum_j g_{aj}\, g_{qj} / F_j",
        "one backward pass per region, one similarity per region and sampled region",
        "As `usim_c`; the Fisher information F weighs the parameters instead of their angle.",
    ),
    "least_confidence": Facts(
        _GREEDY + r",\quad u = 1 - \max_c \bar p_c", "one mean per slice", "A simple reference with one network."
    ),
    "burmeister_confidence": Facts(
        _GREEDY + r",\quad u = 2 \tfrac{C - 1}{C} - \textstyle\sum_c \lvert \tfrac{1}{C} - p_c \rvert",
        "one mean per slice",
        "Repeating the published study. For two classes its order is that of `least_confidence`.",
    ),
    "burmeister_entropy": Facts(
        _GREEDY + r",\quad u = \textstyle\sum_c \max(0, \tfrac{1}{e} + d_c \log d_c)",
        "one mean per slice",
        "Repeating the published study only: the score is not monotone in the confidence.",
    ),
    "stratified": Facts(
        r"R \sim \text{Uniform},\ \text{from the image with the least annotated share}",
        _DRAWS,
        "Equal shares of every image without a model.",
    ),
    "cluster": Facts(
        r"R \sim \text{Uniform},\ \text{from the cluster of } f \text{ with the least annotated share}",
        "one mean shift over the features",
        "Pools with groups of similar slices of unequal size.",
    ),
    "distance": Facts(
        r"\arg\max_R \tfrac{1}{\lvert L \cup A \rvert} \textstyle\sum_{l \in L \cup A} \lVert f_R - f_l \rVert",
        "one distance per region and pick",
        "A reference beside `core_set`: it prefers outliers.",
    ),
    "strided": Facts(
        r"\text{blocks of } l = 5 \text{ free slices at random};\quad A = \text{their two outer slices}",
        _DRAWS,
        "Slice annotation with interpolated pseudo labels between the two slices.",
    ),
    "strided_uncertainty": Facts(
        r"\text{blocks by } \textstyle\sum_{z \in \text{block}} s(z);\quad A = \text{their two outer slices}",
        "one mean per slice",
        "As `strided`, with the most uncertain blocks first.",
    ),
    "stochastic_batch": Facts(
        r"\text{random partition into groups } B_i \text{ of } k;\quad "
        r"A = \arg\max_{B_i} \tfrac{1}{k} \textstyle\sum_{R \in B_i} s(R)",
        "one mean per region",
        "Large batches: a group is random, so it is diverse, and the choice among groups follows the score.",
    ),
    "uss": Facts(
        r"\text{local maxima of } s(z) \text{ per image, at least 5 slices apart};\quad "
        r"A = \text{the } k \text{ highest}",
        "one mean per slice",
        "Slices of thin spacing, whose neighbours would repeat each other.",
    ),
    "uvs": Facts(
        r"s = \text{mean of } u \text{ over the predicted foreground, dilated by a box of 11 voxels}",
        "one dilation per image",
        "Whole images, if the regions of one image must be annotated together.",
    ),
    "rss": Facts(r"z \sim \text{Uniform(free slices)},\ \text{images in turn}", _DRAWS, "The baseline for slices."),
    "rvs": Facts(r"\text{image} \sim \text{Uniform(free images)}", _DRAWS, "The baseline for whole images."),
    "typiclust": Facts(
        r"t(R) = 1 / \text{mean distance of } f_R \text{ to its 20 neighbours};\quad "
        r"\text{the largest } t \text{ of each of the largest clusters without an annotated region}",
        "one k-means over the features",
        "The first batch without any label or hint: features are computed from intensities.",
    ),
}
"""Facts of every registered method, by name."""
