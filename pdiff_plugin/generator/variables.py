"""Named conditions as features that a network or a regression can take.

Each name of a condition is one :class:`Variable`, whose kind says how its values become features:

- ``number``: standardised over the recorded conditions; ``log``: its logarithm, likewise.
- ``cyclic``: cosine and sine of its angle, for values that come round after a ``period``.
- ``category``: one feature for each recorded value (text, true and false, or numbers that are names).
- ``vector``: each number of a list, standardised by itself.

Shapes: R recorded conditions, B conditions, F features.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pdiff_plugin.errors import ConfigError, UnknownConditionError
from pdiff_plugin.snapshots.conditions import Condition, Value, check_same_kind, kind_of

Kind = Literal["number", "log", "cyclic", "category", "vector"]
# A number with fewer different values than this says little of what lies between them.
FEW_VALUES = 6


@dataclass(frozen=True)
class Variable:
    """One name of the conditions.

    Attributes:
        name: as in the conditions.
        kind: how values become features.
        mean: of each number's features before they were centred, empty for ``category``.
        std: they are divided by; one where it never moved.
        low: smallest recorded value of each number.
        high: largest recorded value of each number.
        period: after which values come round, of ``cyclic``.
        categories: recorded values, of ``category``.
    """

    name: str
    kind: Kind
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    period: float = 0.0
    categories: tuple[str | bool | float, ...] = ()

    @property
    def num_features(self) -> int:
        return {"category": len(self.categories), "cyclic": 2}.get(self.kind, len(self.mean))

    def encode(self, values: Sequence[Value]) -> Tensor:
        """Features of B values, (B, F) float32.

        Raises:
            ConditionError: another type than was recorded, or a category that was not.
        """
        if self.kind == "category":
            return self._one_hot(values)
        numbers = torch.tensor([value if isinstance(value, list) else [value] for value in values], dtype=torch.float64)
        if self.kind == "cyclic":
            angle = 2 * math.pi * numbers / self.period
            # sqrt(2): unit variance over the circle, as the other features have over what was recorded.
            return (math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)).float()
        if self.kind == "log":
            numbers = numbers.log()
        mean, std = (torch.tensor(one, dtype=torch.float64) for one in (self.mean, self.std))
        return ((numbers - mean) / std).float()

    def check(self, value: Value) -> None:
        """Raise :class:`ConditionError` for a value of another type or length than was recorded."""
        if self.kind == "category":
            self._place(value)
            return
        length = len(self.mean) if self.kind == "vector" else 0
        expected = f"a list of {length} numbers" if length else "a number"
        if kind_of(value) != expected:
            raise UnknownConditionError("the condition", f"{kind_of(value)} under {self.name!r}", expected)
        if self.kind == "log" and not float(value) > 0:  # type: ignore[arg-type]  # a number, see above
            raise UnknownConditionError("the condition", f"{self.name} = {value!r}", "a number above 0 (kind log)")

    def outside(self, value: Value) -> str | None:
        """In words, how far a value lies outside the recorded range; None inside. Rounding counts as inside."""
        if self.kind in ("category", "cyclic"):
            return None
        numbers = value if isinstance(value, list) else [float(value)]
        for place, (number, low, high) in enumerate(zip(numbers, self.low, self.high, strict=True)):
            slack = 1e-6 * max(abs(low), abs(high), high - low)
            if not low - slack <= number <= high + slack:
                name = f"{self.name}[{place}]" if self.kind == "vector" else self.name
                return f"{name} = {number:g} lies outside the recorded {low:g} to {high:g}"
        return None

    def _one_hot(self, values: Sequence[Value]) -> Tensor:
        places = torch.tensor([self._place(value) for value in values])
        return torch.nn.functional.one_hot(places, len(self.categories)).float()

    def _place(self, value: Value) -> int:
        for place, category in enumerate(self.categories):
            if value == category and isinstance(value, bool) == isinstance(category, bool):
                return place
        near = difflib.get_close_matches(str(value), [str(one) for one in self.categories], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UnknownConditionError(
            "the condition", f"{self.name} = {value!r}{hint}", f"one of {', '.join(map(str, self.categories))}"
        )


@dataclass(frozen=True)
class Variables:
    """All names of the conditions of a store, in their order."""

    variables: tuple[Variable, ...]

    @classmethod
    def infer(cls, conditions: Sequence[Condition], kinds: Mapping[str, str] | None = None) -> Variables:
        """Learn kinds, ranges and scales from recorded conditions, all of the same names and types.

        Args:
            conditions: of R trajectories.
            kinds: name -> kind to use instead of the inferred one, ``cyclic=360`` with its period.

        Raises:
            ConditionError: conditions that do not fit together.
            ConfigError: a name or a kind that cannot be.
        """
        for place, condition in enumerate(conditions):
            check_same_kind(condition, f"condition {place + 1}", conditions[0], "condition 1")
        kinds = dict(kinds or {})
        if unknown := sorted(set(kinds) - set(conditions[0])):
            raise ConfigError("condition", unknown[0], f"must be one of {', '.join(conditions[0])}")
        return cls(tuple(_infer(name, [c[name] for c in conditions], kinds.get(name, "")) for name in conditions[0]))

    @property
    def names(self) -> list[str]:
        return [variable.name for variable in self.variables]

    @property
    def num_features(self) -> int:
        return sum(variable.num_features for variable in self.variables)

    def encode(self, conditions: Sequence[Condition]) -> Tensor:
        """Features of B conditions, (B, F) float32.

        Raises:
            ConditionError: a name too many or missing, a value of another type, an unknown category.
        """
        for condition in conditions:
            self.check(condition)
        parts = [variable.encode([c[variable.name] for c in conditions]) for variable in self.variables]
        return torch.cat(parts, dim=1)

    def check_names(self, given: Mapping[str, Value]) -> None:
        """Raise :class:`ConditionError` for a name that was not recorded, with those that were."""
        for name in given:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise UnknownConditionError(
                    "the condition", f"the unknown name {name!r}{hint}", f"of {', '.join(self.names)}"
                )

    def check(self, condition: Condition) -> None:
        """Raise :class:`ConditionError` for what could not have been recorded."""
        self.check_names(condition)
        if missing := [name for name in self.names if name not in condition]:
            raise UnknownConditionError(
                "the condition", f"nothing for {missing[0]!r}", f"values for {', '.join(self.names)}"
            )
        for variable in self.variables:
            variable.check(condition[variable.name])

    def nearest(self, condition: Condition, recorded: Sequence[Condition]) -> Condition:
        """The one of ``recorded`` whose features are closest."""
        distances = torch.cdist(self.encode([condition]), self.encode(recorded))[0]
        return recorded[int(distances.argmin())]

    def outside(self, condition: Condition) -> list[str]:
        """One sentence for each value outside the recorded range."""
        found = (variable.outside(condition[variable.name]) for variable in self.variables)
        return [text for text in found if text is not None]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(variable) for variable in self.variables]

    @classmethod
    def from_json(cls, document: Sequence[Mapping[str, Any]]) -> Variables:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        found = tuple(_from_json(one) for one in document)
        if not found or len({variable.name for variable in found}) < len(found):
            raise ValueError("no variables, or several of one name")
        return cls(found)


def _from_json(one: Mapping[str, Any]) -> Variable:
    def numbers(key: str) -> tuple[float, ...]:
        found = tuple(float(number) for number in one[key])
        if not all(math.isfinite(number) for number in found):
            raise ValueError(f"{key} of {one['name']} that is not finite")
        return found

    name, kind = one["name"], one["kind"]
    if not isinstance(name, str) or kind not in get_args(Kind):
        raise ValueError(f"{name!r} of kind {kind!r}")
    categories = tuple(one["categories"])
    if not all(isinstance(category, str | bool | int | float) for category in categories):
        raise ValueError(f"categories of {name} that are no values")
    mean, std, low, high = (numbers(key) for key in ("mean", "std", "low", "high"))
    period = float(one["period"])
    length = 0 if kind in ("category", "cyclic") else len(mean)
    is_sound = {"category": bool(categories), "cyclic": 0 < period < math.inf, "vector": length > 0}.get(
        kind, length == 1
    )
    if not is_sound or {len(std), len(mean)} != {length} or (length and {len(low), len(high)} != {length}):
        raise ValueError(f"figures of {name} that do not belong together")
    return Variable(name, kind, mean, std, low, high, period, categories)


def _infer(name: str, values: Sequence[Value], given: str) -> Variable:
    kind, _, text = given.partition("=")
    first = values[0]
    if not kind:
        kind = "category" if isinstance(first, bool | str) else "vector" if isinstance(first, list) else "number"
    if kind not in get_args(Kind):
        raise ConfigError(f"condition {name}", given, f"must be one of {', '.join(get_args(Kind))}")
    if kind == "category":
        if isinstance(first, list):
            raise ConfigError(f"condition {name}", given, "must be vector for a list of numbers")
        return Variable(name, "category", categories=tuple(sorted(set(values), key=str)))  # type: ignore[arg-type]
    if isinstance(first, bool | str) or (isinstance(first, list) != (kind == "vector")):
        raise ConfigError(f"condition {name}", given, f"cannot be the kind of {kind_of(first)}")
    numbers = torch.tensor([value if isinstance(value, list) else [value] for value in values], dtype=torch.float64)
    low, high = (tuple(one.tolist()) for one in (numbers.amin(dim=0), numbers.amax(dim=0)))
    if kind == "cyclic":
        period = _period(name, given, text)
        return Variable(name, "cyclic", low=low, high=high, period=period)
    if kind == "log":
        if not low[0] > 0:
            raise ConfigError(f"condition {name}", given, f"needs numbers above 0, and {low[0]:g} was recorded")
        numbers = numbers.log()
    std = numbers.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    return Variable(name, kind, tuple(numbers.mean(dim=0).tolist()), tuple(std.tolist()), low, high)  # type: ignore[arg-type]  # checked above


def _period(name: str, given: str, text: str) -> float:
    try:
        period = float(text)
    except ValueError:
        period = 0.0
    if not 0 < period < math.inf:
        raise ConfigError(f"condition {name}", given, "must give the period, as in cyclic=360")
    return period
