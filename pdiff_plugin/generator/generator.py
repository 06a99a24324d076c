"""The fitted model that makes weights.

Shapes: M members, K latent width, k width of a trajectory's own coordinates, D values in a flat vector, ``*shape`` one
tensor's own shape.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pdiff_plugin.config import SamplingConfig, check_sampler, configured
from pdiff_plugin.errors import ConfigError, UnknownConditionError
from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.generator_file import FILE_NAME, GeneratorParts
from pdiff_plugin.generator.samplers import NATURAL_SAMPLER, OnStep, run_sampler, sampler_for
from pdiff_plugin.generator.weights import WeightSet
from pdiff_plugin.hub import About, HubMixin, Judged
from pdiff_plugin.modules.names import named_tensors
from pdiff_plugin.snapshots.conditions import Value, describe_condition, parse_condition
from pdiff_plugin.snapshots.files import json_safe
from pdiff_plugin.snapshots.layout import DTYPES

logger = logging.getLogger(__name__)

# Members asked of the denoiser at once: enough to fill the cores, and latents of any number of members fit in memory.
_MEMBER_BATCH = 1024


class WeightGenerator(HubMixin, GeneratorParts):
    """Samples new weights for the tensors of a layout; see :class:`GeneratorParts` for its parts and its file."""

    hub_file: ClassVar[str] = FILE_NAME

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
        condition: Mapping[str, Any] | None = None,
        rng: torch.Generator | None = None,
        **changes: Any,
    ) -> WeightSet:
        """Draw the weights of ``num_members`` new members.

        Args:
            num_members: M.
            config: how they are drawn; the defaults of :class:`SamplingConfig` unless given.
            condition: what they are made for, as in ``condition={"angle": 50}``; see :meth:`conditions_of_members`.
            rng: source of all randomness; freshly seeded unless given. Global generators are not touched.
            **changes: single fields of ``config``, as in ``sample(16, temperature=0.5, sampler="heun")``.

        Returns:
            Name -> (M, *shape), in the dtypes that were recorded.

        Raises:
            ConfigError: an option out of range, or a sampler that does not fit the prediction type.
            UnknownConditionError: a condition that could not have been recorded, or outside the recorded range.
        """
        return self.decode(self.sample_latents(num_members, config, condition=condition, rng=rng, **changes))

    def sample_members(
        self,
        num_members: int,
        config: SamplingConfig | None = None,
        *,
        member_chunk: int = 16,
        condition: Mapping[str, Any] | None = None,
        rng: torch.Generator | None = None,
        **changes: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """As :meth:`sample`, but decode ``member_chunk`` members at a time and yield their state dicts in order."""
        latents = self.sample_latents(num_members, config, condition=condition, rng=rng, **changes)
        for start in range(0, num_members, member_chunk):
            yield from self.decode(latents[start : start + member_chunk]).members()

    @torch.no_grad()
    def sample_latents(
        self,
        num_members: int,
        config: SamplingConfig | None = None,
        *,
        condition: Mapping[str, Any] | None = None,
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
        return self._drawn(network, self._asked(num_members, condition, sampling), sampling, rng, on_step)

    @torch.no_grad()
    def latents_of(self, asked: Condition, rng: torch.Generator) -> Tensor:
        """Latents of one member for each row of ``asked``, drawn by the generator's own sampler."""
        return self._drawn(self.denoiser, asked, self._resolved(SamplingConfig()), rng, None)

    def _drawn(
        self,
        network: nn.Module,
        asked: Condition,
        sampling: SamplingConfig,
        rng: torch.Generator,
        on_step: OnStep | None,
    ) -> Tensor:
        """Latents (M, K) of members for the rows of ``asked``, with resolved settings."""
        device = next(network.parameters()).device
        # Drawn where the rng lives, so that one seed gives the same members on every device.
        shape = (len(asked), self.frames.width)
        noise = sampling.temperature * torch.randn(shape, generator=rng, device=rng.device, dtype=torch.float32)
        parts = []
        for start in range(0, len(asked), _MEMBER_BATCH):
            mine = slice(start, start + _MEMBER_BATCH)

            def tell(local: Tensor, own: Condition = asked[mine]) -> None:
                if on_step is not None:
                    on_step(self.frames.to_latents(local.cpu(), own))

            own = asked[mine].to(device)
            local = run_sampler(
                network, noise[mine].to(device), own, self.config.diffusion, sampling, rng=rng, on_step=tell
            )
            parts.append(self.frames.to_latents(local.cpu(), asked[mine]))
        return torch.cat(parts)

    @torch.no_grad()
    def sample_into(
        self,
        model: nn.Module,
        config: SamplingConfig | None = None,
        *,
        condition: Mapping[str, Any] | None = None,
        rng: torch.Generator | None = None,
        **changes: Any,
    ) -> None:
        """Draw one member straight into ``model``, for good: as ``swap_(model, sample(1).member(0))``.

        One tensor of the member is in memory at a time.

        Args:
            model: as of :func:`~pdiff_plugin.swap_`.
            config: how it is drawn, and so are the others, as of :meth:`sample`.

        Raises:
            LayoutMismatchError: naming the first tensor that the model lacks or has in another shape; nothing is drawn.
            ConfigError, UnknownConditionError: as of :meth:`sample`.
        """
        self.layout.check_model(model)
        live = named_tensors(model)
        latents = self.sample_latents(1, config, condition=condition, rng=rng, **changes)
        values = torch.empty(0)
        for name, columns, block in self.autoencoder.decode_blocks(latents):
            place, tensor = self.layout.slices[name], live[name]
            if columns.start == place.start:
                values = torch.empty(tensor.shape, dtype=self.layout.dtypes[name])
            values.view(-1)[columns.start - place.start : columns.stop - place.start] = block[0]
            if columns.stop == place.stop:
                tensor.copy_(values)

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

    def conditions_of_members(
        self,
        num_members: int,
        condition: Mapping[str, Any] | None = None,
        *,
        trajectory: str | None = None,
        extrapolate: bool = False,
    ) -> list[dict[str, Value]]:
        """The whole condition that each member is made for, M of them; none without conditions.

        Args:
            num_members: M.
            condition: names and values. Names left out take those of the recorded conditions, in turn.
            trajectory: takes them from this run alone.
            extrapolate: allow values outside the recorded range; the log then warns of them.

        Raises:
            UnknownConditionError: an unknown name or category, a value of another type, or one outside the recorded
                range; it says what was recorded.
            ConfigError: a condition for a generator without, or a trajectory that was not fitted.
        """
        if trajectory is not None and trajectory not in self.trajectories:
            raise ConfigError("trajectory", trajectory, f"must be one of {', '.join(self.trajectories)}")
        if self.variables is None:
            if condition:
                raise ConfigError("condition", dict(condition), "needs a generator of runs with conditions")
            return []
        given = parse_condition(condition, "the condition") if condition else {}
        self.variables.check_names(given)
        recorded = self.conditions if trajectory is None else [self.conditions[self.trajectories.index(trajectory)]]
        found = [{**recorded[number % len(recorded)], **given} for number in range(num_members)]
        self.variables.check(found[0])
        if told := self.told_of(given):
            if not extrapolate:
                raise UnknownConditionError(
                    "the condition", told, "values within the recorded range; extrapolate allows others"
                )
            if told not in self.warned:
                self.warned.add(told)
                logger.warning("%s Nothing was learned there.", told)
        return found

    def told_of(self, condition: Mapping[str, Any]) -> str:
        """What is to be said of a condition outside the recorded range, with the nearest recorded one; else nothing."""
        if self.variables is None or not condition:
            return ""
        whole = {**self.conditions[0], **parse_condition(condition, "the condition")}
        outside = self.variables.outside(whole)
        if not outside:
            return ""
        near = describe_condition(self.variables.nearest(whole, self.conditions))
        return f"{'; '.join(outside)}. The nearest recorded condition is {near}."

    def _asked(self, num_members: int, condition: Mapping[str, Any] | None, sampling: SamplingConfig) -> Condition:
        """Of each member: by its features, or by the run, one by name or all in turn."""
        whole = self.conditions_of_members(
            num_members, condition, trajectory=sampling.trajectory, extrapolate=sampling.extrapolate
        )
        if self.variables is not None:
            return Condition.of(self.variables.encode(whole))
        if sampling.trajectory is None:
            return Condition(torch.arange(num_members) % len(self.trajectories))
        return Condition(torch.full((num_members,), self.trajectories.index(sampling.trajectory)))

    @classmethod
    def _load_shared(cls, path: Path, **options: Any) -> WeightGenerator:
        return cls.load(path, **options)

    def _save_for_others(self, path: Path) -> None:
        # The folders of somebody's disk are nobody else's business.
        store = PurePath(str(self.provenance.get("store", ""))).name
        replace(self, provenance={**self.provenance, "store": store}).save(path)

    def _about(self, source: str, evaluation: Judged | None) -> About:
        judged = evaluation.details.get("generator", {}) if evaluation is not None else {}
        # Held-out conditions are judged by a fit of the same settings without them, and the evaluation says so.
        is_refit = evaluation is not None and evaluation.details.get("refitted", False)
        if "report" in judged and not is_refit and not _are_same(judged["report"], self.report):
            raise ConfigError("evaluation", "of another fit", "must be of this generator; judge it anew")
        names = ", ".join(self.layout.names[:6]) + (", ..." if len(self.layout.names) > 6 else "")
        num_snapshots, num_runs = self.provenance.get("num_snapshots", "some"), len(self.trajectories)
        text = (
            "A generator of weights: Neural Network Diffusion (p-diff, [arXiv 2402.13144]"
            f"(https://arxiv.org/abs/2402.13144)) fitted to {num_snapshots} snapshots of {num_runs} training "
            f"{'run' if num_runs == 1 else 'runs'}. It makes {self.layout.num_values:,} values in "
            f"{len(self.layout.names)} tensors ({names}); the rest of the model is not in it, and has to be the one "
            "beside which they were trained."
        )
        condition = f", condition={self.conditions[0]!r}" if self.conditions else ""
        if condition:
            text += f" They are made for a condition: {', '.join(self.conditions[0])}."
        loading = (
            "from pdiff_plugin import WeightGenerator, ensemble_from_diffusion\n\n"
            f"generator = WeightGenerator.from_pretrained({source})\n"
            f"member = generator.sample(1{condition}).member(0)  # for model.load_state_dict(member, strict=False)\n"
            "# or many members as one module that works like the model:\n"
            f"ensemble = ensemble_from_diffusion(model.eval(), generator, num_members=16{condition})"
        )
        return About(text, loading)


def _are_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two reports say the same once they have been in a file."""
    return json.dumps(json_safe(one), sort_keys=True) == json.dumps(json_safe(other), sort_keys=True)
