"""The fitted model that makes weights, and the one file that holds it.

    generator.safetensors    tensors ``autoencoder.*`` and ``denoiser.*``; the header holds, as JSON text, ``config``,
                             ``layout``, ``trajectories``, ``report`` (what the fit measured) and ``provenance``

Shapes: M members, K latent width, D values in a flat vector, ``*shape`` one tensor's own shape.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdiff_plugin.config import FitConfig, Sampler
from pdiff_plugin.errors import ConfigError, FormatError, GeneratorNotFoundError
from pdiff_plugin.generator.autoencoder import SubspaceAutoencoder
from pdiff_plugin.generator.denoiser import Denoiser
from pdiff_plugin.generator.samplers import OnStep, sample_ddim, sample_ddpm, sample_flow
from pdiff_plugin.generator.streaming import save_tensors
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.files import check_format, replacing
from pdiff_plugin.snapshots.layout import Layout

FORMAT = "pdiff-generator"
FORMAT_VERSION = 1
FILE_NAME = "generator.safetensors"
_DEFAULT_STEPS = 50


@dataclass
class WeightGenerator:
    """Samples new weights for the tensors of a layout.

    Attributes:
        layout: the tensors it makes.
        config: the settings it was fitted with.
        autoencoder: latents <-> flat vectors.
        denoiser: the averaged network that the samplers ask.
        trajectories: ids of the runs it was fitted on, in the order of its condition.
        report: what the fit measured, plain numbers by name.
        provenance: store, counts and versions.
    """

    layout: Layout
    config: FitConfig
    autoencoder: SubspaceAutoencoder
    denoiser: Denoiser
    trajectories: list[str]
    report: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

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
        rng: torch.Generator | None = None,
        sampler: Sampler | None = None,
        trajectory: str | None = None,
    ) -> WeightSet:
        """Draw the weights of ``num_members`` new members.

        Args:
            num_members: M.
            num_sampling_steps: questions asked of the denoiser per member; 50 unless given.
            temperature: factor on the noise that sampling starts from. Below 1 members move toward the centre of the
                snapshots (higher mean accuracy, less diversity).
            rng: source of all randomness; freshly seeded unless given. Global generators are not touched.
            sampler: ``flow``, ``ddim`` or ``ddpm``; by default the one that fits what the denoiser predicts.
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
            rng=rng,
            sampler=sampler,
            trajectory=trajectory,
        )
        return WeightSet.from_flat(self.autoencoder.decode(latents), self.layout)

    def sample_members(
        self, num_members: int, *, member_chunk: int = 16, **options: Any
    ) -> Iterator[dict[str, Tensor]]:
        """As :meth:`sample`, but decode ``member_chunk`` members at a time and yield their state dicts in order."""
        latents = self.sample_latents(num_members, **options)
        for start in range(0, num_members, member_chunk):
            flat = self.autoencoder.decode(latents[start : start + member_chunk])
            yield from WeightSet.from_flat(flat, self.layout).members()

    @torch.no_grad()
    def sample_latents(
        self,
        num_members: int,
        *,
        num_sampling_steps: int | None = None,
        temperature: float = 1.0,
        rng: torch.Generator | None = None,
        sampler: Sampler | None = None,
        trajectory: str | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents (M, K) on the CPU; options as in :meth:`sample`."""
        if num_members < 1:
            raise ConfigError("num_members", num_members, "must be at least 1")
        if temperature < 0:
            raise ConfigError("temperature", temperature, "must be at least 0")
        config = self.config.diffusion
        natural: Sampler = "flow" if config.prediction_type == "flow" else "ddim"
        sampler = sampler or natural
        if (sampler == "flow") != (config.prediction_type == "flow"):
            fitting = "'flow'" if natural == "flow" else "'ddim' or 'ddpm'"
            raise ConfigError(
                "sampler", sampler, f"must be {fitting} for a denoiser that predicts {config.prediction_type}"
            )
        steps = _DEFAULT_STEPS if num_sampling_steps is None else num_sampling_steps
        if steps < 1:
            raise ConfigError("num_sampling_steps", steps, "must be at least 1")
        if rng is None:
            rng = torch.Generator()
            rng.seed()
        device = next(self.denoiser.parameters()).device
        labels = self._labels(num_members, trajectory).to(device)

        def predict(x: Tensor, time: Tensor) -> Tensor:
            out: Tensor = self.denoiser(x, time, labels)
            return out

        shape = (num_members, self.autoencoder.latent_dim)
        # Drawn where the rng lives, so that one seed gives the same members on every device.
        noise = temperature * torch.randn(shape, generator=rng, device=rng.device).to(device)
        if sampler == "flow":
            latents = sample_flow(predict, noise, steps, on_step=on_step)
        elif sampler == "ddim":
            latents = sample_ddim(predict, noise, config, steps, on_step=on_step)
        else:
            latents = sample_ddpm(predict, noise, config, steps, rng, temperature=temperature, on_step=on_step)
        return latents.cpu()

    def to(self, device: torch.device | str) -> WeightGenerator:
        """Move the denoiser, where sampling spends its time; weights are decoded on the CPU."""
        self.denoiser.to(device)
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file and return its path; a folder gets ``generator.safetensors``."""
        path = Path(path)
        if path.suffix != ".safetensors":
            path.mkdir(parents=True, exist_ok=True)
            path = path / FILE_NAME
        tensors = {f"autoencoder.{k}": v for k, v in self.autoencoder.state_dict().items()}
        tensors |= {f"denoiser.{k}": v for k, v in self.denoiser.state_dict().items()}
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "config": json.dumps(self.config.to_json()),
            "layout": json.dumps(self.layout.to_json()),
            "trajectories": json.dumps(self.trajectories),
            "report": json.dumps(self.report),
            "provenance": json.dumps(self.provenance),
        }
        with replacing(path) as temp:
            save_tensors(temp, tensors, header)
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
        try:
            with safe_open(path, framework="pt") as file:
                opened: Any = file
                header = opened.metadata() or {}
                check_format(str(path), header, FORMAT, FORMAT_VERSION)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise FormatError(str(path), f"an unreadable file ({error})", "a generator file") from error
        config = FitConfig.from_json(json.loads(header["config"]))
        layout = Layout.from_json(json.loads(header["layout"]))
        trajectories = json.loads(header["trajectories"])
        part = {
            prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            for prefix in ("autoencoder.", "denoiser.")
        }
        autoencoder = SubspaceAutoencoder.from_state(layout, part["autoencoder."])
        denoiser = new_denoiser(config, autoencoder.latent_dim, len(trajectories))
        denoiser.load_state_dict(part["denoiser."])
        return cls(
            layout,
            config,
            autoencoder,
            denoiser.eval(),
            trajectories,
            json.loads(header["report"]),
            json.loads(header["provenance"]),
        )

    def _labels(self, num_members: int, trajectory: str | None) -> Tensor:
        if trajectory is None:
            return torch.arange(num_members) % len(self.trajectories)
        if trajectory not in self.trajectories:
            raise ConfigError("trajectory", trajectory, f"must be one of {', '.join(self.trajectories)}")
        return torch.full((num_members,), self.trajectories.index(trajectory))


def new_denoiser(config: FitConfig, latent_dim: int, num_trajectories: int) -> Denoiser:
    """An untrained denoiser of the configured size."""
    return Denoiser(latent_dim, config.diffusion.width, config.diffusion.num_blocks, num_trajectories)
