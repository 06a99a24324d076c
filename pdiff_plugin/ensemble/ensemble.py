"""Many members of one model as one module: the mean of their predictions, and how far they disagree.

Shapes: M members, m members computed together, B inputs in a batch, C classes, ``*shape`` one tensor's own shape,
``...`` further axes of an output.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pdiff_plugin.ensemble.prediction import Prediction, PredictionSums, RegressionPrediction, join, member_axis
from pdiff_plugin.ensemble.soup import uniform_soup
from pdiff_plugin.errors import ConfigError, DataError, FormatError, LayoutMismatchError, TrainingModeError
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.modules.batches import Inputs, arguments_of, logits_of, num_batches_in
from pdiff_plugin.modules.names import check_fits, named_tensors, shapes_of, unwrap, wrapped_names
from pdiff_plugin.modules.swap import swap_
from pdiff_plugin.modules.trunk_cache import Run, Trunk, TrunkCache, copied_inputs, exclusive
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.tensor_files import from_json, load_tensors, save_tensors

if TYPE_CHECKING:
    from pdiff_plugin.generator.generator import WeightGenerator

logger = logging.getLogger(__name__)

FORMAT = "pdiff-ensemble"
FORMAT_VERSION = 1

Strategy = Literal["auto", "trunk", "loop"]
EnsembleTask = Literal["classification", "regression"]
Evaluation = Literal["vmap tail", "cached loop", "plain loop"]

# Beyond this a larger chunk of members is no faster (measured on a ResNet-18: 8 members take as long as 32, each).
_MAX_CHUNK_BYTES = 2 * 2**30
# On a CPU, glibc gives large tensors back to the system at once, and faulting their pages in again takes as long as the
# arithmetic (last two norms of a small ResNet, 32 members: 2.1 s of CPU time in one chunk, 1.5 s with this bound).
_MAX_CPU_TENSOR_BYTES = 8 * 2**20


class DiffusionEnsemble(nn.Module):
    """M members that share one model and differ in the tensors of ``weights``.

    It stands in for the model in an evaluation loop: calling it gives the log of the mean member probability, so
    ``argmax``, ``softmax`` and ``cross_entropy`` work unchanged (for regression, the mean output). Nothing is written
    into the model. It runs in eval mode only and records no gradients. BatchNorm statistics are the members' where
    recorded, else the model's. Members take turns inside the live model, so only one thread may run it at a time.

    What comes before the first member-specific operation is computed once per batch, and the rest for several members
    at once, as far as the model allows; :attr:`evaluation` tells what was found to work.

    Args:
        model: the user's model, in eval mode. Kept as :attr:`model`, without its outer wrappers, and not copied.
        weights: name -> (M, *shape), names and shapes of the model; cast to its dtypes and moved to its device.
        strategy: ``loop`` computes every member whole. ``trunk`` shares what members have in common. ``auto`` is
            ``trunk``, but checks one member of the first batch against the loop, and falls back to it if they differ.
        vectorize: run the tail of several members under ``torch.func.vmap``. By default, unless convolution weights
            are among the members' (they become grouped convolutions, slower than a loop on most CPUs).
        member_chunk: members computed at once; by default as many as fit into a quarter of the free memory, on a CPU
            fewer where their tensors are large. Results may differ by rounding between chunk sizes.
        task: ``regression`` averages outputs instead of probabilities.
        class_axis: axis of the classes in the model's output; 1 suits (B, C) and dense (B, C, H, W) logits.
        select: picks the logits out of the model's output; by default the output itself, its ``logits``, or the first
            of a tuple.

    Raises:
        LayoutMismatchError: naming the first tensor that the model lacks or has in another shape.
        TrainingModeError: the model, or a part of it, is in train mode.
    """

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
    ) -> None:
        super().__init__()
        for field, value, choices in (("strategy", strategy, Strategy), ("task", task, EnsembleTask)):
            if value not in get_args(choices):
                raise ConfigError(field, value, f"must be one of {', '.join(get_args(choices))}")
        if member_chunk is not None and member_chunk < 1:
            raise ConfigError("member_chunk", member_chunk, "must be at least 1")
        self.model = unwrap(model)
        _check_eval(self.model)
        self.strategy, self.task, self.class_axis, self.member_chunk = strategy, task, class_axis, member_chunk
        self.vectorize, self.select = vectorize, select
        self.set_weights(weights)
        self.eval()

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the members. Argument and errors are those of the constructor; nothing changes when one is raised."""
        weights = weights if isinstance(weights, WeightSet) else WeightSet(weights)
        if weights.num_members == 0:
            raise ConfigError("weights", weights, "must hold at least one member")
        expected = {name: tuple(stacked.shape[1:]) for name, stacked in weights.items()}
        check_fits(expected, shapes_of(named_tensors(self.model)), "the weight set")
        self.num_members = weights.num_members
        self.names = list(weights)
        raw, live = wrapped_names(self.model), named_tensors(self.model)
        self._raw_names = [raw[name] for name in self.names]
        # Names hold dots, which a buffer's may not: buffers are numbered in the order of `names`.
        self._stack = nn.Module()
        for index, name in enumerate(self.names):
            # A copy: the ensemble must not change when its source does.
            stacked = weights[name].detach().to(live[name], copy=True, memory_format=torch.contiguous_format)
            self._stack.register_buffer(str(index), stacked)
        self._stack.eval()
        self._cache = TrunkCache(self.model, self.names)
        has_conv = _has_conv_weights(self.model, self.names)
        self._vectorize = not has_conv if self.vectorize is None else self.vectorize
        # Compiled parts would be compiled anew for every routed call.
        self._is_plain = self.strategy == "loop" or any(clean != inner for clean, inner in raw.items())
        self._is_checked = self.strategy == "trunk"

    @property
    def weights(self) -> WeightSet:
        """The members' tensors, name -> (M, *shape), as they are on the ensemble's device. Not a copy."""
        return WeightSet(dict(zip(self.names, self._stack.buffers(), strict=True)))

    @property
    def evaluation(self) -> Evaluation:
        """How members are computed, as far as is known: it gets simpler when a batch shows that it must."""
        if self._is_plain:
            return "plain loop"
        return "vmap tail" if self._vectorize else "cached loop"

    def extra_repr(self) -> str:
        return f"num_members={self.num_members}, tensors={len(self.names)}, evaluation={self.evaluation!r}"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log of the mean member probability, (B, C, ...), for the model's own arguments; mean output in regression."""
        total: Tensor | None = None

        def add(outputs: Tensor) -> None:  # (m, B, C, ...)
            nonlocal total
            if self.task == "regression":
                part = _at_least_float32(outputs).sum(0)
                total = part if total is None else total + part
            else:
                part = self._log_probabilities(outputs).logsumexp(0)
                total = part if total is None else torch.logaddexp(total, part)

        self._each_chunk(args, kwargs, add)
        assert total is not None  # an ensemble has at least one member
        return total / self.num_members if self.task == "regression" else total - math.log(self.num_members)

    def members(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (in regression, outputs) of every member, (M, B, C, ...)."""
        chunks: list[Tensor] = []
        self._each_chunk(args, kwargs, chunks.append)
        return torch.cat(chunks)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction | RegressionPrediction:
        """Mean prediction with the uncertainty of each input: in classification, split into its two parts."""
        if self.task == "regression":
            outputs = _at_least_float32(self.members(*args, **kwargs))  # (M, B, ...)
            return RegressionPrediction(outputs.mean(0), outputs.var(0, correction=0))
        sums = PredictionSums(self.class_axis)
        self._each_chunk(args, kwargs, lambda logits: sums.add(self._log_probabilities(logits)))
        return sums.prediction()

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
            args, kwargs = arguments_of(batch, self._device, inputs)
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write members and model as one safetensors file, which :meth:`load` needs no training run to read."""
        tensors = {f"members/{name}": tensor for name, tensor in self.weights.items()}
        shared = {name: tensor for name, tensor in named_tensors(self.model).items() if name not in self.names}
        tensors |= {f"model/{name}": tensor for name, tensor in shared.items()}
        settings = {"strategy": self.strategy, "task": self.task, "class_axis": self.class_axis}
        header = {
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
        settings = from_json(Path(path), header, "settings")
        if not isinstance(settings, dict):
            raise FormatError(str(path), f"settings {settings!r}", "a JSON object of settings")
        ensemble, shared = cls(model, _under("members/", tensors), **(settings | options)), _under("model/", tensors)
        for name, tensor in named_tensors(model).items():
            if name not in shared and name not in ensemble.names:
                raise LayoutMismatchError(name, "no such tensor", str(tuple(tensor.shape)), str(path))
        swap_(model, shared)
        return ensemble

    @property
    def _device(self) -> torch.device:
        return next(self._stack.buffers()).device

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        axis = member_axis(self.class_axis)
        if logits.ndim < 2 or not -logits.ndim < axis < logits.ndim or logits.shape[axis] < 2:
            raise ConfigError(
                "class_axis",
                self.class_axis,
                f"must name an axis of at least 2 classes, but outputs have shape {tuple(logits.shape[1:])}; "
                'outputs without classes need task="regression"',
            )
        return _at_least_float32(logits).log_softmax(axis)

    def _each_chunk(self, args: tuple[Any, ...], kwargs: dict[str, Any], consume: Callable[[Tensor], None]) -> None:
        """Hand the logits of members 0..M-1 to ``consume`` in order, (m, B, C, ...) at a time."""
        if torch.compiler.is_compiling():
            # Traced code has one way to go; a change of gradient mode would cut an exported graph in pieces.
            consume(self._several(slice(None))(args, kwargs).detach())
            return
        _check_eval(self.model)
        # Tensors made in inference mode do not count the writes into them. Leaving it turns gradients on.
        with torch.inference_mode(False), torch.no_grad(), exclusive(self.model):
            start = 0
            if not self._is_plain:
                with self._cache.batch(self._stack.buffers(), args, kwargs) as trunk:
                    start = self._over_trunk(trunk, args, kwargs, consume)
            for index in range(start, self.num_members):
                consume(self._whole(index, args, kwargs))

    def _over_trunk(
        self, trunk: Trunk, args: tuple[Any, ...], kwargs: dict[str, Any], consume: Callable[[Tensor], None]
    ) -> int:
        """Members by recording and replaying; returns how many were done before replaying was given up."""
        index = 0
        while index < self.num_members:
            if not trunk.is_recorded:
                consume(trunk.record(self._one(index)))
                index += 1
                if not trunk.is_sound:
                    return self._give_up(index, "a part that all members share overwrites what another has read")
                continue
            size = self._chunk_size(trunk) if self._vectorize else 1
            run = self._several(slice(index, index + size)) if self._vectorize else self._one(index)
            try:
                with _quiet_vmap():
                    logits = trunk.replay(run)
            except RuntimeError as error:
                if not self._vectorize:
                    raise
                # vmap refuses in many words, some of them a kernel's own. If it was not vmap, this raises again.
                logits = trunk.replay(self._one(index))
                logger.info("members of %s run one by one: %s", type(self.model).__name__, error)
                self._vectorize = False
            if logits is None:
                continue
            if not self._is_checked:
                self._is_checked = True
                last = index + len(logits) - 1
                if not _agree(logits[-1:], self._whole(last, args, kwargs)):
                    return self._give_up(index, "its members differ when their common part is computed once")
            consume(logits)
            index += len(logits)
        return index

    def _give_up(self, done: int, reason: str) -> int:
        logger.warning("%s is run whole for every member: %s", type(self.model).__name__, reason)
        self._is_plain = True
        return done

    def _chunk_size(self, trunk: Trunk) -> int:
        if self.member_chunk is not None:
            return self.member_chunk
        # About four of the largest activations live at once: input, output, shortcut and the kernel's workspace.
        member_bytes = 4 * trunk.largest_tail_bytes + 1
        most = min(_MAX_CHUNK_BYTES, _free_bytes(self._device) // 4) // member_bytes
        if self._device.type == "cpu":
            most = min(most, _MAX_CPU_TENSOR_BYTES // (trunk.largest_tail_bytes + 1))
        return max(1, most)

    def _whole(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One member, (1, B, C, ...), that shares nothing with others."""
        return self._one(index)(*copied_inputs((args, kwargs)))

    def _one(self, index: int) -> Run:
        """Computes one member, (1, B, C, ...)."""
        # Sliced here: taking a slice is already a use of a generated tensor, which would end the recorded trunk.
        tensors = [stacked[index] for stacked in self._stack.buffers()]
        return lambda args, kwargs: self._call(tensors, args, kwargs)[None]

    def _several(self, chunk: slice) -> Run:
        """Computes a chunk of members at once, (m, B, C, ...)."""
        stacked = [tensor[chunk] for tensor in self._stack.buffers()]

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            logits: Tensor = vmap(lambda *tensors: self._call(tensors, args, kwargs))(*stacked)
            return logits

        return run

    def _call(self, tensors: Iterable[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        output = functional_call(self.model, dict(zip(self._raw_names, tensors, strict=True)), args, kwargs)
        return logits_of(output) if self.select is None else self.select(output)


def ensemble_from_diffusion(
    model: nn.Module,
    generator: WeightGenerator | str | os.PathLike[str],
    *,
    num_members: int = 32,
    num_sampling_steps: int | None = None,
    temperature: float = 1.0,
    rng: torch.Generator | None = None,
    ensemble_options: Mapping[str, Any] | None = None,
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
        ensemble_options: further arguments of :class:`DiffusionEnsemble`.
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
    return DiffusionEnsemble(model, weights, **(ensemble_options or {}))


def _check_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise TrainingModeError(f"{type(module).__name__} {name!r}" if name else type(module).__name__)


def _has_conv_weights(model: nn.Module, names: Iterable[str]) -> bool:
    live = named_tensors(model)
    generated = {id(live[name]) for name in names}
    convolutions = (module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd))
    return any(id(conv.weight) in generated for conv in convolutions)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute one member differ by no more than rounding."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(expected.dtype, 5e-2)
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _at_least_float32(tensor: Tensor) -> Tensor:
    # In bfloat16 a mean over members would drown in rounding.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _quiet_vmap() -> Iterator[None]:
    """Without the warning that an operation has a loop inside vmap: it is not slower than our own would be."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop because we have not yet implemented", UserWarning
        )
        yield


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:  # only Linux tells without a library
        return 4 * _MAX_CHUNK_BYTES
    return 1024 * next(int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
