"""Many members of one model as one module: the mean of their predictions, and how far they disagree.

Shapes: M members, m members computed together, B inputs in a batch, C classes, ``*shape`` one tensor's own shape,
``...`` further axes of an output.
"""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pdiff_plugin.config import SamplingConfig, configured
from pdiff_plugin.ensemble.prediction import Prediction, PredictionSums, RegressionPrediction, join, member_axis
from pdiff_plugin.ensemble.runner import (
    Apart,
    Execution,
    MemberRunner,
    Stacked,
    Strategy,
    check_eval,
    gaussians_of,
)
from pdiff_plugin.ensemble.soup import uniform_soup
from pdiff_plugin.errors import ConfigError, DataError, FormatError, LayoutMismatchError
from pdiff_plugin.generator.weights import ApartSet, WeightSet
from pdiff_plugin.hub import About, HubMixin, Judged
from pdiff_plugin.modules.batches import Inputs, arguments_of, num_batches_in
from pdiff_plugin.modules.names import check_fits, named_tensors, shapes_of, unwrap
from pdiff_plugin.modules.swap import swap_
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.tensor_files import from_json, load_tensors, save_tensors

if TYPE_CHECKING:
    from pdiff_plugin.generator.generator import WeightGenerator

FORMAT = "pdiff-ensemble"
FORMAT_VERSION = 1

EnsembleTask = Literal["classification", "multilabel", "regression", "gaussian-regression"]


