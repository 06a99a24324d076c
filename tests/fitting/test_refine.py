"""Refining a generator by a loss, where the weights that do best are known."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

import pdiff_plugin as pdiff
from pdiff_plugin.config import ConditionConfig, FitConfig, RefineConfig
from pdiff_plugin.errors import ConditionError, ConfigError, FitExistsError, LayoutMismatchError
from pdiff_plugin.fitting.ranks import refine_on_ranks
from pdiff_plugin.fitting.refine import refine
from pdiff_plugin.snapshots.conditions import set_conditions
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

LAYOUT = Layout(
    (
        TensorSpec("head.weight", (6, 4), "float32", "parameter"),
        TensorSpec("head.bias", (6,), "float32", "parameter"),
        TensorSpec("norm.running_var", (6,), "float32", "buffer"),
    )
)
AXES = torch.randn(3, 36, generator=torch.Generator().manual_seed(3))
ANGLES = [{"angle": float(angle)} for angle in range(5, 360, 10)]
UNSEEN = [{"angle": float(angle)} for angle in range(0, 360, 40)]
QUICK = RefineConfig(num_steps=200, num_directions=4, lr=3e-3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.head(x))
        return out


def values(angle: float, along_third: float) -> Tensor:
    """Flat weights on a circle in the plane of two axes, and some way along a third; variances are positive."""
    turn = math.radians(angle)
    flat = 1.0 + math.cos(turn) * AXES[0] + math.sin(turn) * AXES[1] + along_third * AXES[2]
    return torch.cat([flat[:30], (0.1 * flat[30:]).exp()])


def loss(model, condition) -> Tensor:
    """How far answers are from those of weights that no run had, since none moved along the third axis."""
    x = torch.randn(32, 4)
    best = values(condition["angle"], 0.5)
    return (model(x) - nn.functional.linear(x, best[:24].view(6, 4), best[24:30]) / best[30:].sqrt()).square().mean()


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> pdiff.WeightGenerator:
    """Fitted on eight angles."""
    folder, rng = tmp_path_factory.mktemp("circle") / "store", torch.Generator().manual_seed(0)
    for angle in range(0, 360, 45):
        rows = values(angle, 0.0) * (1 + 0.01 * torch.randn(4, 36, generator=rng))
        TrajectoryWriter(folder, LAYOUT, trajectory=f"at-{angle}").write_chunk(rows, [1, 2, 3, 4])
    set_conditions(folder, {f"at-{angle}": {"angle": float(angle)} for angle in range(0, 360, 45)})
    return pdiff.fit(
        folder,
        FitConfig(
            diffusion=pdiff.DiffusionConfig(max_steps=100, width=64),
            condition=ConditionConfig(kinds=("angle:cyclic=360",), centre="ridge", heldout_fraction=0.0),
        ),
    )


def members(generator: pdiff.WeightGenerator, angle: float) -> pdiff.WeightSet:
    return generator.sample(4, condition={"angle": angle}, rng=torch.Generator().manual_seed(1))


def mean_loss(generator: pdiff.WeightGenerator) -> float:
    """Of all members at angles that nothing was fitted or refined at."""
    model, found = Net().eval(), []
    with torch.random.fork_rng(), torch.no_grad():
        for condition in UNSEEN:
            for member in members(generator, condition["angle"]).members():
                with pdiff.swapped(model, member):
                    found.append(float(loss(model, condition)))
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def refined(circle: pdiff.WeightGenerator) -> pdiff.WeightGenerator:
    return refine(circle, Net(), loss, QUICK, conditions=ANGLES)


def test_members_do_better_at_angles_that_nothing_was_learned_at(circle, refined) -> None:
    assert mean_loss(refined) < 0.2 * mean_loss(circle)


def test_the_losses_on_the_way_are_logged(circle, recorder) -> None:
    found = refine(circle, Net(), loss, QUICK, conditions=ANGLES, num_steps=60, loggers=[recorder])
    report = found.report["refinement"]
    curve = {entry["step"]: entry["heldout_loss"] for entry in report["history"]}
    assert recorder.curves["refine/heldout_loss"] == curve
    assert list(curve) == [0, 50, 60]
    assert list(recorder.curves["refine/train_loss"]) == [10, 20, 30, 40, 50, 60]
    assert recorder.curves["report/refinement/heldout_loss"] == {0: report["heldout_loss"]}


def test_members_stay_different(circle, refined) -> None:
    before, after = (members(one, 70.0)["head.weight"].std(dim=0).mean() for one in (circle, refined))
    assert after > 0.3 * before


def test_the_report_tells_the_loss_at_held_out_conditions(refined) -> None:
    report = refined.report["refinement"]
    assert (report["num_conditions"], report["num_heldout"]) == (len(ANGLES), 4)
    assert report["heldout_loss"] < 0.1 * report["heldout_loss_before"]
    assert report["heldout_loss"] == min(entry["heldout_loss"] for entry in report["history"])


def test_new_directions_join_an_orthonormal_basis(circle, refined) -> None:
    basis = refined.autoencoder.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    assert len(basis) == len(circle.autoencoder.basis) + 4


def test_a_refined_generator_is_read_back_with_the_same_members(refined, tmp_path: Path) -> None:
    again = pdiff.WeightGenerator.load(refined.save(tmp_path))
    for name, tensor in members(refined, 70.0).items():
        torch.testing.assert_close(members(again, 70.0)[name], tensor, atol=0, rtol=0)


def test_where_nothing_can_be_gained_the_generator_stays_as_it_was(circle, caplog) -> None:
    def flat_loss(model, condition) -> Tensor:
        return 1.0 + 0.0 * model(torch.ones(1, 4)).sum()

    same = refine(circle, Net(), flat_loss, QUICK, conditions=ANGLES, num_steps=50)
    assert "made nothing better" in caplog.text
    assert torch.equal(members(same, 70.0)["head.weight"], members(circle, 70.0)["head.weight"])


def test_a_model_comes_back_as_it_was_given(circle) -> None:
    model = Net().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refine(circle, model, loss, QUICK, num_steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.norm.training
    assert model.norm(torch.ones(2, 6)).isfinite().all()
    assert "forward" not in vars(model.norm)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_an_interrupted_refinement_goes_on_to_the_same_generator(circle, refined, tmp_path: Path) -> None:
    num_calls = 0

    def interrupted(model, condition) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 900:
            raise KeyboardInterrupt
        return loss(model, condition)

    with pytest.raises(KeyboardInterrupt):
        refine(circle, Net(), interrupted, QUICK, conditions=ANGLES, out=tmp_path)
    assert not (tmp_path / "generator.safetensors").exists()
    again = refine(circle, Net(), loss, QUICK, conditions=ANGLES, out=tmp_path)
    assert torch.equal(members(again, 70.0)["head.weight"], members(refined, 70.0)["head.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["generator.safetensors"]


PROCESS = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from test_refine import ANGLES, QUICK, Net, loss
    from pdiff_plugin import WeightGenerator, refine
    from pdiff_plugin.fitting import training
    from pdiff_plugin.fitting.ranks import refine_on_ranks

    generator, out, rank, meeting = WeightGenerator.load(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
    training.CHECKPOINT_EVERY_S = 0.05
    if not meeting:
        print("ready", flush=True)
        refine(generator, Net(), loss, QUICK, conditions=ANGLES, out=out)
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        refine_on_ranks(generator, Net(), loss, QUICK, conditions=ANGLES, out=out)
        torch.distributed.destroy_process_group()
"""


