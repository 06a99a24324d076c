"""Judging over conditions, on tiny stores whose truth is known: weights of a linear classifier that follow a number."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdiff_plugin import SnapshotStore, WeightGenerator, WeightSet
from pdiff_plugin.cli import main
from pdiff_plugin.errors import ConditionError, ConfigError, EvaluationNotFoundError, FormatError, FormatVersionError
from pdiff_plugin.evaluation import condition_rows
from pdiff_plugin.evaluation.condition_result import ConditionEvaluation
from pdiff_plugin.evaluation.conditions import evaluate_conditions
from pdiff_plugin.evaluation.task import Task
from pdiff_plugin.fitting.centre_stage import fit_centre
from pdiff_plugin.generator.subspace import SubspaceAutoencoder
from pdiff_plugin.generator.variables import Variables
from pdiff_plugin.snapshots.conditions import set_conditions
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

NUM_INPUTS, NUM_CLASSES, NUM_VALUES = 40, 4, 164
NUM_CONDITIONS = 24
HELD_OUT = [f"run-{i:02d}" for i in range(1, NUM_CONDITIONS - 1, 3)]  # 8 of 24, the ends not among them
Truth = Callable[[float], Tensor]
RNG = torch.Generator().manual_seed(1)
DIRECTIONS = 1.2 * torch.randn(4, NUM_VALUES, generator=RNG)
BASE = 1.2 * torch.randn(NUM_VALUES, generator=RNG)


def linear(c: float) -> Tensor:
    """Weights that are a line in the condition."""
    return BASE + c * DIRECTIONS[0]


def wavy(c: float) -> Tensor:
    """Weights in a plane of few directions that no neighbour tells."""
    angle = 2 * math.pi * 11.3 * c
    return BASE + 1.5 * (math.cos(angle) * DIRECTIONS[0] + math.sin(angle) * DIRECTIONS[1])


def scattered(c: float) -> Tensor:
    """Weights that have nothing to do with one another."""
    rng = torch.Generator().manual_seed(round(1000 * c) + 17)
    return 1.2 * torch.randn(NUM_VALUES, generator=rng)


def constant(c: float) -> Tensor:
    """The same weights at all conditions."""
    del c
    return BASE


@pytest.fixture(autouse=True)
def quick_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression in place of the small network, whose training takes seconds; except where a test wants it."""
    if "network" not in request.node.name:
        kinds = {"network": "ridge"}
        quick = lambda kind, *args: fit_centre(kinds.get(kind, kind), *args)  # noqa: E731
        monkeypatch.setattr(condition_rows, "fit_centre", quick)


def value_of(number: int) -> float:
    return number / (NUM_CONDITIONS - 1)


def new_model() -> nn.Linear:
    model = nn.utils.skip_init(nn.Linear, NUM_INPUTS, NUM_CLASSES)  # without a draw from the global generator
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), BASE.split([160, 4]), strict=True):
            parameter.copy_(values.view_as(parameter))
    return model


def write_store(path: Path, truth: Truth, *, num_snapshots: int = 4, noise: float = 0.02) -> SnapshotStore:
    layout = Layout.from_tensors({name: tensor.detach() for name, tensor in new_model().named_parameters()})
    rng = torch.Generator().manual_seed(2)
    for number in range(NUM_CONDITIONS):
        rows = truth(value_of(number)) + noise * torch.randn(num_snapshots, NUM_VALUES, generator=rng)
        TrajectoryWriter(path, layout, trajectory=f"run-{number:02d}").write_chunk(rows, range(1, num_snapshots + 1))
    set_conditions(path, {f"run-{number:02d}": {"c": value_of(number)} for number in range(NUM_CONDITIONS)})
    return SnapshotStore.open(path)


