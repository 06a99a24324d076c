"""Teach a generator by the loss of the task, where a fit knows weights alone.

What the generator makes is changed by a small network of the condition, without conditions of the member's own latents,
in its latents and along a few directions in which nothing that was recorded varied; gradients go through the user's
model. Weights that differ
little may answer very differently, which a fit to weights cannot know, and the runs' span is a ceiling otherwise.

Shapes: N conditions to learn from (or members, without conditions), H of them held out, C of one step, F features, K
latent width, r new directions, D values.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pdiff_plugin.config import RefineConfig, configured
from pdiff_plugin.errors import ConfigError, FitExistsError
from pdiff_plugin.fitting.centre_stage import spread_choice
from pdiff_plugin.fitting.runtime import Runtime
from pdiff_plugin.fitting.training import Schedule, Training, seeded, with_gradients
from pdiff_plugin.generator.condition import Condition as Asked
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.generator_file import FILE_NAME
from pdiff_plugin.generator.refinement import Refinement
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.generator.variables import Variables
from pdiff_plugin.loggers import Loggers, logged
from pdiff_plugin.modules.modes import modes_kept
from pdiff_plugin.modules.names import named_tensors, unwrap, wrapped_names
from pdiff_plugin.progress import OnProgress
from pdiff_plugin.snapshots.conditions import Condition, parse_condition
from pdiff_plugin.snapshots.files import is_number
from pdiff_plugin.snapshots.statistics import LOG_SUFFIX

logger = logging.getLogger(__name__)

# Stands for the user's model with generated weights in it; called as the model is.
Model = Callable[..., Any]
# Loss of one batch, a scalar: (model, condition).
Loss = Callable[[Model, Condition], Tensor]

STAGE = "refine"
_EVAL_EVERY = 50
# Held-out conditions, and batches at each of them.
_HELDOUT_SHARE, _MOST_HELDOUT, _NUM_BATCHES = 0.1, 16, 4
# With six angles of a circle, what did better at one of them did worse between them.
_FEW = 8
# Members of each condition that the network is added to, so that it suits all of them; and in all, without conditions.
_NUM_MEMBERS, _NUM_ALONE = 4, 256
# Adam moves all parameters at one rate; in these units that suits each. Directions are in units of the weights.
_KEPT_RATE, _DIRECTION_RATE = 10.0, 3.0


def refine(
    generator: WeightGenerator,
    model: nn.Module,
    loss: Loss,
    config: RefineConfig | None = None,
    *,
    conditions: Sequence[Mapping[str, Any]] | None = None,
    measure: Loss | None = None,
    out: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
    loggers: Loggers = (),
    **changes: Any,
) -> WeightGenerator:
    """A generator whose members do better at ``loss``, or the same one where that could not be had.

    ::

        def loss(model, condition):
            x, y = next(batches)
            return cross_entropy(model(rotated(x, condition["angle"])), y)

        angles = [{"angle": angle} for angle in range(360)]
        better = refine(generator, model, loss, conditions=angles)

    By far the most is gained with conditions that were never recorded. A tenth of the conditions are held out; what is
    returned did best there, and better than the generator as it was. The model comes back as it was given, and runs in
    eval mode.

    A generator that was fitted without conditions is refined as well: its members learn from ``loss(model, {})``. That
    is more training, which longer training may do as well. A few members are held out, which tells nothing of data that
    nobody trained on: pass a loss of such data as ``measure``.

    Args:
        generator: fitted by the subspace autoencoder.
        model: the one that its weights are for.
        loss: of one batch of training data at a condition, drawn anew in each call: (model, condition). It has the
            global random state for itself, the same one for the same condition of the same step in every run.
        config: number of steps and directions, seed.
        conditions: to learn from; the recorded ones unless given.
        measure: as ``loss``, of data that it does not take: what is returned did best by this where it was held out;
            ``loss`` itself unless given.
        out: folder for the generator, and while it runs for a checkpoint, from which the same call goes on; where it
            had finished it returns at once.
        on_progress: told the loss.
        loggers: take the curves and figures, see :class:`pdiff_plugin.Logger`; a text such as ``tensorboard:runs/a`` is
            opened and closed here.
        **changes: single fields of ``config``.

    Raises:
        ConfigError: a generator that is not of that kind or was refined before, fewer than four conditions, or
            conditions for a generator without.
        ConditionError: a condition that is none, or unlike the recorded ones.
        LayoutMismatchError: the model does not have the generator's tensors.
        FitExistsError: ``out`` holds a generator that was refined with other settings.
    """
    config = configured(RefineConfig, config, changes)
    folder = Path(out) if out is not None else None
    if folder is not None and (finished := finished_in(folder, config)) is not None:
        return finished
    with logged(loggers, {"refine": asdict(config)}, on_progress) as log:
        runtime = Runtime(folder, log.on_progress)
        refined = run_refinement(generator, model, Losses(loss, measure or loss), config, conditions, runtime)
        assert refined is not None, "one process is rank 0"
        log.figures({"report": {"refinement": refined.report["refinement"]}})
    return refined


@dataclass(frozen=True)
class Losses:
    """What is trained on, and what tells how good that was."""

    train: Loss
    measure: Loss


@with_gradients
def run_refinement(
    generator: WeightGenerator,
    model: nn.Module,
    losses: Losses,
    config: RefineConfig,
    conditions: Sequence[Mapping[str, Any]] | None,
    runtime: Runtime,
) -> WeightGenerator | None:
    """Refine as one process, or as one rank of a group: the generator on rank 0, None on the others."""
    folder = runtime.folder
    cloud = _Cloud.of(generator, conditions, config)
    started = time.perf_counter()
    with _weights_into(model, generator) as model_with:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        training = _Refining(generator, cloud, losses, model_with, config, runtime)
        training.run()
    if runtime.rank != 0:
        return None
    report = {
        "config": asdict(config),
        "learned_at": "members" if generator.variables is None else "conditions",
        "num_conditions": len(cloud.conditions),
        "num_heldout": int(cloud.heldout.sum()),
        "heldout_loss_before": training.history[0]["heldout_loss"],
        "heldout_loss": training.best_loss,
        "best_step": training.best_step,
        "history": training.history,
        "seconds": round(time.perf_counter() - started, 3),
    }
    refined = _assembled(generator, training.best) if training.best_step else generator
    refined = replace(refined, report={**generator.report, "refinement": report}, path=None)
    if not training.best_step:
        logger.warning("refining made nothing better where it was held out; the generator is as it was")
    if folder is None:
        return refined
    refined.save(folder)
    runtime.drop_checkpoints()
    return WeightGenerator.load(folder)


def finished_in(folder: Path, config: RefineConfig) -> WeightGenerator | None:
    """The generator that was refined into a folder with these settings, or None where there is none yet.

    Raises:
        FitExistsError: one of other settings.
    """
    if not (folder / FILE_NAME).exists():
        return None
    found = WeightGenerator.load(folder)
    if found.report.get("refinement", {}).get("config") != asdict(config):
        raise FitExistsError(str(folder), "not refined with these settings")
    return found


@dataclass(frozen=True)
class _Cloud:
    """The conditions to learn from, with the members that the generator makes there.

    Without conditions, each of N members is at one of its own, an empty one whose features are the member's latents.

    Attributes:
        conditions: N of them.
        features: (N, F).
        latents: of the members, (N, members of each, K).
        heldout: which are only measured, (N,) bool.
    """

    conditions: list[Condition]
    features: Tensor
    latents: Tensor
    heldout: Tensor

    @classmethod
    def of(cls, generator: WeightGenerator, given: Sequence[Mapping[str, Any]] | None, config: RefineConfig) -> _Cloud:
        if not isinstance(generator.autoencoder, SubspaceAutoencoder):
            found = f"fitted with the autoencoder {generator.config.autoencoder.kind!r}"
            raise ConfigError("generator", found, "must be fitted with 'subspace'")
        if generator.frames.refinement is not None:
            raise ConfigError("generator", "refined before", "must be the one that a fit made")
        if generator.variables is not None:
            return cls._of_conditions(generator, generator.variables, given, config)
        if given is not None:
            raise ConfigError("conditions", f"{len(given)} of them", "need a generator of runs with conditions")
        asked = Asked(torch.arange(_NUM_ALONE) % len(generator.trajectories))
        latents = generator.latents_of(asked, torch.Generator().manual_seed(config.seed))
        # The last ones are of all runs in turn, as all are.
        heldout = torch.arange(_NUM_ALONE) >= _NUM_ALONE - _MOST_HELDOUT
        return cls([{}] * _NUM_ALONE, latents, latents[:, None], heldout)

    @classmethod
    def _of_conditions(
        cls,
        generator: WeightGenerator,
        variables: Variables,
        given: Sequence[Mapping[str, Any]] | None,
        config: RefineConfig,
    ) -> _Cloud:
        conditions = [parse_condition(one, "conditions") for one in given or generator.conditions]
        for condition in conditions:
            variables.check(condition)
        features, first = torch.unique(variables.encode(conditions), dim=0, return_inverse=True)
        places = {int(place): number for number, place in reversed(list(enumerate(first.tolist())))}
        N = len(features)
        if N < 4:
            raise ConfigError("conditions", N, "must be at least 4 different ones")
        if N < _FEW:
            logger.warning(
                "%d conditions are few to learn from: the one held out was recorded, too, and others may come to do "
                "worse than before. Pass conditions= (--conditions) that were never recorded, as many as there can be.",
                N,
            )
        rng = torch.Generator().manual_seed(config.seed)
        latents = generator.latents_of(Asked.of(features.repeat_interleave(_NUM_MEMBERS, 0)), rng)
        heldout = spread_choice(features, min(_HELDOUT_SHARE, _MOST_HELDOUT / N), config.seed)
        return cls([conditions[places[n]] for n in range(N)], features, latents.view(N, _NUM_MEMBERS, -1), heldout)


class _Map(nn.Module):
    """What is learned; parameters are in units in which one learning rate suits them.

    Attributes:
        refinement: its ``kept`` is what is added to one.
        directions: that are new, (r, D).
    """

    def __init__(self, num_features: int, latent_dim: int, num_values: int, num_directions: int) -> None:
        super().__init__()
        self.refinement = Refinement(num_features, latent_dim, num_directions)
        nn.init.zeros_(self.refinement.kept)
        self.directions = nn.Parameter(torch.zeros(num_directions, num_values, dtype=torch.float32))

    @property
    def kept(self) -> Tensor:
        """Share of each latent that is kept, (K,)."""
        return 1.0 + _KEPT_RATE * self.refinement.kept

    @property
    def steps(self) -> Tensor:
        """The new directions in units of the weights (of their logarithm where that is modelled), (r, D)."""
        return _DIRECTION_RATE * self.directions


class _Decoder:
    """As the autoencoder's ``decode``, with more directions and differentiable."""

    def __init__(self, autoencoder: SubspaceAutoencoder) -> None:
        self.mean, self.basis = autoencoder.mean.float(), autoencoder.basis.float() * _unit(autoencoder)
        layout = autoencoder.layout
        self.logarithms = [layout.slices[name] for name in layout.names if name.endswith(LOG_SUFFIX)]

    def __call__(self, own: _Map, features: Tensor, latents: Tensor) -> Tensor:
        """Flat weights (C, D) of features (C, F) and a generator's latents (C, K)."""
        inside = own.kept * latents + own.refinement.within(features)
        flat: Tensor = self.mean + inside @ self.basis + own.refinement.beyond(features) @ own.steps
        if self.logarithms:
            flat = flat.clone()
            for place in self.logarithms:
                flat[:, place] = flat[:, place].exp()
        return flat