def started(generator: Path, out: Path, rank: int = 0, meeting: str = "") -> subprocess.Popen[str]:
    """A refinement as a process of its own, alone or as one of two ranks that meet at a file."""
    arguments = [str(Path(__file__).parent), str(generator), str(out), str(rank), meeting]
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_ranks_refine_as_one_process_does(circle, refined, tmp_path: Path) -> None:
    circle.save(tmp_path / "fit")
    meeting = str(tmp_path / "meet")

    ranks = [started(tmp_path / "fit", tmp_path / "out", rank, meeting) for rank in (0, 1)]
    for rank in ranks:
        rank.communicate(timeout=120)
        assert rank.returncode == 0

    together = pdiff.WeightGenerator.load(tmp_path / "out")
    for name, weights in members(together, 70.0).items():
        torch.testing.assert_close(weights, members(refined, 70.0)[name], rtol=1e-3, atol=1e-4)
    ours, alone = (one.report["refinement"] for one in (together, refined))
    assert ours["best_step"] == alone["best_step"]
    assert ours["heldout_loss"] == pytest.approx(alone["heldout_loss"], rel=1e-3)


def test_a_group_of_one_rank_refines_exactly_as_one_process_does(circle, refined, tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        same = refine_on_ranks(circle, Net(), loss, QUICK, conditions=ANGLES)
    finally:
        distributed.destroy_process_group()
    assert torch.equal(members(same, 70.0)["head.weight"], members(refined, 70.0)["head.weight"])


@pytest.mark.slow
def test_a_refinement_that_is_killed_again_and_again_is_bit_identical(circle, tmp_path: Path) -> None:
    circle.save(tmp_path / "fit")
    alone = started(tmp_path / "fit", tmp_path / "alone")
    alone.communicate()
    wanted = pdiff.WeightGenerator.load(tmp_path / "alone")

    moment, num_killed, attempt = random.Random(), 0, 0
    while num_killed < 20:
        attempt += 1
        out = tmp_path / str(attempt)
        while not (out / "generator.safetensors").exists():
            process = started(tmp_path / "fit", out)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moment.uniform(0.0, 4.0))  # of which PyTorch takes a second for its optimizers
            num_killed += process.poll() is None
            process.kill()
            process.communicate()
        found = pdiff.WeightGenerator.load(out)
        for name, weights in members(found, 70.0).items():
            assert torch.equal(weights, members(wanted, 70.0)[name])
        # Of a process killed after the generator was written its checkpoint may remain.
        refine(circle, Net(), loss, QUICK, conditions=ANGLES, out=out)
    print(f"{num_killed} x SIGKILL in {attempt} refinements")


