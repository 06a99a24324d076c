"""A model with a dial: its ensemble for whatever condition is asked for.

Shapes: B inputs in a batch, C classes, M members.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pdiff_plugin.config import SamplingConfig
from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble
from pdiff_plugin.ensemble.runner import check_eval
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.modules.names import unwrap
from pdiff_plugin.snapshots.conditions import parse_condition

if TYPE_CHECKING:
    from pdiff_plugin.generator.generator import WeightGenerator


class Dial(nn.Module):
    """Makes, keeps and runs the ensemble of a condition: ``dial(x, angle=50)``.

    Members of one condition are the same whenever they are made. Names that are left out take those of recorded
    conditions in turn, as of ``WeightGenerator.sample``. Runs in eval mode, records no gradients, and is for one thread
    at a time, as :class:`~pdiff_plugin.DiffusionEnsemble` is.

    Args:
        model: the model whose snapshots were recorded, in eval mode. Not copied, and nothing is written into it.
        generator: fitted on runs with conditions: a :class:`WeightGenerator`, or the path of its file or folder.
        num_members: M, of each ensemble.
        cache_size: ensembles that are kept; the one that was asked for longest ago makes way.
        sampling: how members are drawn.
        seed: of the draws.
        ensemble_options: further arguments of ``DiffusionEnsemble``.

    Raises:
        ConfigError: a generator without conditions, a size below one, or a condition named as an input of the call.
        LayoutMismatchError: the generator belongs to another model; the first differing tensor is named.
        TrainingModeError: the model is in train mode.
    """

    def __init__(
        self,
        model: nn.Module,
        generator: WeightGenerator | str | os.PathLike[str],
        *,
        num_members: int = 8,
        cache_size: int = 16,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        ensemble_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(generator, str | os.PathLike):
            from pdiff_plugin.generator.generator import WeightGenerator

            generator = WeightGenerator.load(generator)
        if generator.variables is None:
            raise ConfigError("generator", generator, "must be fitted on runs with conditions")
        for name, value in (("num_members", num_members), ("cache_size", cache_size)):
            if value < 1:
                raise ConfigError(name, value, "must be at least 1")
        generator.layout.check_model(model)
        self.model = unwrap(model)
        check_eval(self.model)
        self.generator, self.names = generator, generator.variables.names
        self.num_members, self.cache_size, self.seed = num_members, cache_size, seed
        self.sampling, self.ensemble_options = sampling or SamplingConfig(), dict(ensemble_options or {})
        # A plain attribute: the ensembles share the model, which is a submodule of the dial already.
        self._ensembles: OrderedDict[str, DiffusionEnsemble] = OrderedDict()
        self.eval()

    def extra_repr(self) -> str:
        return f"names={self.names}, num_members={self.num_members}"

    def _apply(self, fn: Any, recurse: bool = True) -> Dial:
        self._ensembles.clear()  # of the device or dtype that the model is leaving
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def ensemble(self, **condition: Any) -> DiffusionEnsemble:
        """The ensemble of a condition, made now unless it is kept.

        Raises:
            UnknownConditionError: a condition that could not have been recorded, or outside the recorded range.
        """
        plain = parse_condition(condition, "the condition") if condition else {}
        key = json.dumps(plain, sort_keys=True)
        if key not in self._ensembles:
            rng = torch.Generator().manual_seed(self.seed)
            weights = self.generator.sample(self.num_members, self.sampling, condition=plain, rng=rng)
            made = DiffusionEnsemble(self.model, weights, copy=False, **self.ensemble_options)
            self._ensembles[key] = made
            while len(self._ensembles) > self.cache_size:
                self._ensembles.popitem(last=False)
        self._ensembles.move_to_end(key)
        return self._ensembles[key]

    def forward(
        self, *args: Any, conditions: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the condition's ensemble answers.

        Args:
            *args: inputs of the model, (B, ...) each where ``conditions`` is given.
            conditions: one for each of the B inputs; inputs of one condition run together.
            **kwargs: the condition by its names, for all inputs alike; other names are inputs of the model.

        Returns:
            As of ``DiffusionEnsemble``: log of the mean probability, (B, C), unless its options say otherwise.

        Raises:
            ConfigError: ``conditions`` beside a condition by name, or another number of them than of inputs.
            UnknownConditionError: as of :meth:`ensemble`.
        """
        condition = {name: kwargs.pop(name) for name in self.names if name in kwargs}
        if conditions is None:
            answer: Tensor | tuple[Tensor, Tensor] = self.ensemble(**condition)(*args, **kwargs)
            return answer
        if condition:
            raise ConfigError("conditions", list(conditions), f"must be given without {', '.join(condition)}")
        return self._of_rows(args, kwargs, conditions)

    def _of_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], conditions: Sequence[Mapping[str, Any]]
    ) -> Tensor | tuple[Tensor, Tensor]:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        B = len(given[0]) if given else 0
        if len(conditions) != B or not B:
            raise ConfigError("conditions", f"{len(conditions)} of them", f"must be one for each of the {B} inputs")
        groups: dict[str, list[int]] = {}
        for row, condition in enumerate(conditions):
            groups.setdefault(json.dumps(dict(condition), sort_keys=True, default=_plain), []).append(row)
        parts: list[Any] = []
        for rows in groups.values():
            chosen = torch.tensor(rows)

            def own(value: Any, chosen: Tensor = chosen) -> Any:
                is_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == B
                return value[chosen.to(value.device)] if is_row else value

            ensemble = self.ensemble(**conditions[rows[0]])
            parts.append(ensemble(*map(own, args), **{name: own(value) for name, value in kwargs.items()}))
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)[order.to(parts[0].device)]
        mean, variance = (torch.cat(each)[order.to(each[0].device)] for each in zip(*parts, strict=True))
        return mean, variance


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
