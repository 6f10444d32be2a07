# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Cut full reference arrays down to the ones that tests read: `python tests/reference/trim.py FOLDER [OUT]`.

FOLDER holds `nnactive/golden` and `strategies/golden`, the outputs of the published projects; README.md says of which.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

# Of the four images of the query stage, these keep their probabilities: the smallest whole one and the one thinner than
# a patch. Of the others the shape is kept, which decides how much noise is drawn before these are reached.
IMAGES = ("case_c", "case_d")
GREEDY = (
    "pred_entropy",
    "exp_entropy",
    "mutual_information",
    "power_bald",
    "power_bald_b10",
    "softrank_bald",
    "power_pe",
)
BY_CLASS = ("class_pe66", "class_pe33", "class_power_pe66", "class_power_pe66_exp")
# Pairs without, with one-sided and with all classes, and one in three dimensions.
METRIC_CASES = (1, 2, 3, 8, 10)


def only(*names: str) -> Callable[[Arrays], Arrays]:
    """Keep these arrays; an ending `*` keeps all that start so."""

    def cut(arrays: Arrays) -> Arrays:
        return {
            key: array
            for key, array in arrays.items()
            if any(key == name or (name.endswith("*") and key.startswith(name[:-1])) for name in names)
        }

    return cut


def uncertainty(arrays: Arrays) -> Arrays:
    """Voxels are independent of each other, so a corner is enough; it holds certain voxels and uncertain ones."""
    names = ("probs", "pred_entropy", "exp_entropy", "mutual_information", "class_pred_entropy")
    return {name: arrays[name][..., :4, :5, :6] for name in names}


def query_inputs(arrays: Arrays) -> Arrays:
    shapes = np.array([arrays[f"probs_{image}"].shape[2:] for image in arrays["image_order"]])
    names = ("ann_file", "ann_coords", "ann_size", "image_order", "seed", *(f"probs_{image}" for image in IMAGES))
    return {**{name: arrays[name] for name in names}, "shapes": shapes}


def query(methods: tuple[str, ...]) -> Callable[[Arrays], Arrays]:
    def cut(arrays: Arrays) -> Arrays:
        config = json.loads(str(arrays["config"]))
        kept = {name: np.array(config[name]) for name in ("query_size", "n_patch_per_image", "agg_stride")}
        for key, array in arrays.items():
            method, _, what = key.partition("__")
            if method in methods and not what.endswith("_size"):
                kept[key] = array
        return kept

    return cut


def dropout_scores(arrays: Arrays) -> Arrays:
    """Three of six slices, which are scored one by one."""
    names = ("entropy_score", "mcd_score", "bald_score", "usim_var_per_class")
    return {"logits": arrays["logits"][:, :3], **{name: arrays[name][:3] for name in names}}


def mutual_information(arrays: Arrays) -> Arrays:
    return {k: v for k, v in arrays.items() if "_NaiveGreedy_" in k or (k.startswith("S_") and v.shape == (80, 25))}


def usim(by_cosine: Arrays, by_fisher: Arrays) -> Arrays:
    """Both kinds start from the same uncertainties and gradients."""
    shared = {k: by_fisher[k] for k in ("grads", "unc_per_class", "seed", "knee", "curve", "lab_a", "lab_b")}
    assert all(np.array_equal(array, by_cosine[name]) for name, array in shared.items())
    picks = {f"{kind}_{k}": a[k] for kind, a in (("c", by_cosine), ("f", by_fisher)) for k in ("selected", "gains")}
    return {**shared, **picks, "f_q_ids": by_fisher["q_ids"]}


def knees(content: Any) -> Arrays:
    names = {"y": "y", "knee_S10": "S10", "knee_S1": "S1", "argmax_1_minus_x_minus_y": "argmax"}
    # No knee is -1. The exponential curve has the same knee by all three rules.
    return {
        f"{case}_{short}": np.array(-1 if values[name] is None else values[name])
        for case, values in content["cases"].items()
        if case != "exp"
        for name, short in names.items()
    }


def metrics(content: Any) -> Arrays:
    names = ("prediction", "target", "dice_eps0", "sensitivity_eps0", "specificity_eps0", "hd_0.95")
    names += ("hd95_max_of_directed_percentiles",)
    return {
        f"{number}_{name}": np.array(content[number][name], dtype=None if name in names[:2] else float)
        for number in METRIC_CASES
        for name in names
    }


def strided_blocks(content: Any) -> Any:
    asked = ("pseudo_preferFalse", "odd_budget", "true_labelled")
    return {name: value for name, value in content.items() if not name.endswith(asked)}


def representativeness(content: Any) -> Any:
    names = ("dist_argmax_index", "clust_bw5_labels", "clust_bw2.5_labels", "case_ids_labelled", "case_ids_unlabelled")
    return {name: content[name] for name in names}


def first_channel(arrays: Arrays) -> Arrays:
    """A plane is rotated by itself."""
    return {name: arrays[name][:, :1] for name in ("x", "rot_plus10", "rot_minus7")}


