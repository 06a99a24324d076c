"""The fitted model that makes weights, and the one file that holds it.

    generator.safetensors    tensors ``autoencoder.*``, ``frames.*``, ``denoiser.*`` and, if distilled, ``one_step.*``,
                             if aligned, ``alignment.*``; the header holds, as JSON text, ``config``, ``layout``,
                             ``trajectories``, ``report`` (what the fit measured) and ``provenance``

Shapes: M members, K latent width, k width of a trajectory's own coordinates, D values in a flat vector, ``*shape`` one
tensor's own shape.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.config import ConvConfig, FitConfig, Sampler, check_sampler
from pdiff_plugin.errors import ConfigError, GeneratorNotFoundError
from pdiff_plugin.generator.alignment import Alignment
from pdiff_plugin.generator.autoencoder import Autoencoder
from pdiff_plugin.generator.conv import ConvAutoencoder, ConvDenoiser
from pdiff_plugin.generator.denoiser import Denoiser, GaussianPreconditioned, OneStepMap
from pdiff_plugin.generator.frames import Frames
from pdiff_plugin.generator.samplers import (
    OnStep,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_flow,
    sample_turning,
)
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import DTYPES, Layout
from pdiff_plugin.snapshots.tensor_files import load_tensors, save_tensors

FORMAT = "pdiff-generator"
FORMAT_VERSION = 1
FILE_NAME = "generator.safetensors"
# In their own coordinates preconditioned flows converge ten times as fast as by Euler's rule.
_DEFAULT_STEPS: dict[str, int] = {"ddpm": 50, "ddim": 50, "dpm-solver++": 20, "flow": 50, "turning": 16, "one-step": 1}
# Members asked of the denoiser at once: enough to fill the cores, and latents of any number of members fit in memory.
_MEMBER_BATCH = 1024


@dataclass
class WeightGenerator:
    """Samples new weights for the tensors of a layout.

    Attributes:
        layout: the tensors it makes.
        config: the settings it was fitted with.
        autoencoder: latents <-> flat vectors.
        frames: each trajectory's own coordinates, in which the denoiser works.
        denoiser: the averaged network that the samplers ask.
        one_step: map from noise to clean coordinates, or None.
        trajectories: ids of the runs it was fitted on, in the order of its condition.
        report: what the fit measured, plain numbers by name.
        provenance: store, counts and versions.
        alignment: orders of hidden units in which its trajectories were read, or None. Members have them in the order
            of the first trajectory.
    """

    layout: Layout
    config: FitConfig
    autoencoder: Autoencoder
    frames: Frames
    denoiser: nn.Module
    trajectories: list[str]
    report: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    one_step: nn.Module | None = None
    alignment: Alignment | None = None

    def __repr__(self) -> str:
        return (
            f"WeightGenerator({len(self.layout.tensors)} tensors, {self.layout.num_values} values, "
            f"latent_dim={self.autoencoder.latent_dim}, trajectories={self.trajectories})"
        )

    def sample(
        self,
        num_members: int,
        *,
        num_sampling_steps: int | None = None,
        temperature: float = 1.0,
        diversity: float = 1.0,
        rng: torch.Generator | None = None,
        sampler: Sampler | None = None,
        trajectory: str | None = None,
    ) -> WeightSet:
        """Draw the weights of ``num_members`` new members.

        Args:
            num_members: M.
            num_sampling_steps: steps from noise to latents; the sampler's usual number unless given.
            temperature: factor on the noise that sampling starts from. Below 1 members move toward the centre of the
                snapshots (higher mean accuracy, less diversity).
            diversity: spread of the members over that of the snapshots, in (0, 2]; it sets the temperature by what the
                fit measured, on top of ``temperature``. The fit measures its natural sampler (see ``sampler``); with
                another one ``diversity`` is a temperature itself.
            rng: source of all randomness; freshly seeded unless given. Global generators are not touched.
            sampler: by default the one the generator was configured with, else the natural one: ``flow`` where the
                denoiser predicts a flow, ``dpm-solver++`` where it predicts noise or v. The latter serves flows too,
                ``ddim`` and ``ddpm`` do not; ``one-step`` needs a generator fitted with ``distill_steps``.
            trajectory: make members of this run only; all runs in equal numbers unless given.

        Returns:
            Name -> (M, *shape), in the dtypes that were recorded.

        Raises:
            ConfigError: an option out of range, or a sampler that does not fit the prediction type.
        """
        latents = self.sample_latents(
            num_members,
            num_sampling_steps=num_sampling_steps,
            temperature=temperature,
            diversity=diversity,
            rng=rng,
            sampler=sampler,
            trajectory=trajectory,
        )
        return self.decode(latents)

    def decode(self, latents: Tensor) -> WeightSet:
        """The members that ``latents`` (M, K) stand for: name -> (M, *shape), in the dtypes that were recorded."""
        M = len(latents)
        tensors = {spec.name: torch.empty(M, *spec.shape, dtype=DTYPES[spec.dtype]) for spec in self.layout}
        # Block by block into place: a flat vector in between would be a second copy of all members.
        for name, columns, values in self.autoencoder.decode_blocks(latents):
            start = self.layout.slices[name].start
            tensors[name].view(M, -1)[:, columns.start - start : columns.stop - start] = values
        return WeightSet(tensors)

    def sample_members(
        self, num_members: int, *, member_chunk: int = 16, **options: Any
    ) -> Iterator[dict[str, Tensor]]:
        """As :meth:`sample`, but decode ``member_chunk`` members at a time and yield their state dicts in order."""
        latents = self.sample_latents(num_members, **options)
        for start in range(0, num_members, member_chunk):
            yield from self.decode(latents[start : start + member_chunk]).members()

    @torch.no_grad()
    def sample_latents(
        self,
        num_members: int,
        *,
        num_sampling_steps: int | None = None,
        temperature: float = 1.0,
        diversity: float = 1.0,
        rng: torch.Generator | None = None,
        sampler: Sampler | None = None,
        trajectory: str | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents (M, K) on the CPU; options as in :meth:`sample`."""
        _check_least("num_members", num_members, 1)
        _check_least("temperature", temperature, 0)
        if num_sampling_steps is not None:
            _check_least("num_sampling_steps", num_sampling_steps, 1)
        if not 0 < diversity <= 2:
            raise ConfigError("diversity", diversity, "must be above 0 and at most 2")
        config = self.config.diffusion
        if num_sampling_steps is None and sampler in (None, config.sampler):
            num_sampling_steps = config.num_sampling_steps
        sampler = sampler or config.sampler or natural_sampler(self.config)
        check_sampler(sampler, config.prediction_type)
        if sampler == "one-step" and self.one_step is None:
            raise ConfigError("sampler", sampler, "needs a generator that was fitted with distill_steps above 0")
        if rng is None:
            rng = torch.Generator()
            rng.seed()
        labels = self._labels(num_members, trajectory)
        temperature = temperature * self._temperature(diversity, sampler)
        # Drawn where the rng lives, so that one seed gives the same members on every device.
        noise = temperature * torch.randn(num_members, self.frames.width, generator=rng, device=rng.device)
        parts = []
        for start in range(0, num_members, _MEMBER_BATCH):
            own = labels[start : start + _MEMBER_BATCH]

            def report(local: Tensor, own: Tensor = own) -> None:
                if on_step is not None:
                    on_step(self.frames.to_latents(local.cpu(), own))

            x = noise[start : start + _MEMBER_BATCH].to(self._device)
            local = walk(
                self.one_step if sampler == "one-step" else self.denoiser,
                x,
                own.to(self._device),
                self.config,
                num_sampling_steps,
                sampler=sampler,
                temperature=temperature,
                rng=rng,
                on_step=report,
            )
            parts.append(self.frames.to_latents(local.cpu(), own))
        return torch.cat(parts)

    def _temperature(self, diversity: float, sampler: Sampler) -> float:
        """Temperature at which samples spread ``diversity`` times as wide as snapshots, from the fit's own curve."""
        if sampler not in (natural_sampler(self.config), "one-step"):
            return diversity  # not the one that was measured, nor made to imitate it
        measured = self.report.get("diversity_curve", [])
        curve: list[tuple[float, float]] = [(0.0, 0.0), *((p["spread_ratio"], p["temperature"]) for p in measured)]
        for (low, low_temperature), (high, high_temperature) in pairwise(curve):
            if low <= diversity <= high and high > low:
                return low_temperature + (high_temperature - low_temperature) * (diversity - low) / (high - low)
        # Beyond what was measured, and without a measurement, spread is taken to grow with temperature.
        spread, temperature = curve[-1] if curve[-1][0] > 0 else (1.0, 1.0)
        return diversity * temperature / spread

    @property
    def _device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> WeightGenerator:
        """Move the networks, where sampling spends its time; weights are decoded on the CPU."""
        self.denoiser.to(device)
        if self.one_step is not None:
            self.one_step.to(device)
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file and return its path; a folder gets ``generator.safetensors``."""
        path = Path(path)
        if path.suffix != ".safetensors":
            path.mkdir(parents=True, exist_ok=True)
            path = path / FILE_NAME
        tensors = {f"autoencoder.{k}": v for k, v in self.autoencoder.state_dict().items()}
        tensors |= {f"frames.{k}": v for k, v in self.frames.state_dict().items()}
        tensors |= {f"denoiser.{k}": v for k, v in self.denoiser.state_dict().items()}
        if self.one_step is not None:
            tensors |= {f"one_step.{k}": v for k, v in self.one_step.state_dict().items()}
        if self.alignment is not None:
            tensors |= self.alignment.state_dict()
        header = {
            "config": json.dumps(self.config.to_json()),
            "layout": json.dumps(self.layout.to_json()),
            "trajectories": json.dumps(self.trajectories),
            "report": json.dumps(self.report),
            "provenance": json.dumps(self.provenance),
        }
        save_tensors(path, tensors, FORMAT, FORMAT_VERSION, header)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightGenerator:
        """Read what :meth:`save` wrote, from the file or its folder. The basis stays on disk until it is used.

        Raises:
            GeneratorNotFoundError: nothing there.
            FormatError: not a generator file.
            FormatVersionError: written by a newer release.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.is_file():
            raise GeneratorNotFoundError(str(path.parent if path.name == FILE_NAME else path))
        tensors, header = load_tensors(path, FORMAT, FORMAT_VERSION)
        config = FitConfig.from_json(json.loads(header["config"]))
        layout = Layout.from_json(json.loads(header["layout"]))
        trajectories = json.loads(header["trajectories"])
        part = {
            prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            for prefix in ("autoencoder.", "frames.", "denoiser.", "one_step.")
        }
        autoencoder: Autoencoder
        if isinstance(config.autoencoder, ConvConfig):
            autoencoder = ConvAutoencoder.from_state(layout, config.autoencoder, part["autoencoder."])
        else:
            autoencoder = SubspaceAutoencoder.from_state(layout, part["autoencoder."])
        frames = Frames.from_state(part["frames."])
        denoiser = new_denoiser(config, frames)
        denoiser.load_state_dict(part["denoiser."])
        one_step = None
        if part["one_step."]:
            one_step = new_one_step(config, frames)
            one_step.load_state_dict(part["one_step."])
            one_step.eval()
        report, alignment = json.loads(header["report"]), None
        if config.align != "none":
            alignment = Alignment.from_state(layout, tensors, report.get("alignment", {}))
        return cls(
            layout,
            config,
            autoencoder,
            frames,
            denoiser.eval(),
            trajectories,
            report,
            json.loads(header["provenance"]),
            one_step,
            alignment,
        )

    def _labels(self, num_members: int, trajectory: str | None) -> Tensor:
        if trajectory is None:
            return torch.arange(num_members) % len(self.trajectories)
        if trajectory not in self.trajectories:
            raise ConfigError("trajectory", trajectory, f"must be one of {', '.join(self.trajectories)}")
        return torch.full((num_members,), self.trajectories.index(trajectory))


