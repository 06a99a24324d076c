"""One file of every format that is read, and the public door through which each of them is read."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pdiff_plugin as pdiff
from pdiff_plugin import describe
from pdiff_plugin.config import ConditionConfig, DiffusionConfig, FitConfig, RefineConfig, SubspaceConfig, TuneConfig
from pdiff_plugin.evaluation.condition_findings import JudgedCondition, RowFigures, verdicts_of
from pdiff_plugin.evaluation.condition_page import write_condition_report
from pdiff_plugin.evaluation.condition_result import ConditionEvaluation
from pdiff_plugin.evaluation.condition_rows import AVERAGE, CEILING, GENERATED, SHUFFLED, TRAINED
from pdiff_plugin.evaluation.kinds import KINDS
from pdiff_plugin.evaluation.page import render_html, write_report
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.recording.recorder import PDiffRecorder
from pdiff_plugin.snapshots.base import write_base
from pdiff_plugin.snapshots.chunks import PlannedWindow
from pdiff_plugin.snapshots.conditions import read_condition_lines, set_condition
from pdiff_plugin.snapshots.layout import Layout
from pdiff_plugin.snapshots.origin import Origin, write_origin
from pdiff_plugin.snapshots.store import SnapshotStore
from pdiff_plugin.snapshots.trajectory import TrajectoryWriter

SCRIPT = "<script>alert"
DATA = Path(__file__).parents[1] / "data"

# What was read where -> what is written there, by doors that write.
Door = Callable[[Path, Path], None]


class Net(nn.Module):
    """The network of every store, generator and ensemble here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(x))
        return out


@dataclass(frozen=True)
class Target:
    """A file and who reads it.

    Attributes:
        name: for people.
        path: of the file, inside the sandbox.
        door: called with the folder (the first part of ``path``) and a folder to write to.
        weight: how often it is taken; below 1 where it takes a second or more.
    """

    name: str
    path: str
    door: Door
    weight: float = 1


# What is made on the spot.


def make(sandbox: Path) -> None:
    """Fill a folder with one file of every format."""
    torch.manual_seed(0)
    _make_stores(sandbox)
    for name in ("evaluation-v1", "tune-v1", "store-v1-fitted", "store-v1-sharded", "fit-v1", "fit-v1-conv"):
        shutil.copytree(DATA / name, sandbox / name)
    for name in ("fit-v1-aligned", "fit-v1-unfinished"):
        shutil.copytree(DATA / name, sandbox / name)
    shutil.copytree(sandbox / "store-v1-sharded", sandbox / "mixed")
    _write_run(sandbox / "mixed", "whole", 6)
    config = FitConfig(
        condition=ConditionConfig(centre="gp"),
        autoencoder=SubspaceConfig(latent_dim=4),
        diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=6, eval_every_n_steps=2),
    )
    fit(sandbox / "sweep", config, out=sandbox / "dial")
    _refined(sandbox / "refined", pdiff.WeightGenerator.load(sandbox / "dial"))
    assert pdiff.WeightGenerator.load(sandbox / "refined").report["refinement"]["best_step"] > 0
    with suppress(KeyboardInterrupt):
        _refined(sandbox / "unrefined", pdiff.WeightGenerator.load(sandbox / "dial"), _stop_after_four)
    model = Net().eval()
    (sandbox / "ensemble").mkdir()
    pdiff.DiffusionEnsemble(model, _members(model)).save(sandbox / "ensemble" / "ensemble.safetensors")
    _conditions().save(sandbox / "conditions")
    _make_checkpoints(sandbox / "checkpoints")
    _make_unfinished(sandbox, config)
    for name, file in (("unfinished", "fit.json"), ("tune-v1", "tune.json")):
        path = sandbox / name / file
        document = json.loads(path.read_text())
        (sandbox / name).with_suffix(".config").write_text(json.dumps(document["config"]))
        if file == "tune.json":  # where its store lies is all that differs
            path.write_text(json.dumps(document | {"store": str((sandbox / "store-v1-fitted").resolve())}))