def _unit(autoencoder: SubspaceAutoencoder) -> Tensor:
    """What one standardised latent unit is in each value, (D,)."""
    layout = autoencoder.layout
    sizes = torch.tensor([layout.slices[name].stop - layout.slices[name].start for name in layout.names])
    return autoencoder.scales.float().repeat_interleave(sizes) * autoencoder.latent_scale


def _assembled(generator: WeightGenerator, best: _Map) -> WeightGenerator:
    """The generator with the new directions among those of its basis, which stays orthonormal."""
    autoencoder, frames = generator.autoencoder, generator.frames
    assert isinstance(autoencoder, SubspaceAutoencoder)
    basis = autoencoder.basis.float()
    K = len(basis)
    new = best.steps.detach() / _unit(autoencoder)  # (r, D)
    q, upper = torch.linalg.qr(torch.cat([basis, new]).T)  # (D, K + r), (K + r, K + r)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    q, upper = q * sign, upper * sign[:, None]
    refinement = Refinement(frames.num_features or K, K, len(new))
    refinement.load_state_dict(best.refinement.state_dict())
    with torch.no_grad():
        refinement.kept.copy_(best.kept)
        refinement.onto.copy_(upper.T[K:])
    return replace(
        generator,
        autoencoder=SubspaceAutoencoder(
            autoencoder.layout,
            autoencoder.mean,
            torch.cat([autoencoder.basis, q.T[K:].to(autoencoder.basis.dtype)]),
            autoencoder.scales,
            autoencoder.latent_scale,
        ),
        frames=replace(frames, refinement=refinement.requires_grad_(False).eval()),
    )


