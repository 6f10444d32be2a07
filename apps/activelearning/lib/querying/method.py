# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Forms of the registry: an option, a selector, a query method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.errors import PatchwiseError
from lib.selectors.steps import FeatureSelector


class MethodError(PatchwiseError, ValueError):
    """A method, option or combination that does not exist or makes no sense, in one sentence."""


@dataclass(frozen=True)
class Option:
    """One option: default, kind ("int", "float", "bool" or "str"), inclusive range or choices, and help."""

    default: Any
    kind: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    help: str = ""

    def parse(self, name: str, value: Any) -> Any:
        """`value` as this option's kind.

        Raises:
            MethodError: another kind, outside of the range, or not one of the choices.
        """
        parsed = _convert(self.kind, value)
        if parsed is None:
            raise MethodError(f"option {name} must be of the kind {self.kind}, found {value!r}")
        if self.choices is not None and parsed not in self.choices:
            raise MethodError(f"option {name} must be one of {', '.join(self.choices)}, found {value!r}")
        below = self.low is not None and parsed < self.low
        above = self.high is not None and parsed > self.high
        if below or above or parsed != parsed:
            raise MethodError(f"option {name} must lie between {self.low:g} and {self.high:g}, found {value!r}")
        return parsed


def _convert(kind: str, value: Any) -> Any:
    """`value` as `kind`, from JSON or from the text of a form; None when it is not of that kind."""
    if kind == "str":
        return value if isinstance(value, str) else None
    if kind == "bool":
        words = {"true": True, "false": False, "1": True, "0": False}
        return value if isinstance(value, bool) else words.get(str(value).lower())
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if kind == "int":
        return int(number) if number == number and abs(number) < 2**53 and number == int(number) else None
    return number


@dataclass(frozen=True)
class Selector:
    """A selector: whether it ranks by an uncertainty, its units, needs and options.

    `steps` is the selector itself if it works on features; the others have a stage in `lib.querying.selection`.
    """

    summary: str
    scored: bool = True
    units: tuple[str, ...] = ("patch", "slice", "volume")
    needs: frozenset[str] = frozenset()
    options: Mapping[str, Option] = field(default_factory=dict)
    steps: FeatureSelector | None = None


@dataclass(frozen=True)
class QueryMethod:
    """Combination of posterior, uncertainty, unit and selector, with option values."""

    name: str
    posterior: str | None
    uncertainty: str | None
    unit: str
    selector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    section: str = ""
    needs: frozenset[str] = frozenset()
    cost: str = "none"
    summary: str = ""