def test_a_finished_one_is_returned_at_once_and_never_replaced_by_another(circle, tmp_path: Path) -> None:
    def unwanted(model, condition) -> Tensor:
        raise AssertionError("it had finished")

    refine(circle, Net(), loss, QUICK, num_steps=1, out=tmp_path)
    assert refine(circle, Net(), unwanted, QUICK, num_steps=1, out=tmp_path).report["refinement"]["num_conditions"] == 8
    with pytest.raises(FitExistsError, match="these settings"):
        refine(circle, Net(), loss, QUICK, num_steps=2, out=tmp_path)


def test_what_cannot_be_refined_is_refused(circle, refined) -> None:
    with pytest.raises(ConfigError, match="refined before"):
        refine(refined, Net(), loss)
    with pytest.raises(ConfigError, match="at least 4"):
        refine(circle, Net(), loss, conditions=ANGLES[:3])
    with pytest.raises(ConditionError, match="angle"):
        refine(circle, Net(), loss, conditions=[{"tilt": 3.0}] * 4)
    with pytest.raises(LayoutMismatchError, match="head"):
        refine(circle, nn.Linear(4, 6), loss)
    with pytest.raises(ConfigError, match="at most 33"):
        refine(circle, Net(), loss, num_directions=34)
    with pytest.raises(ConfigError, match="one number"):
        refine(circle, Net(), lambda model, condition: model(torch.ones(2, 4)), QUICK)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> pdiff.WeightGenerator:
    """Fitted on two runs without conditions, at opposite sides of the circle."""
    folder, rng = tmp_path_factory.mktemp("runs") / "store", torch.Generator().manual_seed(0)
    for angle in (0, 180):
        rows = values(angle, 0.0) * (1 + 0.02 * torch.randn(20, 36, generator=rng))
        TrajectoryWriter(folder, LAYOUT, trajectory=f"at-{angle}").write_chunk(rows, list(range(1, 21)))
    return pdiff.fit(folder, FitConfig(diffusion=pdiff.DiffusionConfig(max_steps=100, width=64)))


def loss_of_its_run(model, condition) -> Tensor:
    """Each run wants a step along the third axis, which none took."""
    assert condition == {}
    return torch.stack([loss(model, {"angle": angle}) for angle in (0.0, 180.0)]).min()


def losses_of(generator: pdiff.WeightGenerator) -> Tensor:
    model, found = Net().eval(), []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for member in generator.sample(16, rng=torch.Generator().manual_seed(1)).members():
            with pdiff.swapped(model, member):
                found.append(loss_of_its_run(model, {}))
    return torch.stack(found)


def test_members_of_runs_without_conditions_do_better_each_in_its_own_run(two_runs, tmp_path: Path) -> None:
    better = refine(two_runs, Net(), loss_of_its_run, QUICK, out=tmp_path)
    assert losses_of(better).max() < 0.5 * losses_of(two_runs).min()
    weights = better.sample(16, rng=torch.Generator().manual_seed(1))["head.weight"]
    # Members take the runs in turn, and are as far apart as these, and different within each.
    assert (weights[0] - weights[1]).norm() > 0.5 * (values(0, 0)[:24] - values(180, 0)[:24]).norm()
    assert weights[::2].std(dim=0).mean() > 0.005
    assert pdiff.WeightGenerator.load(tmp_path).report["refinement"]["learned_at"] == "members"


def test_what_is_kept_did_best_by_another_measure_where_there_is_one(two_runs, caplog) -> None:
    def worse(model, condition) -> Tensor:
        return -loss_of_its_run(model, condition)

    same = refine(two_runs, Net(), loss_of_its_run, QUICK, measure=worse, num_steps=50)
    assert "made nothing better" in caplog.text
    assert torch.equal(losses_of(same), losses_of(two_runs))


def test_conditions_need_a_generator_that_knows_them(two_runs) -> None:
    with pytest.raises(ConfigError, match="need a generator of runs with conditions"):
        refine(two_runs, Net(), loss, conditions=ANGLES)


def test_few_conditions_to_learn_from_are_warned_of(
    circle: pdiff.WeightGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    refine(circle, Net(), loss, QUICK, conditions=ANGLES[:5], num_steps=1)
    assert "5 conditions are few to learn from" in caplog.text
    caplog.clear()
    refine(circle, Net(), loss, QUICK, conditions=ANGLES, num_steps=1)
    assert "few" not in caplog.text