N, S = "nnactive/golden", "strategies/golden"
# file here -> files there, and their kept arrays
FILES: dict[str, tuple[list[str], Callable[..., Any]]] = {
    "nnactive/uncertainty.npz": ([f"{N}/a_uncertainty.npz"], uncertainty),
    "nnactive/aggregation.npz": ([f"{N}/b_aggregation.npz"], only("*")),
    "nnactive/overlaps.npz": ([f"{N}/c_overlap_pairs.npz"], only("rows")),
    "nnactive/selection.npz": ([f"{N}/c_select_volume.npz"], only("agg", "patch_size", "ann_*", "top5_*", "all_*")),
    "nnactive/query_inputs.npz": ([f"{N}/cd_inputs.npz"], query_inputs),
    "nnactive/query_s1.npz": ([f"{N}/cd_query_s1.npz"], query((*GREEDY, *BY_CLASS))),
    "nnactive/query_s122.npz": ([f"{N}/cd_query_s122.npz"], query((*GREEDY, *BY_CLASS))),
    "nnactive/query_no_limit.npz": (
        [f"{N}/cd_query_nNone.npz"],
        query(("pred_entropy", "power_bald", "softrank_bald")),
    ),
    "nnactive/noise.npz": (
        [f"{N}/d_noise.npz"],
        only("seed", "scores", "power_b*", "*_schedule_*", "exp_*", "sigmoid_*", "neg_*"),
    ),
    "nnactive/dice.npz": ([f"{N}/e_dice.npz"], only("*")),
    "nnactive/kendall.npz": ([f"{N}/e_kendall.npz"], only("values", "methods", "corr", "pval")),
    "nnactive/study.npz": (
        [f"{N}/e_metrics.npz"],
        only("table_*", "auc_keys", "auc", "final", "beta*", "ppm_algs", "ppm_stored", "ppm_holm_stored"),
    ),
    "nnactive/random_geometry.npz": (
        [f"{N}/f_random_geometry.npz"],
        only("center_table", "seg", "locs_*", "uniform_*"),
    ),
    "nnactive/partial_loss.npz": ([f"{N}/h_partial_loss.npz"], only("*")),
    "nnactive/region_sampling.npz": (
        [f"{N}/h_region_sampling.npz"],
        lambda arrays: {k: v for k, v in arrays.items() if not k.endswith(("_samples", "_lb_max"))},
    ),
    "alunet/core_set.npz": ([f"{S}/coreset_alunet.npz"], only("*")),
    "alunet/badge.npz": ([f"{S}/badge_alunet.npz"], only("E", "first", "second_centre_prob")),
    "alunet/stochastic_batch.npz": ([f"{S}/stb_alunet.npz"], only("*")),
    "alunet/dropout_scores.npz": ([f"{S}/mc_scores_alunet.npz"], dropout_scores),
    "alunet/usim.npz": ([f"{S}/usimc_pipeline.npz", f"{S}/usimf_pipeline.npz"], usim),
    "submodlib/mutual_information.npz": ([f"{S}/flqmi_submodlib.npz"], mutual_information),
    "kneed/knees.npz": ([f"{S}/elbow_kneed.json"], knees),
    "active_segmentation/uncertainty.npz": (
        [f"{S}/as_uncertainty.npz"],
        only("P", "distance", "entropy", "textbook_entropy"),
    ),
    "active_segmentation/representativeness.npz": (
        [f"{S}/as_representativeness.npz"],
        only("maxpooled", "reduced_code", "avg_distance_scores"),
    ),
    "active_segmentation/representativeness.json": ([f"{S}/as_representativeness.json"], representativeness),
    "active_segmentation/interpolation.npz": (
        [f"{S}/as_interpolation.npz"],
        only("top", "bottom", "sd_multi_*", "morph_multi_*", "both_empty", "signed_dist_1d_*"),
    ),
    "active_segmentation/strided_blocks.json": ([f"{S}/as_strided_blocks.json"], strided_blocks),
    "active_segmentation/metrics.npz": ([f"{S}/as_metrics_random.json"], metrics),
    "stochastic_batches/selection.npz": (
        [f"{S}/stochastic_batch.npz"],
        lambda arrays: {k: v for k, v in arrays.items() if k.endswith(("_scores", "_sel"))},
    ),
    "stochastic_batches/divergence.npz": (
        [f"{S}/jsd.npz"],
        lambda arrays: {
            **{name: arrays[name][:2] for name in ("p", "true_jsd", "code_weighted_jsd_alpha05")},
            "identical_p": arrays["identical_p"],
        },
    ),
    "stochastic_batches/rotation.npz": ([f"{S}/tta.npz"], first_channel),
    "stochastic_batches/learning_loss.json": (
        [f"{S}/learning_loss.json"],
        lambda content: {k: content[k] for k in ("pred", "target", "loss_margin0.0", "loss_margin1.0")},
    ),
    "formulas/slices.npz": ([f"{S}/uss_reference.npz"], only("U", "slice_score_axis0")),
    "formulas/peaks.json": ([f"{S}/uss_reference.json"], lambda content: content["peaks"]),
}


def read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)


def main(folder: Path, out: Path) -> None:
    for name, (sources, cut) in FILES.items():
        kept = cut(*(read(folder / source) for source in sources))
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".json":
            target.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
        else:
            np.savez_compressed(target, **kept)
        print(f"{target.stat().st_size / 1000:8.1f} kB {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent)