def natural_sampler(config: FitConfig) -> Sampler:
    """The sampler that fits what the denoiser predicts and is exact in few steps."""
    return "flow" if config.diffusion.prediction_type == "flow" else "dpm-solver++"


def usual_steps(config: FitConfig, sampler: Sampler) -> int:
    """Steps a sampler takes unless others are asked for."""
    if sampler == "flow":
        return _DEFAULT_STEPS["turning" if config.diffusion.precondition else "flow"]
    steps = _DEFAULT_STEPS[sampler]
    return steps if config.diffusion.prediction_type == "flow" else min(steps, config.diffusion.num_timesteps)


def walk(
    denoiser: Any,
    noise: Tensor,
    labels: Tensor,
    config: FitConfig,
    num_sampling_steps: int | None = None,
    *,
    sampler: Sampler | None = None,
    temperature: float = 1.0,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise to clean coordinates of the trajectories, by any sampler.

    Args:
        denoiser: made by :func:`new_denoiser` (by :func:`new_one_step` for ``one-step``), in eval mode.
        noise: standard normal times the temperature, (B, k).
        labels: trajectory of each, (B,).
        config: of the fit.
        num_sampling_steps: S; the sampler's usual number unless given.
        sampler: the natural one unless given; must fit the prediction type.
        temperature: factor on the noise that ``ddpm`` adds.
        rng: source of that noise.
        on_step: told the estimate of the clean coordinates after each step.

    Returns:
        (B, k).
    """
    settings = config.diffusion
    sampler = sampler or natural_sampler(config)
    num_sampling_steps = num_sampling_steps or usual_steps(config, sampler)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = denoiser(x, time, labels)
        return out

    def turn(y: Tensor, time: Tensor) -> Tensor:
        out: Tensor = denoiser.turn(y, time, labels)
        return out

    if sampler == "one-step":
        clean: Tensor = denoiser(noise, labels)
        return clean
    if sampler == "ddpm":
        rng = rng or torch.Generator().manual_seed(config.seed)
        return sample_ddpm(predict, noise, settings, num_sampling_steps, rng, temperature=temperature, on_step=on_step)
    if sampler == "ddim":
        return sample_ddim(predict, noise, settings, num_sampling_steps, on_step=on_step)
    if sampler == "dpm-solver++":
        return sample_dpm_solver(predict, noise, settings, num_sampling_steps, on_step=on_step)
    if settings.precondition:
        return sample_turning(turn, noise, denoiser.std_of(labels), num_sampling_steps, on_step=on_step)
    return sample_flow(predict, noise, num_sampling_steps, on_step=on_step)


def new_denoiser(config: FitConfig, frames: Frames) -> nn.Module:
    """An untrained denoiser of the configured size: (x (B, k), time (B,), trajectory (B,)) -> (B, k)."""
    settings = config.diffusion
    if settings.network == "conv":
        return ConvDenoiser(frames.width, settings.conv_channels, settings.conv_kernel_size, frames.num_trajectories)
    network = Denoiser(frames.width, settings.width, settings.num_blocks, frames.num_trajectories)
    return GaussianPreconditioned(network, frames.std, settings) if settings.precondition else network


def new_one_step(config: FitConfig, frames: Frames) -> OneStepMap:
    """An untrained map from noise to local coordinates, of the denoiser's size."""
    settings = config.diffusion
    network = Denoiser(frames.width, settings.width, settings.num_blocks, frames.num_trajectories)
    return OneStepMap(network, frames.std)


def _check_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(name, value, f"must be at least {least}")