class DiffusionEnsemble(HubMixin, nn.Module):
    """M members that share one model and differ in the tensors of ``weights``.

    It stands in for the model in an evaluation loop: calling it gives the log of the mean member probability, so
    ``argmax``, ``softmax`` and ``cross_entropy`` work unchanged (other tasks: see ``task``). Nothing is written
    into the model. It runs in eval mode only and records no gradients. BatchNorm statistics are the members' where
    recorded, else the model's. Members take turns inside the live model, so only one thread may run it at a time.

    What comes before the first member-specific operation is computed once per batch, and the rest for several members
    at once, as far as the model allows; :attr:`execution` tells what was found to work.

    Args:
        model: the user's model, in eval mode. Kept as :attr:`model`, without its outer wrappers, and not copied.
        weights: name -> (M, *shape), names and shapes of the model; cast to its dtypes and moved to its device. Those
            of ``WeightSet.from_files`` stay in their files: each member is read when its turn comes, and run whole.
        strategy: ``loop`` computes every member whole. ``trunk`` shares what members have in common. ``auto`` is
            ``trunk``, but checks one member of the first batch against the loop, and falls back to it if they differ.
        vectorize: run the tail of several members under ``torch.func.vmap``. By default, unless convolution weights
            are among the members' (they become grouped convolutions, slower than a loop on most CPUs).
        member_chunk: members computed at once; by default as many as fit into a quarter of the free memory, on a CPU
            fewer where their tensors are large. Results may differ by rounding between chunk sizes.
        task: what is averaged. ``classification`` softmax probabilities, ``multilabel`` those of each label (the output
            is the logit of their mean), ``regression`` the outputs. ``gaussian-regression`` takes models that return
            (mean, variance), and gives those of the even mixture of the members' Gaussians.
        class_axis: axis of the classes in the model's output; 1 suits (B, C) and dense (B, C, H, W) logits.
        select: picks the logits out of the model's output; by default the output itself, its ``logits``, or the first
            of a tuple; for ``gaussian-regression`` a pair, or what has ``mean`` and ``variance`` or ``log_variance``.
        copy: False keeps the tensors of ``weights`` themselves where they have the model's dtype and device, which
            takes no further memory; they must then stay as they are.

    Raises:
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape.
        TrainingModeError: the model, or a part of it, is in train mode.
    """

    hub_file: ClassVar[str] = "ensemble.safetensors"

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        *,
        strategy: Strategy = "auto",
        vectorize: bool | None = None,
        member_chunk: int | None = None,
        task: EnsembleTask = "classification",
        class_axis: int = 1,
        select: Callable[[Any], Tensor] | None = None,
        copy: bool = True,
    ) -> None:
        super().__init__()
        for field, value, choices in (("strategy", strategy, Strategy), ("task", task, EnsembleTask)):
            if value not in get_args(choices):
                raise ConfigError(field, value, f"must be one of {', '.join(get_args(choices))}")
        if member_chunk is not None and member_chunk < 1:
            raise ConfigError("member_chunk", member_chunk, "must be at least 1")
        self.model = unwrap(model)
        check_eval(self.model)
        self.strategy, self.task, self.class_axis, self.member_chunk = strategy, task, class_axis, member_chunk
        self.vectorize, self.select, self._copy = vectorize, select, copy
        self.set_weights(weights)
        self.eval()

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the members. Argument and errors are those of the constructor; nothing changes when one is raised."""
        weights = weights if isinstance(weights, WeightSet) else WeightSet(weights)
        if weights.num_members == 0:
            raise ConfigError("weights", weights, "must hold at least one member")
        live = named_tensors(self.model)
        check_fits(weights.shapes, shapes_of(live), "the weight set")
        if isinstance(weights, ApartSet) and self.strategy == "trunk":
            raise ConfigError("strategy", self.strategy, "must be auto or loop for members that stay in their files")
        self.num_members = weights.num_members
        self.names = list(weights)
        self._stack = nn.Module()
        self._apart = weights if isinstance(weights, ApartSet) else None
        if self._apart is None:
            # Names hold dots, which a buffer's may not: buffers are numbered in the order of `names`.
            for index, name in enumerate(self.names):
                # A copy unless told otherwise: the ensemble must not change when its source does.
                stacked = weights[name].detach().to(live[name], copy=self._copy, memory_format=torch.contiguous_format)
                self._stack.register_buffer(str(index), stacked)
        self._stack.eval()
        self._runner = MemberRunner(
            self.model,
            Stacked(self._stack) if self._apart is None else Apart(self.model, self._apart),
            self.names,
            strategy=self.strategy,
            vectorize=self.vectorize,
            member_chunk=self.member_chunk,
            select=self._gaussians if self.task == "gaussian-regression" else self.select,
        )

    @property
    def weights(self) -> WeightSet:
        """The members' tensors, name -> (M, *shape), as they are on the ensemble's device. Not a copy.

        Those that stay in their files are as they are there.
        """
        if self._apart is not None:
            return self._apart
        return WeightSet(dict(zip(self.names, self._stack.buffers(), strict=True)))

    @property
    def execution(self) -> Execution:
        """How members are computed, as far as is known: it gets simpler when a batch shows that it must."""
        return self._runner.execution

    @property
    def evaluation(self) -> Execution:
        """The former name of :attr:`execution`."""
        warnings.warn("DiffusionEnsemble.evaluation is now called execution", DeprecationWarning, stacklevel=2)
        return self.execution

    def extra_repr(self) -> str:
        return f"num_members={self.num_members}, tensors={len(self.names)}, execution={self.execution!r}"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Log of the mean member probability, (B, C, ...), for the model's own arguments.

        Mean output in regression, logits (B, L) of several labels, mean and variance of Gaussians.
        """
        if self.task == "gaussian-regression":
            found = self.predict(*args, **kwargs)
            assert isinstance(found, RegressionPrediction)
            return found.mean, found.variance
        total: Tensor | None = None

        def add(outputs: Tensor) -> None:  # (m, B, C, ...)
            nonlocal total
            if self.task == "regression":
                part = _at_least_float32(outputs).sum(0)
                total = part if total is None else total + part
            else:
                part = self._log_probabilities(outputs).logsumexp(0)
                total = part if total is None else torch.logaddexp(total, part)

        self._runner.each_chunk(args, kwargs, add)
        assert total is not None  # an ensemble has at least one member
        if self.task == "multilabel":
            return total[:, 1] - total[:, 0]
        return total / self.num_members if self.task == "regression" else total - math.log(self.num_members)

    def members(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (in regression, outputs; of Gaussians, mean and variance last) of all members, (M, B, ...)."""
        chunks: list[Tensor] = []
        self._runner.each_chunk(args, kwargs, chunks.append)
        return torch.cat(chunks)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction | RegressionPrediction:
        """Mean prediction with the uncertainty of each input: in classification, split into its two parts."""
        if self.task == "regression":
            outputs = _at_least_float32(self.members(*args, **kwargs))  # (M, B, ...)
            return RegressionPrediction(outputs.mean(0), outputs.var(0, correction=0))
        if self.task == "gaussian-regression":
            mean, variance = _at_least_float32(self.members(*args, **kwargs)).unbind(-1)  # (M, B, ...)
            return RegressionPrediction(mean.mean(0), variance.mean(0) + mean.var(0, correction=0))
        sums = PredictionSums(1 if self.task == "multilabel" else self.class_axis)
        self._runner.each_chunk(args, kwargs, lambda logits: sums.add(self._log_probabilities(logits)))
        found = sums.prediction()
        return replace(found, probabilities=found.probabilities[:, 1]) if self.task == "multilabel" else found

    def predict_loader(
        self,
        loader: Iterable[Any],
        *,
        inputs: Inputs | None = None,
        on_progress: OnProgress | None = None,
    ) -> Prediction | RegressionPrediction:
        """:meth:`predict` over all batches of ``loader``, joined along B, on the CPU.

        Args:
            loader: gives batches; they are moved to the ensemble's device.
            inputs: batch -> what the model is called with: a tensor, a tuple of positional or a dictionary of keyword
                arguments. By default the batch itself, without the labels of a pair or of a dictionary.
            on_progress: told the number of batches done; 0 batches in total when the loader has no length.
        """
        total = num_batches_in(loader)
        parts: list[Any] = []
        for done, batch in enumerate(loader, start=1):
            args, kwargs = arguments_of(batch, self._runner.device, inputs)
            parts.append(self.predict(*args, **kwargs))
            if on_progress is not None:
                on_progress(Progress("predict", done, total))
        if not parts:
            raise DataError("loader", "no batches", "must give at least one batch")
        return cast("Prediction | RegressionPrediction", join(parts))

    def members_state_dicts(self) -> list[dict[str, Tensor]]:
        """One state dict of the generated tensors per member, for ``model.load_state_dict(..., strict=False)``."""
        return [{name: tensor.clone() for name, tensor in member.items()} for member in self.weights.members()]

    def to_soup(self) -> nn.Module:
        """A copy of the model that carries the mean of the members' weights: one forward pass, one prediction.

        Averaged BatchNorm statistics only approximate those of the averaged weights; see ``recalibrate_batchnorm``.
        """
        model = copy.deepcopy(self.model)
        swap_(model, uniform_soup(self.weights))
        return model

    def save(self, path: str | os.PathLike[str], header: Mapping[str, str] | None = None) -> None:
        """Write members and model as one safetensors file, which :meth:`load` needs no training run to read.

        Args:
            path: the file, which is replaced.
            header: more text for its header.
        """
        tensors = {f"members/{name}": tensor for name, tensor in self.weights.items()}
        shared = {name: tensor for name, tensor in named_tensors(self.model).items() if name not in self.names}
        tensors |= {f"model/{name}": tensor for name, tensor in shared.items()}
        settings = {"strategy": self.strategy, "task": self.task, "class_axis": self.class_axis}
        header = {
            **(header or {}),
            "settings": json.dumps({**settings, "member_chunk": self.member_chunk}),
            "num_members": str(self.num_members),
        }
        save_tensors(Path(path), tensors, FORMAT, FORMAT_VERSION, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, **options: Any) -> DiffusionEnsemble:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            model: the same architecture, in eval mode; as with ``load_state_dict``, its weights become the file's.
            **options: arguments of the constructor that replace the saved ones (``select`` is never saved).

        Raises:
            FormatError: another kind of file, or a damaged one.
            FormatVersionError: from a newer release.
            LayoutMismatchError: the file belongs to another model; the first differing tensor is named. The model is
                left as it was.
        """
        tensors, header = load_tensors(Path(path), FORMAT, FORMAT_VERSION)
        settings = _settings(str(path), from_json(Path(path), header, "settings"))
        members, shared = _under("members/", tensors), _under("model/", tensors)
        if not members or min(tensor.ndim for tensor in members.values()) < 1:
            raise FormatError(str(path), "no members, or some of no number", "members/NAME (M, *shape)")
        for name, tensor in named_tensors(model).items():
            stored = members.get(name, shared.get(name, tensor))
            if stored.is_floating_point() != tensor.is_floating_point():
                raise LayoutMismatchError(name, str(stored.dtype), str(tensor.dtype), str(path))
        ensemble = cls(model, members, **(settings | options))
        for name, tensor in named_tensors(model).items():
            if name not in shared and name not in ensemble.names:
                raise LayoutMismatchError(name, "no such tensor", str(tuple(tensor.shape)), str(path))
        swap_(model, shared)
        return ensemble

    @classmethod
    def _load_shared(cls, path: Path, **options: Any) -> DiffusionEnsemble:
        return cls.load(path, **options)

    def _save_for_others(self, path: Path) -> None:
        self.save(path)

    def _about(self, source: str, evaluation: Judged | None) -> About:
        del evaluation
        num_values = sum(map(math.prod, self.weights.shapes.values()))
        text = (
            f"An ensemble of {self.num_members} members of one {type(self.model).__name__} as one module "
            f"({self.task}): they differ in {num_values:,} values in {len(self.names)} tensors, and the file holds the "
            "rest of the model, too."
        )
        loading = (
            "from pdiff_plugin import DiffusionEnsemble\n\n"
            "# model: the same architecture, whose weights become the file's\n"
            f"ensemble = DiffusionEnsemble.from_pretrained({source}, model=model.eval())"
        )
        return About(text, loading, ("ensemble",))

    def _gaussians(self, output: Any) -> Tensor:
        return gaussians_of(output if self.select is None else self.select(output))

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        if self.task == "multilabel":  # (m, B, L) -> (m, B, 2, L): each label is a choice of its own
            logits = _at_least_float32(logits)
            return torch.stack([logsigmoid(-logits), logsigmoid(logits)], dim=2)
        axis = member_axis(self.class_axis)
        if logits.ndim < 2 or not -logits.ndim < axis < logits.ndim or logits.shape[axis] < 2:
            raise ConfigError(
                "class_axis",
                self.class_axis,
                f"must name an axis of at least 2 classes, but outputs have shape {tuple(logits.shape[1:])}; "
                'outputs without classes need task="regression"',
            )
        return _at_least_float32(logits).log_softmax(axis)


def ensemble_from_diffusion(
    model: nn.Module,
    generator: WeightGenerator | str | os.PathLike[str],
    *,
    num_members: int = 32,
    condition: Mapping[str, Any] | None = None,
    sampling: SamplingConfig | None = None,
    rng: torch.Generator | None = None,
    ensemble_options: Mapping[str, Any] | None = None,
    **sample_options: Any,
) -> DiffusionEnsemble:
    """An ensemble of ``model`` whose members a fitted generator draws.

    Args:
        model: the model whose snapshots were recorded, in eval mode.
        generator: a :class:`WeightGenerator`, or the path of its file or of the folder that ``pdiff fit`` wrote.
        num_members: M.
        condition: what they are made for, as in ``condition={"angle": 50}``.
        sampling: how they are drawn.
        rng: source of the draws.
        ensemble_options: further arguments of :class:`DiffusionEnsemble`.
        **sample_options: single fields of ``sampling``, as ``temperature=0.9``.

    Raises:
        ConfigError: an option of sampling out of range.
        ConditionError: a condition that could not have been recorded, or outside the recorded range.
        LayoutMismatchError: the generator belongs to another model; the first differing tensor is named.
        TrainingModeError: the model is in train mode.
    """
    sampling = configured(SamplingConfig, sampling, sample_options)
    if isinstance(generator, str | os.PathLike):
        from pdiff_plugin.generator.generator import WeightGenerator

        generator = WeightGenerator.load(generator)
    # Before the draw, which may take a while.
    generator.layout.check_model(model)
    check_eval(unwrap(model))
    weights = generator.sample(num_members, sampling, condition=condition, rng=rng)
    return DiffusionEnsemble(model, weights, **(ensemble_options or {}))


def _at_least_float32(tensor: Tensor) -> Tensor:
    # In bfloat16 a mean over members would drown in rounding.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _settings(path: str, found: object) -> dict[str, Any]:
    """Those of a file that this release knows.

    Raises:
        FormatError: one is of another type.
    """
    if not isinstance(found, dict):
        raise FormatError(path, f"settings of type {type(found).__name__}", "a JSON object of settings")
    known = {"strategy": (str,), "task": (str,), "class_axis": (int,), "member_chunk": (int, type(None))}
    for name, kinds in known.items():
        if name in found and type(found[name]) not in kinds:
            raise FormatError(path, f"{name} {found[name]!r}", f"a value of type {kinds[0].__name__}")
    return {name: found[name] for name in known if name in found}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
