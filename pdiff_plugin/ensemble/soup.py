"""One model out of many members: averages of weights, the best member, and a gate for bad ones.

Every ``score`` is a function of the user's model, higher is better, that measures on held-out data: data that neither
training saw nor the final figures are reported on. The members take turns inside the live model, which is bit-identical
to before when the call returns.

Shapes: M members, ``*shape`` one tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.swap import swapped

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Soup:
    """Averaged weights and what went into them.

    Attributes:
        state: name -> (*shape).
        ingredients: members that were averaged, best first. With one of them this is no soup but the best member.
        score: of the average.
        member_scores: of every member alone, in the order of the set.
    """

    state: dict[str, Tensor]
    ingredients: tuple[int, ...]
    score: float
    member_scores: tuple[float, ...]


@dataclass(frozen=True)
class BestMember:
    """The member with the highest score.

    Attributes:
        state: its tensors, name -> (*shape).
        index: its place in the set.
        score: its score. Chosen as the largest of M noisy numbers, it flatters: report it on other data.
        member_scores: of every member, in the order of the set.
    """

    state: dict[str, Tensor]
    index: int
    score: float
    member_scores: tuple[float, ...]


@dataclass(frozen=True)
class KeptMembers:
    """What a quality gate let through.

    Attributes:
        weights: the members kept, in their order.
        indices: their places in the set that was judged.
        member_scores: of every member of that set.
    """

    weights: WeightSet
    indices: tuple[int, ...]
    member_scores: tuple[float, ...]

    @property
    def num_dropped(self) -> int:
        return len(self.member_scores) - len(self.indices)


def uniform_soup(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of all members, name -> (*shape), for ``weights`` of name -> (M, *shape).

    Averaged BatchNorm statistics only approximate those of the averaged weights; see ``recalibrate_batchnorm``.
    """
    # float64: in float16 the sum over members would overflow or round.
    return {name: tensor.mean(0, dtype=torch.float64).to(tensor.dtype) for name, tensor in weights.items()}


def greedy_soup(model: nn.Module, weights: Mapping[str, Tensor], score: Score) -> Soup:
    """Average members greedily: from the best on, each joins if the average does not get worse with it.

    Wortsman et al. 2022 (arXiv 2203.05482), recipe 1. Costs 2 M - 1 calls of ``score``.

    Args:
        model: the user's model, in the mode that ``score`` wants.
        weights: name -> (M, *shape).
        score: of the model as it stands, on held-out data.

    Raises:
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape.
    """
    weights = _as_set(weights)
    scores = member_scores(model, weights, score)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    ingredients, best = [order[0]], scores[order[0]]
    for index in order[1:]:
        with swapped(model, uniform_soup(weights.select([*ingredients, index]))):
            found = float(score(model))
        if found >= best:
            ingredients.append(index)
            best = found
    return Soup(uniform_soup(weights.select(ingredients)), tuple(ingredients), best, scores)


def best_member(model: nn.Module, weights: Mapping[str, Tensor], score: Score) -> BestMember:
    """The member with the highest ``score`` on held-out data; the first of equals. Arguments as in greedy_soup."""
    weights = _as_set(weights)
    scores = member_scores(model, weights, score)
    index = max(range(len(scores)), key=scores.__getitem__)
    state = {name: tensor.clone() for name, tensor in weights.member(index).items()}
    return BestMember(state, index, scores[index], scores)


def keep_above(model: nn.Module, weights: Mapping[str, Tensor], score: Score, threshold: float) -> KeptMembers:
    """Drop the members that score below ``threshold``, or not a number. Arguments as in greedy_soup.

    Raises:
        ConfigError: no member reaches the threshold; the best score is named.
    """
    weights = _as_set(weights)
    scores = member_scores(model, weights, score)
    kept = [index for index, found in enumerate(scores) if found >= threshold]
    if not kept:
        raise ConfigError(
            "threshold", threshold, f"must be reached by a member; the best of {len(scores)} scored {max(scores):.6g}"
        )
    return KeptMembers(weights.select(kept), tuple(kept), scores)


def member_scores(model: nn.Module, weights: Mapping[str, Tensor], score: Score) -> tuple[float, ...]:
    """``score`` of each member in turn."""
    scores = []
    for state in _as_set(weights).members():
        with swapped(model, state):
            scores.append(float(score(model)))
    return tuple(scores)


def _as_set(weights: Mapping[str, Tensor]) -> WeightSet:
    weights = weights if isinstance(weights, WeightSet) else WeightSet(weights)
    if weights.num_members == 0:
        raise ConfigError("weights", weights, "must hold at least one member")
    return weights


__all__: Sequence[str] = (
    "BestMember",
    "KeptMembers",
    "Soup",
    "best_member",
    "greedy_soup",
    "keep_above",
    "member_scores",
    "uniform_soup",
)
