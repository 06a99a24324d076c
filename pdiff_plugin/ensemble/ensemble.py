"""Many members of one model as one module: the mean of their probabilities, and how far they disagree.

Shapes: M members, B inputs in a batch, C classes, ``*shape`` one tensor's own shape, ``...`` further axes of an output.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pdiff_plugin.errors import ConfigError, LayoutMismatchError, TrainingModeError
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import named_tensors, unwrap, wrapped_names

if TYPE_CHECKING:
    from pdiff_plugin.generator.generator import WeightGenerator


@dataclass(frozen=True)
class Prediction:
    """What an ensemble says about a batch.

    Attributes:
        probabilities: mean over members, (B, C, ...).
        predictive_entropy: entropy of that mean, in nats: all uncertainty, (B, ...).
        expected_entropy: mean of the members' entropies: what every member is unsure of, (B, ...).
        mutual_information: their difference: what the members disagree on, (B, ...).
        disagreement: share of pairs of members that choose different classes, (B, ...).
    """

    probabilities: Tensor
    predictive_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor


class DiffusionEnsemble(nn.Module):
    """M members that share one model and differ in the tensors of ``weights``.

    It stands in for the model in an evaluation loop: calling it gives the log of the mean member probability, so
    ``argmax``, ``softmax`` and ``cross_entropy`` work unchanged. Nothing is written into the model. It runs in eval
    mode only and records no gradients. BatchNorm statistics are the members' where recorded, else the model's.

    Args:
        model: the user's model, in eval mode. Kept as :attr:`model`, without its outer wrappers, and not copied.
        weights: name -> (M, *shape), names and shapes of the model; cast to its dtypes and moved to its device.

    Raises:
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape.
        TrainingModeError: the model, or a part of it, is in train mode.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        weights = weights if isinstance(weights, WeightSet) else WeightSet(weights)
        if weights.num_members == 0:
            raise ConfigError("weights", weights, "must hold at least one member")
        self.model = unwrap(model)
        self.num_members = weights.num_members
        _check_eval(self.model)
        raw = wrapped_names(self.model)
        # Names hold dots, which a buffer's may not: buffers are numbered in the order of `names`.
        self.names = list(weights)
        self._raw_names = [raw[name] for name in check_weights(self.model, weights)]
        self._stack = nn.Module()
        live = named_tensors(self.model)
        for index, name in enumerate(self.names):
            # A copy: the ensemble must not change when its source does.
            stacked = weights[name].detach().to(live[name], copy=True, memory_format=torch.contiguous_format)
            self._stack.register_buffer(str(index), stacked)
        self.eval()

    @property
    def weights(self) -> WeightSet:
        """The members' tensors, name -> (M, *shape), as they are on the ensemble's device. Not a copy."""
        return WeightSet(dict(zip(self.names, self._stack.buffers(), strict=True)))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log of the mean member probability, (B, C, ...), for the model's own arguments."""
        total: Tensor | None = None
        for logits in self._logits(args, kwargs):
            log_probabilities = _log_softmax(logits)
            total = log_probabilities if total is None else torch.logaddexp(total, log_probabilities)
        assert total is not None  # an ensemble has at least one member
        return total - math.log(self.num_members)

    def members(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of every member, (M, B, C, ...)."""
        return torch.stack(list(self._logits(args, kwargs)))

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """Mean probabilities with the uncertainty of each input, split into its two parts."""
        log_members = _log_softmax(self.members(*args, **kwargs), axis=2)  # (M, B, C, ...)
        log_mean = log_members.logsumexp(0) - math.log(self.num_members)  # (B, C, ...)
        predictive = _entropy(log_mean, axis=1)  # (B, ...)
        expected = _entropy(log_members, axis=2).mean(0)  # (B, ...)
        return Prediction(
            probabilities=log_mean.exp(),
            predictive_entropy=predictive,
            expected_entropy=expected,
            # Never negative (Jensen), but a difference of two rounded numbers may be.
            mutual_information=(predictive - expected).clamp_min(0.0),
            disagreement=_disagreement(log_members.argmax(2), log_members.shape[2]),
        )

    def _logits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        """Each member's logits in turn, (B, C, ...)."""
        _check_eval(self.model)
        with torch.no_grad():
            outputs = [
                _as_logits(functional_call(self.model, dict(zip(self._raw_names, tensors, strict=True)), args, kwargs))
                for tensors in zip(*self._stack.buffers(), strict=True)
            ]
        return iter(outputs)


def ensemble_from_diffusion(
    model: nn.Module,
    generator: WeightGenerator | str | os.PathLike[str],
    *,
    num_members: int = 32,
    num_sampling_steps: int | None = None,
    temperature: float = 1.0,
    rng: torch.Generator | None = None,
    **sample_options: Any,
) -> DiffusionEnsemble:
    """An ensemble of ``model`` whose members a fitted generator draws.

    Args:
        model: the model whose snapshots were recorded, in eval mode.
        generator: a :class:`WeightGenerator`, or the path of its file or of the folder that ``pdiff fit`` wrote.
        num_members: M.
        num_sampling_steps: of the sampler; the generator's own default unless given.
        temperature: scales the spread of the draws.
        rng: source of the draws.
        **sample_options: further arguments of :meth:`WeightGenerator.sample`.

    Raises:
        LayoutMismatchError: the generator belongs to another model; the first differing tensor is named.
        TrainingModeError: the model is in train mode.
    """
    if isinstance(generator, str | os.PathLike):
        from pdiff_plugin.generator.generator import WeightGenerator

        generator = WeightGenerator.load(generator)
    # Before the draw, which may take a while.
    generator.layout.check_model(model)
    _check_eval(unwrap(model))
    weights = generator.sample(
        num_members, num_sampling_steps=num_sampling_steps, temperature=temperature, rng=rng, **sample_options
    )
    return DiffusionEnsemble(model, weights)


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of ``weights`` (name -> (M, *shape)), checked against ``model``.

    Raises:
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape.
    """
    live = named_tensors(model)
    for name, stacked in weights.items():
        found = live.get(name)
        if found is None:
            raise LayoutMismatchError(
                name, str(tuple(stacked.shape[1:])), "no such tensor in this model", "the weight set"
            )
        if found.shape != stacked.shape[1:]:
            raise LayoutMismatchError(name, str(tuple(stacked.shape[1:])), str(tuple(found.shape)), "the weight set")
    return list(weights)


def _check_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise TrainingModeError(f"{type(module).__name__} {name!r}" if name else type(module).__name__)


def _as_logits(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, a mapping or object with ``logits``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ConfigError("model", type(output).__name__, "must return logits: a tensor, or an output with .logits")
    return output


def _log_softmax(logits: Tensor, axis: int = 1) -> Tensor:
    # At least float32: in bfloat16 a mean over members would drown in rounding.
    return logits.log_softmax(axis, dtype=torch.promote_types(logits.dtype, torch.float32))


def _entropy(log_probabilities: Tensor, axis: int) -> Tensor:
    probabilities = log_probabilities.exp()
    # A class of probability 0 has log -inf and adds nothing.
    return -(probabilities * log_probabilities).nan_to_num(nan=0.0).sum(axis)


def _disagreement(votes: Tensor, num_classes: int) -> Tensor:
    """Share of member pairs with different classes, (B, ...), for votes (M, B, ...)."""
    num_members = votes.shape[0]
    if num_members == 1:
        return torch.zeros(votes.shape[1:], device=votes.device)
    counts = torch.zeros(num_classes, *votes.shape[1:], device=votes.device)
    counts.scatter_add_(0, votes, torch.ones_like(votes, dtype=counts.dtype))  # (C, B, ...)
    agreeing = (counts * (counts - 1)).sum(0)
    return 1.0 - agreeing / (num_members * (num_members - 1))