@contextmanager
def _weights_into(model: nn.Module, generator: WeightGenerator) -> Iterator[Callable[[Tensor], Model]]:
    """Yield what puts one flat vector (D,) into the model for a call; afterwards the model is as it was."""
    layout, inner = generator.layout, unwrap(model)
    layout.check_model(model, "the generator")
    raw, device = wrapped_names(model), next(iter(named_tensors(model).values())).device

    def model_with(flat: Tensor) -> Model:
        tensors = {raw[name]: tensor for name, tensor in layout.unflatten(flat.to(device)).items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(inner, tensors, args, kwargs)

        return call

    norms = [module for module in inner.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    with modes_kept(inner, gradients=True), _statistics_differentiable(norms):
        inner.eval()
        inner.requires_grad_(False)
        yield model_with


@contextmanager
def _statistics_differentiable(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """BatchNorms pass gradients on to their running statistics, which PyTorch's own kernel refuses."""
    for norm in norms:
        norm.forward = partial(_normalised, norm)  # type: ignore[method-assign]  # hides the class's own
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normalised(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What a BatchNorm in eval mode answers."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = -mean * scale if not norm.affine else norm.bias - mean * scale
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return x * scale.view(shape) + shift.view(shape)


class _Refining(Training):
    """The training of a map, which keeps the one that did best at held-out conditions."""

    counters: ClassVar[tuple[str, ...]] = ("step", "best_step", "best_loss", "history")

    def __init__(
        self,
        generator: WeightGenerator,
        cloud: _Cloud,
        losses: Losses,
        model_with: Callable[[Tensor], Model],
        config: RefineConfig,
        runtime: Runtime,
    ) -> None:
        self.cloud, self.losses, self.model_with, self.settings = cloud, losses, model_with, config
        autoencoder = generator.autoencoder
        assert isinstance(autoencoder, SubspaceAutoencoder)
        self.decoder = _Decoder(autoencoder)
        K, D = autoencoder.basis.shape
        if config.num_directions > D - K:
            raise ConfigError("num_directions", config.num_directions, f"must be at most {D - K}: all that are left")
        sizes = (cloud.features.shape[1], K, D, config.num_directions)
        self.map, self.best = (seeded(lambda: _Map(*sizes), config.seed) for _ in range(2))
        modules: dict[str, nn.Module] = {"map": self.map, "best": self.best}
        schedule = Schedule(config.num_steps, config.lr)
        super().__init__(STAGE, modules, schedule, generator.config, runtime, config.seed)
        self.trained = (~cloud.heldout).nonzero().squeeze(1)
        self.history: list[dict[str, float]] = []
        self.best_step, self.best_loss = 0, math.inf
        self.restore()
        with runtime.restoring(STAGE):
            _check_history(self.history, self.best_step, self.best_loss)

    def run(self) -> None:
        """Train for all steps."""
        if not self.history:
            self.measure()
            self.runtime.report(STAGE, 0, self.settings.num_steps, heldout_loss=self.history[0]["heldout_loss"])
        with self.checkpointed() as steps:
            while self.step < self.settings.num_steps:
                with steps.step():
                    value = self.advance(self.batch_loss)
                    if self.step % _EVAL_EVERY == 0 or self.step == self.settings.num_steps:
                        self.measure()
                last = self.history[-1]
                measured = {"heldout_loss": last["heldout_loss"]} if last["step"] == self.step else {}
                self.report(value, every=10, **measured)

    def batch_loss(self) -> Tensor:
        """Mean loss over a few conditions, one batch at each of them; each rank has its part of the sum."""
        C = self.settings.conditions_per_step
        places = self.trained[torch.randint(len(self.trained), (C,), generator=self.rng)]
        members = torch.randint(self.cloud.latents.shape[1], (C,), generator=self.rng)
        own = range(C)[self.runtime.share(C)]
        flat = self.decoder(self.map, self.cloud.features[places[own]], self.cloud.latents[places[own], members[own]])
        losses = []
        for number, one in zip(own, flat, strict=True):
            with _own_random_state(self.settings.seed, C * (1 + self.step) + number):
                losses.append(self._loss(self.losses.train, one, int(places[number])))
        return torch.stack(losses).sum() / C

    def add_up(self, value: Tensor) -> Tensor:
        return self.runtime.sum_gradients(self.parameters, value)

    @torch.no_grad()
    def measure(self) -> None:
        """Loss at the held-out conditions, on batches that are the same each time."""
        places = self.cloud.heldout.nonzero().squeeze(1)
        flat = self.decoder(self.map, self.cloud.features[places], self.cloud.latents[places, 0])
        losses = torch.zeros(len(places), dtype=torch.float64)
        for number in range(len(places))[self.runtime.share(len(places))]:
            # From the far end, where no step comes.
            with _own_random_state(self.settings.seed, -1 - number):
                for _ in range(_NUM_BATCHES):
                    found = self._loss(self.losses.measure, flat[number], int(places[number]))
                    losses[number] += float(found) / _NUM_BATCHES
        mean = float(self.runtime.all_reduce(losses).mean())
        if not self.history or mean < self.best_loss:
            self.best_step, self.best_loss = self.step, mean
            self.best.load_state_dict(self.map.state_dict())
        self.history.append({"step": self.step, "heldout_loss": mean})

    def _loss(self, loss: Loss, flat: Tensor, place: int) -> Tensor:
        found = loss(self.model_with(flat), dict(self.cloud.conditions[place]))
        if not isinstance(found, Tensor) or found.ndim:
            raise ConfigError("loss", type(found).__name__, "must return a tensor that is one number")
        return found


def _check_history(history: object, best_step: object, best_loss: object) -> None:
    """Raise :class:`ValueError` for what no checkpoint of ours holds."""
    is_sound = isinstance(history, list) and all(
        isinstance(one, dict) and is_number(one.get("step")) and is_number(one.get("heldout_loss")) for one in history
    )
    if not (is_sound and is_number(best_step) and is_number(best_loss)):
        raise ValueError("a history that is none")


@contextmanager
def _own_random_state(seed: int, number: int) -> Iterator[None]:
    """Draws inside are the same in every run; those outside go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed((seed << 32) + number % (1 << 32))
        yield
