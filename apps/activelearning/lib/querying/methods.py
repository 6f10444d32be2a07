# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Query methods as data: a composition of posterior, uncertainty, unit and selector, with validated options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lib.querying.method import MethodError, Option, QueryMethod, Selector
from lib.querying.registry import ALIASES, POSTERIOR_OPTIONS, RECOMMENDED, REGISTRY, SELECTORS
from lib.uncertainty import SCORE_MAPS

__all__ = [
    "REGISTRY", "REQUEST_KEYS", "MethodError", "Option", "QueryMethod", "Selector",
    "compose", "describe", "listed", "options_of", "resolve",
]  # fmt: skip

POSTERIORS = ("single", "ensemble", "mc_dropout", "tta")
DISAGREEMENT = frozenset({"bald", "mean_std", "mean_variance"})  # zero, whatever the image, for a single prediction

REQUEST_KEYS = frozenset(
    {
        "axis", "batch", "client_id", "config", "double_share", "hints", "image", "label_tag", "lease_minutes",
        "method",
        "model", "n", "n_per_image", "params", "regions", "request_id", "result_extension", "round", "rounds",
        "rounds_total", "seed", "session_id", "size", "size_mm", "strategy", "stride", "tag", "utilities",
        "whole"
    }
)  # fmt: skip
"""Keys of a request that belong to the server, the engine or MONAI Label's clients and are not options of a method."""

_OVERRIDES = ("posterior", "uncertainty", "unit")


def members_of(posterior: str) -> list[str]:
    """Factors of a posterior, "ensemble*tta" -> ["ensemble", "tta"].

    Raises:
        MethodError: an unknown factor, or one given twice.
    """
    factors = [p.strip() for p in posterior.replace(" x ", "*").split("*")]
    for factor in factors:
        if factor not in POSTERIORS:
            raise MethodError(f"unknown posterior {factor!r}{_nearest(factor, POSTERIORS)}")
    if len(set(factors)) < len(factors):
        raise MethodError(f"a posterior takes each factor once, found {posterior!r}")
    return factors


def resolve(name: str, request: Mapping[str, Any] | None = None) -> QueryMethod:
    """The registered method `name` (or one of its aliases) with the options and overrides of `request`.

    `posterior`, `uncertainty` and `unit` of the request replace the method's own; keys of `REQUEST_KEYS` are passed
    over; a nested `options` object is merged.

    Raises:
        MethodError: unknown method or option, value out of range, or a combination without sense.
    """
    known, preset = ALIASES.get(name, (name, {}))
    if known not in REGISTRY:
        raise MethodError(f"unknown method {name!r}{_nearest(name, [*REGISTRY, *ALIASES])}")
    method, given = REGISTRY[known], {**preset, **_flat(request or {})}
    overrides = {k: given.pop(k) for k in _OVERRIDES if given.get(k) not in (None, "")}
    if "uncertainty" in overrides and method.uncertainty is None:
        raise MethodError(f"{known} ranks by no uncertainty: leave the option uncertainty out")
    parts: dict[str, Any] = {k: str(v) for k, v in overrides.items()}
    return _complete(replace(method, **parts), given)


def compose(parts: Mapping[str, Any]) -> QueryMethod:
    """An unnamed method from `{"posterior", "uncertainty", "unit", "selector", ...options}`.

    Raises:
        MethodError: a part is missing or unknown, or the combination makes no sense.
    """
    given = _flat(parts)
    name = str(given.pop("name", "composed"))
    chosen = {k: given.pop(k, None) for k in (*_OVERRIDES, "selector")}
    if not chosen["selector"]:
        raise MethodError("a composition needs a selector, found none: add for example selector: power")
    method = QueryMethod(
        name=name,
        posterior=chosen["posterior"] or None,
        uncertainty=chosen["uncertainty"] or None,
        unit=str(chosen["unit"] or "patch"),
        selector=str(chosen["selector"]),
        summary="composed on request",
    )
    return _complete(method, given)


