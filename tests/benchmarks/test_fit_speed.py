"""How long a fit and its samples take: 300 snapshots of 2,048 parameters.

pytest tests/benchmarks/test_fit_speed.py --benchmark-enable
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pdiff_plugin import DiffusionConfig, FitConfig, Layout, SnapshotStore, WeightGenerator, fit
from pdiff_plugin.snapshots.layout import TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter


@pytest.fixture
def store(tmp_path, request) -> SnapshotStore:
    is_measured = request.config.getoption("benchmark_enable")
    num_snapshots, D = (300, 2048) if is_measured else (30, 64)
    rng = torch.Generator().manual_seed(0)
    place = torch.randn(num_snapshots, 20, generator=rng).cumsum(0)
    rows = 1.0 + 0.01 * place @ torch.randn(20, D, generator=rng)
    writer = TrajectoryWriter(tmp_path / "store", Layout((TensorSpec("w", (D,), "float32", "parameter"),)))
    writer.write_chunk(rows, list(range(1, num_snapshots + 1)))
    return SnapshotStore.open(tmp_path / "store")


@pytest.fixture
def config(request) -> FitConfig:
    is_measured = request.config.getoption("benchmark_enable")
    return FitConfig(
        diffusion=DiffusionConfig(distill_steps=1000)
        if is_measured
        else DiffusionConfig(max_steps=10, distill_steps=10)
    )


def test_fit(benchmark, store: SnapshotStore, config: FitConfig) -> None:
    generator = benchmark.pedantic(fit, (store, config), rounds=3)
    assert isinstance(generator, WeightGenerator)


@pytest.mark.parametrize("sampler", ["flow", "dpm-solver++", "one-step"])
def test_a_thousand_members(benchmark, store: SnapshotStore, config: FitConfig, sampler: str) -> None:
    generator = fit(store, config)
    weights = benchmark(generator.sample, 1000, sampler=sampler, rng=torch.Generator().manual_seed(0))
    assert weights.num_members == 1000


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ten_steps_of_each_published_network(benchmark, store: SnapshotStore, request, precision: str) -> None:
    paper = FitConfig.paper()
    autoencoder, diffusion = replace(paper.autoencoder, max_steps=10), replace(paper.diffusion, max_steps=10)
    if not request.config.getoption("benchmark_enable"):
        autoencoder = replace(autoencoder, channels=(4, 8), latent_dim=8)
        diffusion = replace(diffusion, conv_channels=(4, 8, 4), num_sampling_steps=10)
    config = replace(paper, autoencoder=autoencoder, diffusion=diffusion, precision=precision)
    generator = benchmark.pedantic(fit, (store, config), rounds=1)
    assert isinstance(generator, WeightGenerator)