def _make_stores(sandbox: Path) -> None:
    for number in range(12):
        name = _write_run(sandbox / "sweep", None, 4, shift=number)
        set_condition(sandbox / "sweep", name, {"angle": 30.0 * number, "style": "ink" if number % 2 else "oil"})
    _write_run(sandbox / "store", "run-001", 12)
    _write_run(sandbox / "store", "run-002", 6, shift=1)
    for name in ("run-001", "run-002"):
        set_condition(sandbox / "store", name, {"lr": 0.1, "style": "ink", "on": True, "many": [1.0, 2.0]})

    layout = SnapshotStore.open(sandbox / "store").layout
    writer = TrajectoryWriter(sandbox / "short", layout, trajectory="run-001")
    for number in range(2):
        steps = range(10 * number + 1, 10 * number + 5)
        rows = torch.randn(4, layout.num_values).cumsum(0).abs()
        writer.write_chunk(rows, steps, window=PlannedWindow(50, 100, 12))
    pdiff.merge_stores([sandbox / "store"], sandbox / "merged")
    write_origin(sandbox / "merged" / "trajectories" / "run-001", Origin.of("s3://bucket/a", {"base.safetensors": "4"}))


def _write_run(store: Path, name: str | None, num: int, shift: float = 0.0) -> str:
    model = Net()
    if (store / "shards").exists():
        layout = SnapshotStore.open(store).layout
    else:
        layout = Layout.from_tensors(
            {key: t for key, t in model.state_dict(keep_vars=True).items() if t.dtype.is_floating_point}
        )
    writer = TrajectoryWriter(store, layout, trajectory=name)
    rows = 1.0 + shift + 0.1 * torch.randn(num, layout.num_values).cumsum(0).abs()
    half = num // 2
    for first, last in ((0, half), (half, num)):
        steps = range(first + 1, last + 1)
        writer.write_chunk(rows[first:last], steps, [s / 10 for s in steps], [{"loss": 1.0 / s} for s in steps])
    write_base(writer.folder, model.state_dict(), {"step": str(num), "total_steps": str(num + 5), "rest_drift": "0.1"})
    return writer.trajectory


def _members(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.stack([t.detach() + k for k in range(3)]) for name, t in model.head.named_parameters("head")}


def _conditions() -> ConditionEvaluation:
    places = []
    for number in range(5):
        rows = {
            name: RowFigures(0.5 + 0.01 * k * (1 + number), 0.9 - 0.01 * k, 0.6, 0.8, 2, 0.1)
            for k, name in enumerate((TRAINED, GENERATED, SHUFFLED, "nearest", AVERAGE, CEILING))
        }
        outside = ("angle = 400 lies outside",) if number == 4 else ()
        places.append(JudgedCondition({"angle": 10.0 * number}, (f"run-{number}",), outside, rows, (0.01, 0.02)))
    kind = KINDS["classification"]
    return ConditionEvaluation(
        "a task", "classification", places, verdicts_of(kind, places, 3.0), [{"angle": 0.0}], ["a note"], {"seed": 0}
    )