def task_of(truth: Truth, num_items: int = 300) -> Callable[..., Task]:
    def task(c: float) -> Task:
        rng = torch.Generator().manual_seed(round(1000 * c))
        x = torch.randn(num_items, NUM_INPUTS, generator=rng)
        weight, bias = truth(c).split([160, 4])
        logits = x @ weight.view(NUM_CLASSES, NUM_INPUTS).T + bias
        y = torch.multinomial(logits.softmax(dim=1), 1, generator=rng).squeeze(1)
        return Task(new_model(), [(x, y)], name="lines")

    return task


@dataclass
class Oracle:
    """A generator by conditions that makes what it is told to, around weights that it knows."""

    store: SnapshotStore
    trajectories: list[str]
    expects: Truth
    spread: float = 0.02

    def __post_init__(self) -> None:
        part = self.store.only(self.trajectories)
        self.trajectories, self.layout = part.trajectories, part.layout
        self.conditions = list(part.conditions.values())
        self.variables = Variables.infer(self.conditions)
        self.alignment, self.report, self.provenance = None, {"fit": 1}, {"store": str(self.store.path)}
        rows = part.rows()
        mean = rows.mean(dim=0)
        _, _, directions = torch.linalg.svd(rows - mean, full_matrices=False)
        self.autoencoder = SubspaceAutoencoder(self.layout, mean, directions[:6].contiguous(), torch.ones(2), 1.0)

    def decode(self, latents: Tensor) -> WeightSet:
        return WeightSet.from_flat(self.autoencoder.decode(latents), self.layout)

    def sample(self, num_members: int, *, condition: dict[str, Any], extrapolate: bool, rng: Any) -> WeightSet:
        assert extrapolate or not self.variables.outside(condition)
        noise = self.spread * torch.randn(num_members, NUM_VALUES, generator=rng)
        return WeightSet.from_flat(self.expects(condition["c"]) + noise, self.layout)


def judged(
    folder: Path, truth: Truth, expects: Truth, *, held_out: list[str] = HELD_OUT, **options: Any
) -> ConditionEvaluation:
    store = write_store(folder / "store", truth)
    fitted = [run for run in store.trajectories if run not in held_out]
    options = {"num_members": 4, **options}
    return evaluate_conditions(task_of(truth), store, Oracle(store, fitted, expects), **options)  # type: ignore[arg-type]


def outcome_of(evaluation: ConditionEvaluation) -> str:
    return evaluation.verdicts["inside"].outcome


def test_means_of_every_row_and_the_sentence_are_logged(tmp_path: Path, recorder: Any) -> None:
    found = judged(tmp_path, linear, linear, loggers=[recorder])
    for name in ("generated", "trained", "nearest"):
        mean = sum(place.rows[name].loss for place in found.places) / len(found.places)
        assert recorder.curves[f"evaluate/inside/{name}/loss"] == {0: pytest.approx(mean)}
    recovery = found.verdicts["inside"].recovery["generated"]
    assert recorder.curves["verdict/inside/recovery/generated/loss"] == {0: recovery.loss}
    assert recorder.settings["verdict"] == {"sentence": found.sentence}


def test_on_a_line_interpolation_is_enough(tmp_path: Path) -> None:
    found = judged(tmp_path, linear, linear)
    assert outcome_of(found) == "interpolation is enough"
    assert "is at least as good (generated minus it, NLL" in found.sentence
    recovery = found.verdicts["inside"].recovery
    assert recovery["generated"].loss == pytest.approx(1, abs=0.05)
    assert recovery["best cheap"].loss == pytest.approx(1, abs=0.05)


def test_a_generator_that_alone_knows_the_truth_is_worth_it(tmp_path: Path) -> None:
    found = judged(tmp_path, wavy, wavy)
    assert outcome_of(found) == "worth it"
    assert found.sentence.startswith("Worth it: at 8 conditions that were never fitted, generated members are better")
    assert re.search("Training there (is not told apart|gives no more)", found.sentence)


def test_a_row_of_the_user_that_is_as_good_is_named(tmp_path: Path) -> None:
    layout = Layout.from_tensors({name: tensor.detach() for name, tensor in new_model().named_parameters()})
    found = judged(tmp_path, wavy, wavy, extra={"known by heart": lambda c: layout.unflatten(wavy(c["c"]))})
    assert outcome_of(found) == "another row is enough"
    assert "known by heart is at least as good" in found.sentence


