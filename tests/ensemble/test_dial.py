"""A model with a dial."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pdiff_plugin as pdiff
from pdiff_plugin.errors import ConfigError, LayoutMismatchError, TrainingModeError, UnknownConditionError
from pdiff_plugin.snapshots.conditions import set_conditions
from pdiff_plugin.snapshots.layout import Layout, TensorSpec
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> pdiff.WeightGenerator:
    """Of a layer whose bias turns with the angle."""
    folder = tmp_path_factory.mktemp("dial") / "store"
    layout = Layout((TensorSpec("bias", (3,), "float32", "parameter"),))
    conditions = {}
    for number in range(12):
        angle = 30.0 * number
        turned = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0.5])
        writer = TrajectoryWriter(folder, layout, trajectory=f"run-{number:03d}")
        noise = 0.02 * torch.randn(3, 3, generator=torch.Generator().manual_seed(number))
        writer.write_chunk(turned + noise, [1, 2, 3])
        conditions[writer.trajectory] = {"angle": angle}
    set_conditions(folder, conditions)
    condition = pdiff.ConditionConfig(kinds=("angle:cyclic=360",), centre="gp")
    return pdiff.fit(folder, pdiff.FitConfig(condition=condition, diffusion=pdiff.DiffusionConfig(max_steps=100)))


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(4, 3).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def test_an_answer_is_that_of_an_ensemble_made_for_the_condition(generator, model: nn.Module, x: Tensor) -> None:
    dial = pdiff.Dial(model, generator, num_members=5, seed=3)
    rng = torch.Generator().manual_seed(3)
    expected = pdiff.ensemble_from_diffusion(model, generator, num_members=5, condition={"angle": 50}, rng=rng)(x)

    assert torch.equal(dial(x, angle=50), expected)
    assert not torch.allclose(dial(x, angle=230), expected)


def test_members_are_made_once_and_the_oldest_condition_makes_way(generator, model: nn.Module, x: Tensor) -> None:
    dial = pdiff.Dial(model, generator, cache_size=2)
    first = dial.ensemble(angle=10)
    dial.ensemble(angle=20)
    assert dial.ensemble(angle=10) is first
    dial.ensemble(angle=30)  # of 10 and 20, 20 was asked for longest ago
    assert dial.ensemble(angle=10) is first

    again = pdiff.Dial(model, generator)
    assert torch.equal(again(x, angle=20), dial(x, angle=20))


def test_each_row_of_a_batch_can_have_its_own_condition(generator, model: nn.Module, x: Tensor) -> None:
    dial = pdiff.Dial(model, generator)
    angles = [50.0, 200.0, 50.0, 10.0, 200.0, 50.0]

    found = dial(x, conditions=[{"angle": angle} for angle in angles])

    for row, angle in enumerate(angles):
        torch.testing.assert_close(found[row], dial(x[row : row + 1], angle=angle)[0])


def test_other_keywords_go_to_the_model(generator) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor, *, shift: float) -> Tensor:
            return x + self.bias + torch.tensor([shift, 0.0, 0.0])

    dial, x = pdiff.Dial(Shifted().eval(), generator), torch.zeros(2, 3)
    assert (dial(x, angle=90, shift=3.0)[:, 0] > dial(x, angle=90, shift=0.0)[:, 0]).all()


def test_a_dial_follows_the_model_to_another_dtype(generator, model: nn.Module, x: Tensor) -> None:
    dial = pdiff.Dial(model, generator)
    dial(x, angle=50)
    assert dial.double()(x.double(), angle=50).dtype == torch.float64


@pytest.mark.parametrize(
    ("conditions", "more", "text"),
    [
        ([{"angle": 1.0}] * 5, {}, "must be one for each of the 6 inputs"),
        ([{"angle": 1.0}] * 6, {"angle": 2.0}, "must be given without angle"),
    ],
)
def test_conditions_that_do_not_fit_the_batch_are_refused(
    generator, model: nn.Module, x: Tensor, conditions: list[dict[str, float]], more: dict[str, float], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        pdiff.Dial(model, generator)(x, conditions=conditions, **more)


def test_what_cannot_be_a_dial_is_told(generator, model: nn.Module, walk_store: Path) -> None:
    with pytest.raises(ConfigError, match="must be fitted on runs with conditions"):
        pdiff.Dial(model, pdiff.fit(walk_store))
    with pytest.raises(ConfigError, match="cache_size = 0: it must be at least 1"):
        pdiff.Dial(model, generator, cache_size=0)
    with pytest.raises(LayoutMismatchError):
        pdiff.Dial(nn.Linear(4, 2).eval(), generator)
    with pytest.raises(TrainingModeError):
        pdiff.Dial(model.train(), generator)


def test_a_condition_outside_what_was_recorded_is_refused(generator, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(UnknownConditionError, match="'angel'"):
        pdiff.Dial(model, generator).ensemble(angel=1.0)