def _make_checkpoints(folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    for number in (1, 2):
        state = {name: tensor.clone() + number for name, tensor in Net().state_dict().items()}
        torch.save({"state_dict": state, "global_step": 10 * number, "epoch": number}, folder / f"a-step{number}.pt")
        torch.save(state, folder / f"b-step{number}.pth", _use_new_zipfile_serialization=False)
        save_file(state, folder / f"c-step{number}.safetensors")
    for number in (1, 2):
        inside = folder / "hf" / f"checkpoint-{number}"
        inside.mkdir(parents=True)
        save_file(
            {name: t.clone() + number for name, t in Net().state_dict().items()}, inside / "model-00001.safetensors"
        )
        names = dict.fromkeys(Net().state_dict(), "model-00001.safetensors")
        (inside / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        (inside / "trainer_state.json").write_text(json.dumps({"global_step": number, "epoch": 0.5 * number}))
    (folder / "table.csv").write_text('run,params_lr,style,many\na,0.1,ink,"[1, 2]"\nb,0.2,oil,"[3, 4]"\n')
    (folder / "lines.jsonl").write_text('{"angle": 10.0, "style": "ink"}\n\n{"angle": 20, "style": "oil"}\n')


def _stop_after_four(progress: Progress) -> None:
    if progress.stage in ("diffusion", "refine") and progress.step >= 4:
        raise KeyboardInterrupt


def _make_unfinished(sandbox: Path, config: FitConfig) -> None:
    with suppress(KeyboardInterrupt):
        fit(sandbox / "store-v1-fitted", config, out=sandbox / "unfinished", on_progress=_stop_after_four)


def _refined(out: Path, generator: pdiff.WeightGenerator, on_progress: OnProgress | None = None) -> None:
    def loss(model: Callable[[torch.Tensor], torch.Tensor], condition: object) -> torch.Tensor:
        return model(torch.ones(4, 8)).square().mean()

    settings = RefineConfig(num_steps=20, num_directions=2, lr=0.01)
    pdiff.refine(generator, Net(), loss, settings, out=out, on_progress=on_progress)


# Doors.


def _look(store: SnapshotStore) -> None:
    """Read all that a store says of itself, and see that it makes sense."""
    assert len(store.epochs) == len(store.metrics) == len(store) == len(store.trajectory_index)
    for number in range(len(store.trajectories)):
        steps = store.steps[store.trajectory_index == number]
        assert bool((steps.diff() > 0).all()), f"steps that do not rise: {steps.tolist()}"
    rows = store.rows()
    assert tuple(rows.shape) == (len(store), store.layout.num_values)
    if len(store) and store.layout.num_values:
        store.gather(torch.tensor([0]), torch.tensor([len(store) - 1]))
        store.state_dict(0)
    for name in store.trajectories:
        header = store.base_header(name)
        try:
            store.base(name)
        except pdiff.PDiffError:
            assert header == {} or store.path  # a base whose header alone can be read


def read_store(folder: Path, _: Path) -> None:
    _look(SnapshotStore.open(folder))
    describe.show_store(json.loads(json.dumps(describe.store(folder))))
    describe.show_conditions(describe.conditions(folder))


def resume(folder: Path, out: Path) -> None:
    """A training that goes on in the store."""
    _go_on_training(folder, out, step=12)


def resume_short(folder: Path, out: Path) -> None:
    """One that goes on before its window."""
    _go_on_training(folder, out, step=4)


def _go_on_training(folder: Path, out: Path, step: int) -> None:
    shutil.copytree(folder, out / "store", symlinks=True, copy_function=_copy)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = PDiffRecorder(out / "store", layers="all", last_steps=20)
    recorder.load_state_dict({"step": step, "trajectory": "run-001", "store": str(out / "store")})
    with recorder.attach(model, optimizer, total_steps=step + 8):
        for _ in range(2):
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
    if recorder.error is not None:
        raise recorder.error
    last = SnapshotStore.open(out / "store")
    assert set(last.steps[last.trajectory_index == 0].tolist()) >= {step + 1, step + 2}, "the run did not go on"


def _copy(source: str, target: str) -> str:
    """As it is: what is no file is there linked to."""
    if Path(source).is_file() and not Path(source).is_symlink():
        return str(shutil.copy2(source, target))
    Path(target).symlink_to(source)
    return target


def merge_into_another(folder: Path, out: Path) -> None:
    pdiff.merge_stores([folder, folder.parent / "merged"], out / "result")
    _look(SnapshotStore.open(out / "result"))


def merge_others_into(folder: Path, out: Path) -> None:
    shutil.copytree(folder, out / "merged", symlinks=True, copy_function=_copy)
    pdiff.merge_stores([folder.parent / "store"], out / "merged")
    _look(SnapshotStore.open(out / "merged"))


def read_generator(folder: Path, _: Path) -> None:
    generator = pdiff.WeightGenerator.load(folder)
    describe.show_generator(json.loads(json.dumps(describe.generator(str(folder), generator))))
    rng = torch.Generator().manual_seed(0)
    generator.sample(2, rng=rng, num_sampling_steps=3)
    generator.sample(2, rng=rng, diversity=0.5, num_sampling_steps=3)
    if generator.conditions:
        generator.sample(1, rng=rng, condition=generator.conditions[0], num_sampling_steps=3)
    if generator.alignment is not None:
        for name in generator.alignment.permutations:
            generator.alignment.columns(name, 0, generator.layout.num_values)


def read_default_sample(folder: Path, _: Path) -> None:
    pdiff.WeightGenerator.load(folder).sample(2, rng=torch.Generator().manual_seed(0))


def go_on_refining(folder: Path, out: Path) -> None:
    shutil.copytree(folder, out / "fit", symlinks=True, copy_function=_copy)
    _refined(out / "fit", pdiff.WeightGenerator.load(folder.parent / "dial"))


def read_ensemble(folder: Path, _: Path) -> None:
    ensemble = pdiff.DiffusionEnsemble.load(folder / "ensemble.safetensors", Net().eval())
    ensemble.predict(torch.randn(4, 8))


def read_evaluation(folder: Path, _: Path) -> None:
    result = pdiff.Evaluation.load(folder)
    str(result)
    json.dumps(result.to_json())
    describe.show_evaluation(result, 4.0)
    if result.choices:
        result.best(1)


def report(folder: Path, _: Path) -> None:
    result = pdiff.Evaluation.load(folder)
    assert SCRIPT not in render_html(result, [])


def drawn_report(folder: Path, out: Path) -> None:
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, on figures at the end of floats: no error of ours
    assert SCRIPT not in write_report(folder, out).read_text(encoding="utf-8")


def read_conditions(folder: Path, _: Path) -> None:
    result = ConditionEvaluation.load(folder)
    str(result)
    json.dumps(result.to_json())
    describe.show_condition_evaluation(result)


def report_conditions(folder: Path, out: Path) -> None:
    assert SCRIPT not in write_condition_report(ConditionEvaluation.load(folder), out).read_text(encoding="utf-8")


def go_on(store: str) -> Door:
    """A fit that goes on in its folder."""

    def door(folder: Path, out: Path) -> None:
        shutil.copytree(folder, out / "fit", symlinks=True, copy_function=_copy)
        fit(folder.parent / store, FitConfig.from_json(_config_of(folder)), out=out / "fit")

    return door


def go_on_searching(folder: Path, out: Path) -> None:
    """A search that is called again, up to where it would start."""
    from pdiff_plugin.cluster.tune import _open

    shutil.copytree(folder, out / "tune", symlinks=True, copy_function=_copy)
    store = SnapshotStore.open(folder.parent / "store-v1-fitted")
    config = FitConfig.from_json(_config_of(folder))
    document = _open(store, config, TuneConfig(num_trials=2, seed=0), out / "tune", None, fresh=False)
    describe.show_trials(out / "tune", document)


def _config_of(folder: Path) -> dict[str, Any]:
    """The settings that a fit or a search began with, which nobody spoils."""
    found: dict[str, Any] = json.loads(folder.with_suffix(".config").read_text())
    return found


def import_all(pattern: str, table: str | None = None) -> Door:
    """Checkpoints into a new store."""

    def door(folder: Path, out: Path) -> None:
        conditions = None if table is None else folder / table
        names = sorted(folder.glob(pattern))
        store = pdiff.import_checkpoints(names or folder, store=out / "store", layers="all", conditions=conditions)
        _look(store)

    return door


def read_lines(folder: Path, _: Path) -> None:
    read_condition_lines(folder / "lines.jsonl")


RANK = "shards/rank-00000-of-00002"
TARGETS = [
    Target("layout", "store/layout.json", read_store, 4),
    Target("chunk", "store/trajectories/run-001/chunk-000002.safetensors", read_store, 5),
    Target("first chunk", "store/trajectories/run-001/chunk-000001.safetensors", read_store, 1),
    Target("base", "store/trajectories/run-001/base.safetensors", read_store, 2),
    Target("condition", "store/trajectories/run-001/condition.json", read_store, 3),
    Target("layout, resumed", "store/layout.json", resume, 1),
    Target("chunk, resumed", "store/trajectories/run-001/chunk-000002.safetensors", resume, 2),
    Target("base, resumed", "store/trajectories/run-001/base.safetensors", resume, 1),
    Target("condition, resumed", "store/trajectories/run-001/condition.json", resume, 1),
    Target("sparse chunk", "short/trajectories/run-001/sparse-000002.safetensors", read_store, 3),
    Target("sparse chunk, resumed", "short/trajectories/run-001/sparse-000001.safetensors", resume_short, 1),
    Target("layout, merged", "store/layout.json", merge_into_another, 1),
    Target("chunk, merged", "store/trajectories/run-001/chunk-000002.safetensors", merge_into_another, 2),
    Target("sparse chunk, merged", "short/trajectories/run-001/sparse-000002.safetensors", merge_into_another, 1),
    Target("base, merged", "store/trajectories/run-001/base.safetensors", merge_into_another, 1),
    Target("condition, merged", "merged/trajectories/run-001/condition.json", merge_others_into, 1),
    Target("origin", "merged/trajectories/run-001/origin.json", merge_others_into, 1),
    Target("layout of a rank", f"store-v1-sharded/{RANK}/layout.json", read_store, 1),
    Target("shapes of shards", f"store-v1-sharded/{RANK}/shard.json", read_store, 2),
    Target("chunk of a rank", f"store-v1-sharded/{RANK}/trajectories/run-001/chunk-000001.safetensors", read_store, 2),
    Target("shapes beside a whole run", f"mixed/{RANK}/shard.json", read_store, 1),
    Target("layout of a rank beside a whole run", "mixed/shards/rank-00001-of-00002/layout.json", read_store, 1),
    Target("generator", "fit-v1/generator.safetensors", read_generator, 5),
    Target("generator, all steps", "fit-v1/generator.safetensors", read_default_sample, 1),
    Target("conv generator", "fit-v1-conv/generator.safetensors", read_generator, 2),
    Target("aligned generator", "fit-v1-aligned/generator.safetensors", read_generator, 2),
    Target("generator with conditions", "dial/generator.safetensors", read_generator, 5),
    Target("refined generator", "refined/generator.safetensors", read_generator, 3),
    Target("refinement checkpoint", "unrefined/refine.checkpoint.safetensors", go_on_refining, 2),
    Target("ensemble", "ensemble/ensemble.safetensors", read_ensemble, 4),
    Target("evaluation", "evaluation-v1/evaluation.json", read_evaluation, 5),
    Target("arrays of an evaluation", "evaluation-v1/evaluation.safetensors", read_evaluation, 1),
    Target("report", "evaluation-v1/evaluation.json", report, 1),
    Target("drawn report", "evaluation-v1/evaluation.json", drawn_report, 0.1),
    Target("drawn report with arrays", "evaluation-v1/evaluation.safetensors", drawn_report, 0.3),
    Target("conditions", "conditions/conditions.json", read_conditions, 4),
    Target("report over conditions", "conditions/conditions.json", report_conditions, 0.3),
    Target("fit.json", "unfinished/fit.json", go_on("store-v1-fitted"), 2),
    Target("fit checkpoint", "unfinished/diffusion.checkpoint.safetensors", go_on("store-v1-fitted"), 2),
    Target("statistics checkpoint", "unfinished/statistics.checkpoint.safetensors", go_on("store-v1-fitted"), 2),
    Target("tune.json", "tune-v1/tune.json", go_on_searching, 2),
    Target("checkpoint", "checkpoints/a-step2.pt", import_all("a-*"), 2),
    Target("old checkpoint", "checkpoints/b-step2.pth", import_all("b-*"), 2),
    Target("safetensors checkpoint", "checkpoints/c-step2.safetensors", import_all("c-*"), 3),
    Target("index", "checkpoints/hf/checkpoint-2/model.safetensors.index.json", import_all("hf"), 1),
    Target("trainer state", "checkpoints/hf/checkpoint-2/trainer_state.json", import_all("hf"), 1),
    Target("table", "checkpoints/table.csv", import_all("[ab]-*", "table.csv"), 2),
    Target("lines", "checkpoints/lines.jsonl", read_lines, 1),
]  # fmt: skip