def test_a_task_as_a_row_is_judged_with_its_own_model(tmp_path: Path) -> None:
    found = judged(tmp_path, wavy, wavy, extra={"as it is": lambda c: task_of(wavy)(**c)})
    for place in found.places:
        assert place.rows["as it is"].loss == place.rows["base"].loss


def test_where_neighbours_tell_nothing_one_should_train_there(tmp_path: Path) -> None:
    found = judged(tmp_path, wavy, constant, train_seconds=40)
    # Its members do not heed the condition at all, which is said first.
    assert outcome_of(found) == "conditions explain nothing"
    off = judged(
        tmp_path / "off", wavy, lambda c: BASE + 0.4 * (wavy(c) - BASE) + 2.2 * DIRECTIONS[2], train_seconds=40
    )
    assert outcome_of(off) == "train there"
    assert off.sentence.startswith("Train there: it costs about 40 s and gives more than generated members, NLL")


def test_weights_that_share_no_span_leave_nothing_to_gain(tmp_path: Path) -> None:
    found = judged(tmp_path, scattered, constant)
    assert outcome_of(found) == "nothing to gain"
    assert "the span of the runs holds no more than" in found.sentence
    assert "Training there gives more" in found.sentence


def test_a_condition_without_effect_leaves_nothing_to_gain(tmp_path: Path) -> None:
    found = judged(tmp_path, constant, constant)
    assert outcome_of(found) == "nothing to gain"
    assert "no better than the average of all conditions" in found.sentence


def test_members_that_do_not_heed_the_condition_are_told(tmp_path: Path) -> None:
    found = judged(tmp_path, linear, lambda c: linear(0.5))
    assert outcome_of(found) == "conditions explain nothing"
    assert "members generated for another condition do as well" in found.sentence


def test_conditions_outside_the_fitted_range_have_a_verdict_of_their_own(tmp_path: Path) -> None:
    ends = [f"run-{i:02d}" for i in (0, 1, 2, 21, 22, 23)]
    found = judged(tmp_path, linear, lambda c: linear(min(max(c, 0.15), 0.85)), held_out=[*HELD_OUT, *ends])
    assert set(found.verdicts) == {"inside", "outside"}
    assert "Outside what was recorded: " in found.sentence
    assert {place.group for place in found.places if place.condition["c"] > 0.9} == {"outside"}
    assert found.verdicts["outside"].num_conditions == 6
    headers, rows = found.table("outside")
    assert headers[0] == "row"
    assert len(rows) == len(found.row_names) + 1


def test_two_conditions_are_too_few(tmp_path: Path) -> None:
    found = judged(tmp_path, linear, linear, held_out=["run-05", "run-10"])
    assert outcome_of(found) == "too few conditions to tell"
    assert "2 held-out conditions, at least 3 needed" in found.sentence


