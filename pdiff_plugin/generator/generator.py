"""The fitted model that makes weights.

Shapes: M members, K latent width, k width of a trajectory's own coordinates, D values in a flat vector, ``*shape`` one
tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pdiff_plugin.config import SamplingConfig, check_sampler, configured
from pdiff_plugin.errors import ConfigError
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.generator_file import GeneratorParts
from pdiff_plugin.generator.samplers import NATURAL_SAMPLER, OnStep, run_sampler, sampler_for
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.snapshots.layout import DTYPES

# Members asked of the denoiser at once: enough to fill the cores, and latents of any number of members fit in memory.
_MEMBER_BATCH = 1024


class WeightGenerator(GeneratorParts):
    """Samples new weights for the tensors of a layout; see :class:`GeneratorParts` for its parts and its file."""

    def __repr__(self) -> str:
        return (
            f"WeightGenerator({len(self.layout.tensors)} tensors, {self.layout.num_values} values, "
            f"latent_dim={self.autoencoder.latent_dim}, trajectories={self.trajectories})"
        )

    def sample(
        self,
        num_members: int,
        config: SamplingConfig | None = None,
        *,
        rng: torch.Generator | None = None,
        **changes: Any,
    ) -> WeightSet:
        """Draw the weights of ``num_members`` new members.

        Args:
            num_members: M.
            config: how they are drawn; the defaults of :class:`SamplingConfig` unless given.
            rng: source of all randomness; freshly seeded unless given. Global generators are not touched.
            **changes: single fields of ``config``, as in ``sample(16, temperature=0.5, sampler="heun")``.

        Returns:
            Name -> (M, *shape), in the dtypes that were recorded.

        Raises:
            ConfigError: an option out of range, or a sampler that does not fit the prediction type.
        """
        return self.decode(self.sample_latents(num_members, config, rng=rng, **changes))

    def sample_members(
        self,
        num_members: int,
        config: SamplingConfig | None = None,
        *,
        member_chunk: int = 16,
        rng: torch.Generator | None = None,
        **changes: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """As :meth:`sample`, but decode ``member_chunk`` members at a time and yield their state dicts in order."""
        latents = self.sample_latents(num_members, config, rng=rng, **changes)
        for start in range(0, num_members, member_chunk):
            yield from self.decode(latents[start : start + member_chunk]).members()

    @torch.no_grad()
    def sample_latents(
        self,
        num_members: int,
        config: SamplingConfig | None = None,
        *,
        rng: torch.Generator | None = None,
        on_step: OnStep | None = None,
        **changes: Any,
    ) -> Tensor:
        """As :meth:`sample`, but latents (M, K), on the CPU; ``on_step`` is told their estimate after each step."""
        if num_members < 1:
            raise ConfigError("num_members", num_members, "must be at least 1")
        sampling = self._resolved(configured(SamplingConfig, config, changes))
        process = self.config.diffusion
        network = self.denoiser
        if sampler_for(process, sampling.sampler).needs == "one-step map":
            if self.one_step is None:
                expected = "needs a generator that was fitted with distill_steps above 0"
                raise ConfigError("sampler", sampling.sampler, expected)
            network = self.one_step
        if rng is None:
            rng = torch.Generator()
            rng.seed()
        condition, device = self._condition(num_members, sampling.trajectory), next(network.parameters()).device
        # Drawn where the rng lives, so that one seed gives the same members on every device.
        shape = (num_members, self.frames.width)
        noise = sampling.temperature * torch.randn(shape, generator=rng, device=rng.device, dtype=torch.float32)
        parts = []
        for start in range(0, num_members, _MEMBER_BATCH):
            mine = slice(start, start + _MEMBER_BATCH)

            def tell(local: Tensor, own: Condition = condition[mine]) -> None:
                if on_step is not None:
                    on_step(self.frames.to_latents(local.cpu(), own))

            own = condition[mine].to(device)
            local = run_sampler(network, noise[mine].to(device), own, process, sampling, rng=rng, on_step=tell)
            parts.append(self.frames.to_latents(local.cpu(), condition[mine]))
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> WeightSet:
        """The members that ``latents`` (M, K) stand for: name -> (M, *shape), in the dtypes that were recorded."""
        M = len(latents)
        tensors = {spec.name: torch.empty(M, *spec.shape, dtype=DTYPES[spec.dtype]) for spec in self.layout}
        # Block by block into place: a flat vector in between would be a second copy of all members.
        for name, columns, values in self.autoencoder.decode_blocks(latents):
            start = self.layout.slices[name].start
            tensors[name].view(M, -1)[:, columns.start - start : columns.stop - start] = values
        return WeightSet(tensors)

    def to(self, device: torch.device | str) -> WeightGenerator:
        """Move the networks, where sampling spends its time; weights are decoded on the CPU."""
        self.denoiser.to(device)
        if self.one_step is not None:
            self.one_step.to(device)
        return self

    def _resolved(self, sampling: SamplingConfig) -> SamplingConfig:
        """Settings with a sampler named, the generator's own number of steps, and ``diversity`` in the temperature."""
        process = self.config.diffusion
        natural = NATURAL_SAMPLER[process.prediction_type]
        steps = sampling.num_sampling_steps
        if steps is None and sampling.sampler in (None, process.sampler):
            steps = process.num_sampling_steps
        sampler = sampling.sampler or process.sampler or natural
        check_sampler(sampler, process.prediction_type)
        spec = sampler_for(process, sampler)
        if sampling.eta > 0 and "eta" not in spec.takes:
            raise ConfigError("eta", sampling.eta, f"must be 0 with the sampler {sampler!r}; it is for 'ddim'")
        # The fit measures the natural sampler, which a one-step map imitates; of others a diversity is a temperature.
        is_measured = sampler == natural or spec.needs == "one-step map"
        factor = self._temperature_of(sampling.diversity) if is_measured else sampling.diversity
        return replace(
            sampling,
            sampler=sampler,
            num_sampling_steps=steps,
            temperature=sampling.temperature * factor,
            diversity=1.0,
        )

    def _temperature_of(self, diversity: float) -> float:
        """Temperature at which samples spread ``diversity`` times as wide as snapshots, from the fit's own curve."""
        measured = self.report.get("diversity_curve", [])
        curve: list[tuple[float, float]] = [(0.0, 0.0), *((p["spread_ratio"], p["temperature"]) for p in measured)]
        for (low, low_temperature), (high, high_temperature) in pairwise(curve):
            if low <= diversity <= high and high > low:
                return low_temperature + (high_temperature - low_temperature) * (diversity - low) / (high - low)
        # Beyond what was measured, and without a measurement, spread is taken to grow with temperature.
        spread, temperature = curve[-1] if curve[-1][0] > 0 else (1.0, 1.0)
        return diversity * temperature / spread

    def _condition(self, num_members: int, trajectory: str | None) -> Condition:
        """Of one run by name, or of all in turn."""
        if trajectory is None:
            return Condition(torch.arange(num_members) % len(self.trajectories))
        if trajectory not in self.trajectories:
            raise ConfigError("trajectory", trajectory, f"must be one of {', '.join(self.trajectories)}")
        return Condition(torch.full((num_members,), self.trajectories.index(trajectory)))
