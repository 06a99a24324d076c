"""Fits on conditions, on stores whose truth is known."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pdiff_plugin as pdiff
from pdiff_plugin.config import ConditionConfig, FitConfig
from pdiff_plugin.errors import ConditionError, ConfigError, UnknownConditionError, UnusableSnapshotsError
from pdiff_plugin.fitting.centre_stage import fit_centre, spread_choice
from pdiff_plugin.fitting.condition_measures import ceiling
from pdiff_plugin.fitting.condition_stage import Cloud
from pdiff_plugin.generator.centres import CENTRES
from pdiff_plugin.snapshots.conditions import Value, set_conditions
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

LAYOUT = Layout(
    (TensorSpec("head.weight", (6, 4), "float32", "parameter"), TensorSpec("head.bias", (6,), "float32", "parameter"))
)
D = 30


def sweep(
    folder: Path,
    conditions: list[dict[str, Value]],
    weights: Callable[[dict[str, Value]], Tensor],
    num_snapshots: int = 4,
    spread: float = 0.02,
) -> SnapshotStore:
    """A store with one run for each condition, whose snapshots lie about ``weights(condition)`` (D,)."""
    rng = torch.Generator().manual_seed(0)
    for number, condition in enumerate(conditions):
        writer = TrajectoryWriter(folder, LAYOUT, trajectory=f"run-{number:03d}")
        rows = weights(condition) + spread * torch.randn(num_snapshots, D, generator=rng)
        writer.write_chunk(rows, list(range(1, num_snapshots + 1)))
    set_conditions(folder, {f"run-{number:03d}": condition for number, condition in enumerate(conditions)})
    return SnapshotStore.open(folder)


ANGLES: list[dict[str, Value]] = [{"angle": 360.0 * number / 24} for number in range(24)]
DIRECTIONS = torch.randn(4, D, generator=torch.Generator().manual_seed(7))


def on_a_circle(condition: dict[str, Value]) -> Tensor:
    angle = math.radians(float(condition["angle"]))  # type: ignore[arg-type]
    parts = (math.cos(angle), math.sin(angle), math.cos(2 * angle), math.sin(2 * angle))
    return torch.ones(D) + sum(part * row for part, row in zip(parts, DIRECTIONS, strict=True))


def flat(weights: pdiff.WeightSet) -> Tensor:
    return torch.cat([weights[spec.name].flatten(1) for spec in LAYOUT], dim=1)


QUICK = pdiff.DiffusionConfig(max_steps=500, width=64)


def settings(*kinds: str, **changes: object) -> FitConfig:
    """A quick fit of these kinds of conditions."""
    return FitConfig(diffusion=QUICK, condition=ConditionConfig(kinds=kinds, **changes))  # type: ignore[arg-type]


CYCLIC = settings("angle:cyclic=360", hold_out=("angle=45,195",))


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> tuple[SnapshotStore, pdiff.WeightGenerator]:
    store = sweep(tmp_path_factory.mktemp("circle") / "store", ANGLES, on_a_circle)
    return store, pdiff.fit(store, CYCLIC)


@pytest.mark.parametrize("angle", [45.0, 195.0, 52.5])
def test_weights_at_an_angle_never_trained_lie_where_training_would_have_led(circle, angle: float) -> None:
    _, generator = circle
    truth = on_a_circle({"angle": angle})

    members = flat(generator.sample(16, condition={"angle": angle}, rng=torch.Generator().manual_seed(0)))

    between = (on_a_circle({"angle": 30.0}) - on_a_circle({"angle": 60.0})).norm()
    assert (members.mean(dim=0) - truth).norm() < 0.25 * between
    assert members.std(dim=0).max() > 0


def test_runs_held_out_by_value_are_never_read(circle) -> None:
    store, generator = circle
    assert len(store.trajectories) - len(generator.trajectories) == 2
    assert {condition["angle"] for condition in generator.conditions}.isdisjoint({45.0, 195.0})
    assert generator.provenance["num_trajectories"] == 22


def test_the_report_tells_centres_diffusions_and_ceiling(circle) -> None:
    report = circle[1].report["condition"]
    assert set(report["centre_errors"]) == {*CENTRES, "network"}
    assert report["centre_errors"]["mean"] == pytest.approx(1.0)
    assert report["centre"] in report["diffusion_errors"]
    assert report["heldout_error"] == min(report["diffusion_errors"].values()) < 0.2
    assert report["ceiling"] > 0.95  # four directions, and 21 others
    assert report["explained"] > 0.8 > report["explained_shuffled"]


def test_a_condition_comes_back_from_the_file_with_the_same_members(circle, tmp_path: Path) -> None:
    generator = circle[1]
    loaded = pdiff.WeightGenerator.load(generator.save(tmp_path / "fit"))

    one, other = (
        flat(g.sample(3, condition={"angle": 100}, rng=torch.Generator().manual_seed(1))) for g in (generator, loaded)
    )

    assert torch.equal(one, other)
    assert loaded.variables == generator.variables
    assert loaded.conditions == generator.conditions


@pytest.mark.parametrize("centre", [*CENTRES, "network"])
def test_every_centre_can_be_asked_for_and_is_read_back(circle, tmp_path: Path, centre: str) -> None:
    store, _ = circle
    generator = pdiff.fit(store, settings("angle:cyclic=360", centre=centre), out=tmp_path / "fit")

    assert generator.frames.centre.kind == centre
    members = flat(generator.sample(64, condition={"angle": 52.5}, rng=torch.Generator().manual_seed(0)))
    error = (members.mean(dim=0) - on_a_circle({"angle": 52.5})).norm()
    assert error < (on_a_circle({"angle": 52.5}) - torch.ones(D)).norm()


def test_names_left_out_take_the_recorded_values_in_turn(circle) -> None:
    generator = circle[1]
    assert generator.conditions_of_members(3) == generator.conditions[:3]
    assert generator.conditions_of_members(24)[22] == generator.conditions[0]
    one = generator.trajectories[5]
    assert generator.conditions_of_members(2, trajectory=one) == [generator.conditions[5]] * 2


@pytest.fixture(scope="module")
def styled(tmp_path_factory: pytest.TempPathFactory) -> pdiff.WeightGenerator:
    conditions: list[dict[str, Value]] = [
        {"rate": 10.0 ** (-number / 4), "style": "ink" if number % 2 else "oil"} for number in range(12)
    ]

    def weights(condition: dict[str, Value]) -> Tensor:
        rate = math.log10(float(condition["rate"]))  # type: ignore[arg-type]
        return rate * DIRECTIONS[0] + (condition["style"] == "ink") * DIRECTIONS[1]

    store = sweep(tmp_path_factory.mktemp("styled") / "store", conditions, weights)
    return pdiff.fit(store, settings("rate:log"))


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ({"rat": 0.1}, "found the unknown name 'rat' (did you mean 'rate'?), expected of rate, style"),
        ({"style": "inc"}, "found style = 'inc' (did you mean 'ink'?), expected one of ink, oil"),
        ({"rate": "fast"}, "found text under 'rate', expected a number"),
        ({"rate": -1.0}, "found rate = -1.0, expected a number above 0 (kind log)"),
        (
            {"rate": 10.0},
            "rate = 10 lies outside the recorded 0.00177828 to 1. The nearest recorded condition is rate=1 ",
        ),
    ],
)
def test_what_could_not_have_been_recorded_is_refused_with_what_was(
    styled: pdiff.WeightGenerator, condition: dict[str, Value], text: str
) -> None:
    with pytest.raises(UnknownConditionError) as caught:
        styled.sample(2, condition=condition)
    assert text in str(caught.value)
    assert "pdiff inspect FIT" in str(caught.value)


def test_outside_the_range_members_are_made_only_when_asked_for_and_with_a_warning(
    styled: pdiff.WeightGenerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors import safe_open

    from pdiff_plugin.generator.members import write_members

    with pytest.raises(UnknownConditionError):
        write_members(styled, tmp_path / "members", condition={"rate": 2.0}, num_members=2)
    assert not (tmp_path / "members").exists()

    with caplog.at_level(logging.WARNING, "pdiff_plugin"):
        paths = write_members(styled, tmp_path / "members", condition={"rate": 2.0}, num_members=2, extrapolate=True)

    assert "rate = 2 lies outside the recorded" in caplog.text
    with safe_open(paths[0], "pt") as file:
        header = file.metadata()
    assert header["condition"] == '{"rate": 2.0}'
    assert "The nearest recorded condition is rate=1 style=" in header["warning"]


def test_conditions_that_say_nothing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    anywhere = torch.randn(len(ANGLES), D, generator=torch.Generator().manual_seed(1))
    store = sweep(tmp_path / "store", ANGLES, lambda condition: 1 + anywhere[ANGLES.index(condition)])
    with caplog.at_level(logging.WARNING, "pdiff_plugin"):
        generator = pdiff.fit(store, settings("angle:cyclic=360"))
    assert "explain nothing of how the runs differ, or lie too far apart" in caplog.text
    assert generator.report["condition"]["explained"] < 0.2


def test_few_values_of_a_number_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few: list[dict[str, Value]] = [{"angle": float(number), "depth": float(number % 3)} for number in range(12)]
    store = sweep(tmp_path / "store", few, lambda c: 1 + float(c["angle"]) * DIRECTIONS[0])  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "pdiff_plugin"):
        pdiff.fit(store, settings())
    assert "depth was recorded at 3 different values only" in caplog.text
    assert "angle was recorded" not in caplog.text


def test_runs_of_different_starts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    starts = torch.randn(len(ANGLES), D, generator=torch.Generator().manual_seed(2))
    store = sweep(tmp_path / "store", ANGLES, lambda condition: starts[ANGLES.index(condition)])
    with caplog.at_level(logging.WARNING, "pdiff_plugin"):
        pdiff.fit(store, settings())
    assert "the runs seem to start from different weights" in caplog.text


def test_one_start_is_not_taken_for_several(circle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pdiff_plugin"):
        pdiff.fit(circle[0], CYCLIC)
    assert "different weights" not in caplog.text
    assert "explain nothing" not in caplog.text


def test_a_run_without_a_condition_among_others_is_named(tmp_path: Path) -> None:
    store = sweep(tmp_path / "store", ANGLES, on_a_circle, num_snapshots=12)
    (store.path / "trajectories" / "run-003" / "condition.json").unlink()
    with pytest.raises(ConditionError, match=r"found 1 of 24 runs without a condition, 'run-003' first"):
        pdiff.fit(store.path)
    generator = pdiff.fit(store.path, settings(use=False))
    assert generator.variables is None


def test_what_is_to_be_held_out_must_be_there(circle) -> None:
    for wanted, text in [
        ("run-9", "no run 'run-9'"),
        ("angle=46", "no run with angle=46"),
        ("angel=45", "no run with angel=45, expected names: angle"),
    ]:
        with pytest.raises(ConditionError, match=text):
            pdiff.fit(circle[0], settings(hold_out=(wanted,)))
    everything = tuple(circle[0].trajectories)
    with pytest.raises(UnusableSnapshotsError, match="0 snapshots"):
        pdiff.fit(circle[0], settings(hold_out=everything))


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        (("angle:round",), "must be one of number, log, cyclic, category, vector"),
        (("angel:log",), "must be one of angle"),
        (("angle:cyclic",), "must give the period, as in cyclic=360"),
        (("angle:log",), "needs numbers above 0, and 0 was recorded"),
    ],
)
def test_a_kind_that_cannot_be_is_refused(circle, kinds: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        pdiff.fit(circle[0], settings(*kinds))


def test_too_few_conditions_are_only_numbers(tmp_path: Path) -> None:
    few = ANGLES[:4]
    store = sweep(tmp_path / "store", few, on_a_circle, num_snapshots=20)
    assert pdiff.fit(store, settings()).variables is None


def test_a_generator_without_conditions_says_so(walk_store: Path) -> None:
    generator = pdiff.fit(walk_store, settings())
    with pytest.raises(ConfigError, match="needs a generator of runs with conditions"):
        generator.sample(2, condition={"angle": 1.0})


def test_the_one_step_map_follows_the_condition(circle) -> None:
    store, _ = circle
    config = FitConfig(
        condition=ConditionConfig(kinds=("angle:cyclic=360",), centre="mean"),
        diffusion=pdiff.DiffusionConfig(max_steps=500, width=64, distill_steps=500),
    )
    generator = pdiff.fit(store, config)
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    many = flat(generator.sample(64, condition={"angle": 52.5}, rng=noise[0]))
    one = flat(generator.sample(64, condition={"angle": 52.5}, sampler="one-step", rng=noise[1]))
    assert (one.mean(dim=0) - many.mean(dim=0)).norm() < 0.2 * (many.mean(dim=0) - torch.ones(D)).norm()


def test_an_interrupted_fit_goes_on_to_the_same_generator(circle, tmp_path: Path) -> None:
    store, _ = circle
    whole = pdiff.fit(store, CYCLIC, out=tmp_path / "whole")

    class StoppedError(Exception):
        pass

    for stage in ("diffusion-mean-2", "diffusion"):

        def stop(progress: pdiff.Progress, stage: str = stage) -> None:
            if progress.stage == stage and progress.step >= 50:
                raise StoppedError

        with pytest.raises(StoppedError):
            pdiff.fit(store, CYCLIC, out=tmp_path / "parts", on_progress=stop)
    parts = pdiff.fit(store, CYCLIC, out=tmp_path / "parts")

    for name, tensor in whole.denoiser.state_dict().items():
        assert torch.equal(tensor, parts.denoiser.state_dict()[name]), name


def test_runs_at_one_condition_are_held_out_together() -> None:
    latents, run = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6).repeat_interleave(2)
    features = torch.tensor([[0.0], [1.0], [1.0], [2.0], [3.0], [4.0]])
    cloud = Cloud.of(latents, run, features)

    assert cloud.features.squeeze(1).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert torch.allclose(cloud.means[1], latents[2:6].mean(dim=0), atol=1e-6)
    part = cloud.only(torch.tensor([False, True, False, True, False]))
    assert part.run.tolist() == [1, 1, 2, 2, 4, 4]
    assert part.place.tolist() == [0, 0, 0, 0, 1, 1]


def test_conditions_held_out_lie_inside_the_range() -> None:
    features = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    held = spread_choice(features, 0.2, seed=0)
    assert int(held.sum()) == 8
    for column in features.T:
        assert column[held].min() > column[~held].min()
        assert column[held].max() < column[~held].max()


def test_the_network_is_stopped_where_it_still_says_something_of_other_conditions() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(60, 2, generator=rng)
    truth = torch.randn(2, 5, generator=rng)
    means = features @ truth + 0.5 * torch.randn(60, 5, generator=rng)
    new = torch.randn(500, 2, generator=rng)
    error = (fit_centre("network", features, means)(new) - new @ truth).square().mean()
    assert error < 0.15 * (new @ truth).square().mean()


def test_the_ceiling_is_what_projecting_on_the_others_leaves() -> None:
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(6, 20, generator=rng, dtype=torch.float64)
    rows, place = points.repeat_interleave(2, dim=0), torch.arange(6).repeat_interleave(2)
    lost = total = 0.0
    for number in range(6):
        others = torch.cat([points[:number], points[number + 1 :]])
        own, spread = points[number] - others.mean(dim=0), others - others.mean(dim=0)
        left = own - spread.T @ torch.linalg.lstsq(spread.T, own).solution
        lost, total = lost + float(left.square().sum()), total + float(own.square().sum())

    assert ceiling(rows @ rows.T, place) == pytest.approx(1 - lost / total, abs=1e-6)
    flat = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    assert ceiling(flat @ flat.T, torch.arange(6)) == pytest.approx(1.0, abs=1e-6)