def options_of(method: QueryMethod) -> dict[str, Option]:
    """Options a method takes: those of its selector and of the factors of its posterior, with the method's defaults."""
    found = dict(SELECTORS[method.selector].options)
    for factor in members_of(method.posterior) if method.posterior else ():
        found.update(POSTERIOR_OPTIONS[factor])
    return {k: replace(o, default=method.options.get(k, o.default)) for k, o in found.items()}


def describe() -> list[dict[str, Any]]:
    """Every registered method for a JSON listing: composition, options, paper, needs, cost class, summary."""
    listing = []
    for name, entry in REGISTRY.items():
        method = _complete(entry, {})
        listing.append(
            {
                **{k: getattr(method, k) for k in ("name", "posterior", "uncertainty", "unit", "selector")},
                "units": list(SELECTORS[method.selector].units),
                "options": {k: asdict(o) for k, o in options_of(method).items()},
                "paper": method.paper,
                "section": method.section,
                "needs": sorted(method.needs),
                "cost": method.cost,
                "summary": method.summary,
                "aliases": sorted(a for a, (target, _) in ALIASES.items() if target == name),
                "recommended": name in RECOMMENDED,
            }
        )
    return listing


def listed(names: Sequence[str] | None = None) -> list[str]:
    """Registry names that the clients' list shows: the recommended ones, `["all"]`, or those named.

    Raises:
        MethodError: an unknown method.
    """
    if not names:
        return list(RECOMMENDED)
    if list(names) == ["all"]:
        return list(REGISTRY)
    return list(dict.fromkeys(resolve(name).name for name in names))


def _flat(request: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(request)
    nested = given.pop("options", None) or {}
    if not isinstance(nested, Mapping):
        raise MethodError(f"options must be an object of names and values, found {nested!r}")
    return {**given, **nested}


def _complete(method: QueryMethod, given: Mapping[str, Any]) -> QueryMethod:
    """Check the combination, fill in every option's value, and derive what the method needs and costs."""
    _check(method)
    options = options_of(method)
    values = {k: o.default for k, o in options.items()}
    for key, value in given.items():
        if key in options:
            values[key] = options[key].parse(key, value)
        elif key not in REQUEST_KEYS:
            raise MethodError(f"unknown option {key!r} of {method.name}{_nearest(key, [*options, *REQUEST_KEYS])}")
    needs = set(SELECTORS[method.selector].needs)
    factors = members_of(method.posterior) if method.posterior else []
    needs |= {"model"} if factors else set()
    needs |= {f for f in factors if f in ("ensemble", "mc_dropout")}
    return replace(method, options=values, needs=frozenset(needs), cost=_cost(needs))


def _cost(needs: Iterable[str]) -> str:
    """Highest cost: none, posterior (one pass per member), features, or gradients (one backward pass per unit)."""
    for need in ("gradients", "features"):
        if need in needs:
            return need
    return "posterior" if "model" in needs else "none"


def _check(method: QueryMethod) -> None:
    if method.selector not in SELECTORS:
        raise MethodError(f"unknown selector {method.selector!r}{_nearest(method.selector, SELECTORS)}")
    selector, unit, score = SELECTORS[method.selector], method.unit, method.uncertainty
    if unit not in selector.units:
        raise MethodError(f"{method.name} asks for the unit {' or '.join(selector.units)}, found {unit!r}")
    if score is not None and score not in SCORE_MAPS:
        raise MethodError(f"unknown uncertainty {score!r}{_nearest(score, SCORE_MAPS)}")
    if selector.scored and score is None:
        raise MethodError(f"the selector {method.selector} ranks by an uncertainty, found none: name one")
    if not selector.scored and score is not None:
        raise MethodError(f"the selector {method.selector} ranks by no uncertainty, found {score!r}: leave it out")
    if (selector.scored or "model" in selector.needs) and method.posterior is None:
        raise MethodError(f"the selector {method.selector} needs a model: name a posterior, for example ensemble")
    factors = members_of(method.posterior) if method.posterior else []
    if factors and not (selector.scored or "model" in selector.needs):
        raise MethodError(f"the selector {method.selector} uses no model: leave the posterior out")
    if score in DISAGREEMENT and factors == ["single"]:
        raise MethodError(f"{score} measures how members disagree and a single model is one: use ensemble, for example")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ": see `python -m eval methods --json`"