def test_rows_are_what_they_say(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", linear, noise=0.0)
    fitted = [run for run in store.trajectories if run not in HELD_OUT]
    found = evaluate_conditions(task_of(linear), store, Oracle(store, fitted, linear, 0.0), num_members=4)  # type: ignore[arg-type]
    for place in found.places:
        rows = place.rows
        # Without noise the line is met exactly by what was trained, generated and projected.
        for name in ("trained average", "generated", "generated average", "span ceiling"):
            assert rows[name].loss == pytest.approx(rows["trained"].loss, abs=1e-4)
        assert rows["trained"].members == 4
    for worse in ("nearest", "shuffled"):
        assert sum(place.rows[worse].loss - place.rows["trained"].loss for place in found.places) > 0
    assert found.details["settings"]["gp"].keys() == {"length", "noise"}


def test_runs_of_one_condition_are_one_condition_and_tell_the_noise_between_seeds(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", linear, noise=0.3)
    set_conditions(store.path, {"run-02": {"c": value_of(1)}})
    store = SnapshotStore.open(store.path)
    held_out = [*HELD_OUT, "run-02"]
    fitted = [run for run in store.trajectories if run not in held_out]
    found = evaluate_conditions(task_of(linear), store, Oracle(store, fitted, linear), num_members=4)  # type: ignore[arg-type]
    assert len(found.places) == 8
    (place,) = [place for place in found.places if len(place.runs) == 2]
    assert place.seed_spread is not None
    assert place.seed_spread[0] > 0
    assert "Runs of one condition differ by" in found.recovery_text("inside")


def test_training_gives_a_joint_model_and_a_few_steps_there(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def train(model: nn.Module, conditions: list[dict[str, Any]], num_steps: int) -> None:
        asked.append((len(conditions), num_steps))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(num_steps):
            (batch,) = task_of(linear)(**conditions[step % len(conditions)]).eval_loader
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()

    before = torch.get_rng_state()
    found = judged(tmp_path, linear, linear, train=train, joint_steps=20, fine_tune_steps=(5,))
    assert torch.equal(torch.get_rng_state(), before)
    assert asked.count((16, 20)) == 1
    assert asked.count((1, 5)) == 24
    rows = found.places[0].rows
    assert rows["average + 5 steps"].loss < rows["average of all"].loss
    assert {"joint", "nearest + 5 steps", "generated + 5 steps"} <= set(rows)
    assert found.details["train_seconds"] > 0


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    found = judged(tmp_path, linear, linear)
    path = found.save(tmp_path / "out")
    again = ConditionEvaluation.load(tmp_path / "out")
    assert again.to_json() == found.to_json()
    assert again.table() == found.table()
    assert again.table_text() == found.table_text()
    assert json.loads(path.read_text())["format"] == "pdiff-conditions"


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = judged(tmp_path, linear, linear).save(tmp_path / "out")
    document = json.loads(path.read_text())

    def refused(change: dict[str, Any]) -> pytest.ExceptionInfo[Exception]:
        path.write_text(json.dumps(document | change))
        with pytest.raises((FormatError, FormatVersionError)) as caught:
            ConditionEvaluation.load(path)
        return caught

    assert "format version 2; this release reads versions up to 1" in str(refused({"format_version": 2}).value)
    assert "found format 'other'" in str(refused({"format": "other"}).value)
    assert "KeyError: 'rows'" in str(refused({"conditions": [{"seed_spread": None}]}).value)
    assert "a task of kind 'cake'" in str(refused({"kind": "cake"}).value)
    assert "verdicts on other conditions" in str(refused({"verdicts": {}}).value)
    verdict = document["verdicts"]["inside"]
    assert "an outcome that is no text" in str(refused({"verdicts": {"inside": verdict | {"outcome": 3}}}).value)
    with pytest.raises(EvaluationNotFoundError, match=r"holds no conditions\.json"):
        ConditionEvaluation.load(tmp_path)


def test_a_task_that_asks_for_another_name_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", linear)
    generator: Any = Oracle(store, store.trajectories[:12], linear)

    def wrong(angle: float) -> Task:
        raise AssertionError(angle)

    with pytest.raises(ConfigError, match=r"task = 'wrong': it asks for 'angle'; its arguments must be names of the"):
        evaluate_conditions(wrong, store, generator)
    with pytest.raises(ConfigError, match="must return a Task, not a int"):
        evaluate_conditions(lambda **condition: 3, store, generator)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=r"must be a function of the condition \(c\)"):
        evaluate_conditions(task_of(linear)(0.5), store, generator)  # type: ignore[arg-type]


def test_generators_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", linear)
    generator: Any = Oracle(store, store.trajectories[:12], linear)
    generator.alignment = object()
    with pytest.raises(ConfigError, match="must be fitted with align='none'"):
        evaluate_conditions(task_of(linear), store, generator)
    generator.variables = None
    with pytest.raises(ConfigError, match="must be fitted on runs with conditions"):
        evaluate_conditions(task_of(linear), store, generator)
    generator = Oracle(store, store.trajectories[:12], linear)
    generator.trajectories = ["elsewhere"]
    with pytest.raises(ConfigError, match="must be the one of the fit; run elsewhere is missing"):
        evaluate_conditions(task_of(linear), store, generator)


def test_a_refined_generator_is_judged_as_one_and_never_replaced_by_a_fit(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", linear)
    fitted = [run for run in store.trajectories if run not in HELD_OUT]
    generator: Any = Oracle(store, fitted, linear)
    generator.report = {"refinement": {"num_conditions": 9, "best_step": 50}}
    found = evaluate_conditions(task_of(linear), store, generator, num_members=2)
    assert any("refined by the loss of the task at 9 conditions" in note for note in found.notes)
    with pytest.raises(ConfigError, match="would not be refined"):
        evaluate_conditions(task_of(linear), store, generator, conditions=fitted[2:4])


def test_members_that_answer_with_nan_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"4 of 4 members at c=.*answers with NaN or Inf there"):
        judged(tmp_path, linear, lambda c: linear(c) * math.nan)


def test_unknown_conditions_are_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", linear)
    generator: Any = Oracle(store, store.trajectories[:12], linear)
    with pytest.raises(ConditionError, match="no run 'run-77'"):
        evaluate_conditions(task_of(linear), store, generator, conditions=["run-77"])
    with pytest.raises(ConditionError, match=r"no run with c=0\.77"):
        evaluate_conditions(task_of(linear), store, generator, conditions=["c=0.77"])
    with pytest.raises(ConditionError, match="2 of 24 conditions left to fit"):
        evaluate_conditions(task_of(linear), store, generator, conditions=store.trajectories[2:])


def test_pictures_and_page_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pdiff_plugin.evaluation.condition_page import write_condition_report

    found = judged(tmp_path, linear, linear, extra={"by <hand>": lambda c: task_of(linear)(**c)})
    found.save_picture(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    page = write_condition_report(found, tmp_path).read_text()
    assert found.sentence.split(":")[0] in page
    assert "by &lt;hand&gt;" in page
    assert "<script" not in page
    assert (tmp_path / "report-figures" / "condition-accuracy.png").is_file()


TASK = """
import torch
from pdiff_plugin import Task

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 40))
        self.bias = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.weight.T + self.bias

def task(c):
    rng = torch.Generator().manual_seed(int(100 * c))
    return Task(Net(), [(torch.randn(50, 40, generator=rng), torch.randint(4, (50,), generator=rng))])

def nothing(condition):
    return task(**condition)

def train(model, conditions, num_steps):
    with torch.no_grad():
        model.bias += 0.01 * num_steps
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and a quick fit to all of it."""
    folder = tmp_path_factory.mktemp("fitted")
    write_store(folder / "store", linear)
    quick = ["--condition.centre", "ridge", "--diffusion.max-steps", "40", "--diffusion.eval-every-n-steps", "20"]
    assert main(["fit", str(folder / "store"), "--out", str(folder / "fit"), *quick]) == 0
    (folder / "sweeptask.py").write_text(TASK)
    return folder


def test_the_command_fits_again_without_what_it_judges(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fitted)
    options = [
        "--train",
        "sweeptask:train",
        "--joint-steps",
        "3",
        "--fine-tune-steps",
        "2",
        "--extra",
        "own=sweeptask:nothing",
    ]
    asked = ["evaluate", "fit", "--task", "sweeptask:task", "--num-members", "3"]
    assert main([*asked, "--conditions", "held-out", *options]) == 0
    out = capsys.readouterr().out
    assert "The generator was fitted again without 6 runs" in out
    assert "5 conditions inside what was fitted" in out  # the sixth was the last of all
    assert "1 condition outside what was fitted" in out
    assert "Pictures: pdiff report fit/evaluation" in out
    found = ConditionEvaluation.load("fit/evaluation")
    assert {"joint", "average + 2 steps", "own"} <= set(found.row_names)
    assert found.sentence in out
    judged_runs = {run for place in found.places for run in place.runs}
    assert judged_runs.isdisjoint(WeightGenerator.load("fit/evaluation/refit").trajectories)
    # Other conditions replace what was fitted in between.
    assert main([*asked, "--conditions", "run-03", "run-09", "run-15", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [place["runs"] for place in document["conditions"]] == [["run-03"], ["run-09"], ["run-15"]]
    assert "run-03" not in WeightGenerator.load("fit/evaluation/refit").trajectories


def test_the_report_of_a_folder_holds_the_page_over_conditions(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    judged(tmp_path, linear, linear).save(tmp_path / "evaluation")
    assert main(["report", str(tmp_path / "evaluation")]) == 0
    assert f"Wrote {tmp_path / 'evaluation' / 'conditions.html'}" in "".join(capsys.readouterr().out.split("\n"))
    assert (tmp_path / "evaluation" / "conditions.html").is_file()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--joint-steps", "3"], "--joint-steps = 3: it must be given together with --conditions"),
        (["--conditions", "held-out", "--quick"], "--quick = True: it does not go with --conditions; leave it out"),
        (["--conditions", "held-out", "--extra", "own"], "--extra = 'own': it must be NAME=MODULE:FUNCTION"),
        (["--conditions", "c=7"], "no run with c=7"),
        (
            ["--conditions", "held-out", "--train", "sweeptask:task"],
            "must name a function that takes model, conditions",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    monkeypatch.chdir(fitted)
    assert main(["evaluate", "fit", "--task", "sweeptask:task", "--out", "refused", *flags]) == 1
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_evaluations_of_several_seeds_are_judged_over_all_their_conditions(tmp_path: Path) -> None:
    found = [
        judged(tmp_path / str(seed), linear, linear, seed=seed, train_seconds=cost) for seed, cost in ((0, 2), (1, 4))
    ]

    pooled = ConditionEvaluation.pooled(found)

    assert pooled.verdicts["inside"].num_conditions == 16
    assert pooled.places == [*found[0].places, *found[1].places]
    assert pooled.verdicts["inside"].outcome == "interpolation is enough"
    assert pooled.details["train_seconds"] == 3
    again = ConditionEvaluation.from_json(json.loads(json.dumps(pooled.to_json())))
    assert again.table_text() == pooled.table_text()
    for wrong in ([], [found[0], dataclasses.replace(found[1], kind_name="regression")]):
        with pytest.raises(ConfigError, match="must be one or more of one kind of task"):
            ConditionEvaluation.pooled(wrong)


def test_an_outcome_of_a_newer_release_is_drawn_plainly(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = judged(tmp_path, linear, linear).save(tmp_path / "out")
    document = json.loads(path.read_text())
    verdict = document["verdicts"]["inside"] | {"outcome": "too good to be true", "mood": "good"}
    path.write_text(json.dumps(document | {"verdicts": {"inside": verdict}}))
    from pdiff_plugin.evaluation.condition_page import write_condition_report

    page = write_condition_report(ConditionEvaluation.load(path), tmp_path).read_text(encoding="utf-8")
    assert "too good to be true" in page


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cheap_by_condition": "cake"}, "a best cheap row that is none"),
        ({"headroom": {"name": "a"}}, "KeyError: 'loss'"),
        ({"num_conditions": "many"}, "invalid literal for int"),
    ],
)
def test_a_verdict_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    path = judged(tmp_path, linear, linear).save(tmp_path / "out")
    document = json.loads(path.read_text())
    verdict = document["verdicts"]["inside"]
    if "cheap_by_condition" in change:  # of as many as there are
        change = {"cheap_by_condition": ["cake"] * len(verdict["cheap_by_condition"])}
    path.write_text(json.dumps(document | {"verdicts": {"inside": verdict | change}}))
    with pytest.raises(FormatError, match=text):
        ConditionEvaluation.load(path)
