"""Coordinates of each trajectory."""

import pytest
import torch

from pdiff_plugin.generator.condition import Condition
from pdiff_plugin.generator.frames import Frames, fit_frames, plain_frames

R, K = 3, 8


@pytest.fixture
def clouds():
    """Latents (90, K) of three runs far apart, each moving in four directions of its own."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(90) // 30
    parts = []
    for run in range(R):
        directions = torch.linalg.qr(torch.randn(K, 4, generator=rng)).Q
        spread = torch.tensor([1.0, 0.5, 0.2, 0.1]) * (run + 1)
        parts.append(10 * torch.randn(K, generator=rng) + (torch.randn(30, 4, generator=rng) * spread) @ directions.T)
    return torch.cat(parts), labels


def test_latents_come_back_from_their_local_coordinates(clouds):
    latents, labels = clouds
    frames = fit_frames(latents, labels, R, 6)

    assert frames.width == 4
    torch.testing.assert_close(
        frames.to_latents(frames.to_local(latents, Condition(labels)), Condition(labels)), latents, rtol=0, atol=1e-4
    )


def test_local_coordinates_are_centred_uncorrelated_and_of_the_stated_spread(clouds):
    latents, labels = clouds
    frames = fit_frames(latents, labels, R, K)
    local = frames.to_local(latents, Condition(labels))

    for run in range(R):
        mine = local[labels == run]
        assert mine.mean(0).abs().max() < 1e-4
        covariance = mine.T @ mine / len(mine)
        torch.testing.assert_close(covariance, torch.diag(frames.std[run].square()), rtol=0, atol=1e-4)
    assert float(frames.std.square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_fewer_axes_keep_the_widest_directions(clouds):
    latents, labels = clouds
    narrow, wide = fit_frames(latents, labels, R, 2), fit_frames(latents, labels, R, 4)

    assert narrow.width == 2
    torch.testing.assert_close(narrow.axes, wide.axes[:, :, :2])


def test_a_run_of_fewer_snapshots_than_directions_is_no_trouble():
    latents = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(5, dtype=torch.int64)
    frames = fit_frames(latents, labels, 1, K)

    assert frames.width == 4
    torch.testing.assert_close(
        frames.to_latents(frames.to_local(latents, Condition(labels)), Condition(labels)), latents, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("scaled", [True, False])
def test_plain_frames_only_centre_and_scale(clouds, scaled):
    latents, labels = clouds
    frames = plain_frames(latents, R, scaled=scaled)
    local = frames.to_local(latents, Condition(labels))

    if scaled:
        assert float(local.square().mean()) == pytest.approx(1.0, rel=1e-4)
    else:
        assert torch.equal(local, latents)
    torch.testing.assert_close(frames.to_latents(local, Condition(labels)), latents, rtol=0, atol=1e-4)


def test_frames_come_back_from_their_tensors(clouds):
    frames = fit_frames(*clouds, R, 3)
    found = Frames.from_state(frames.state_dict())

    assert found.scale == pytest.approx(frames.scale)
    assert torch.equal(found.axes, frames.axes)


@pytest.mark.parametrize("plain", [True, False])
def test_latents_far_longer_than_there_are_snapshots_come_back_from_small_frames(plain):
    latents = torch.randn(12, 5000, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 2

    frames = plain_frames(latents, 2) if plain else fit_frames(latents, labels, 2, 5000)
    found = frames.to_latents(frames.to_local(latents, Condition(labels)), Condition(labels))

    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)
    assert sum(tensor.numel() for tensor in frames.state_dict().values()) < 20 * latents.numel()
