"""The `pdiff` command: one function per subcommand, whose signature is its flags and whose docstring is its help.

Settings are the config dataclasses, whose fields are the flags. Exit codes: 0 done, 1 an error that names the next
move, 2 wrong usage, 130 interrupted and 143 told to end by SIGTERM (run again to go on). Nothing heavy is imported
before a subcommand runs, so that ``pdiff --help`` is quick: the names of ``pdiff`` load on first use.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import docstring_parser
import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

import pdiff_plugin as pdiff
from pdiff_plugin import console, describe
from pdiff_plugin.config import (
    AUTOENCODER_CONFIGS,
    CACHE_GB,
    AutoencoderName,
    ConditionConfig,
    DiffusionConfig,
    DistributedConfig,
    EvaluateConditionsConfig,
    EvaluateConfig,
    FitConfig,
    RecorderConfig,
    RefineConfig,
    SamplingConfig,
    TuneConfig,
)
from pdiff_plugin.errors import ConfigError, MissingDependencyError, PDiffError, StoreNotFoundError
from pdiff_plugin.hub import hub_address
from pdiff_plugin.progress import Terminated, terminate
from pdiff_plugin.snapshots.files import storage_error
from pdiff_plugin.snapshots.scratch import remove_abandoned
from pdiff_plugin.user_code import find_function, function_named, load_model, made_by

Inline = arg(name="")  # a config's fields become flags without its own name in front
Switch = FlagCreatePairsOff[bool]  # off unless given, so that it needs no --no-...
Json = Annotated[Switch, arg(help="Print the result as one JSON document on stdout.")]
Seed = Annotated[int, arg(help="Seed of every draw.")]
Fresh = Annotated[Switch, arg(help="Start anew and replace what an earlier run left in the folder.")]
Where = Annotated[FlagCreatePairsOff[DistributedConfig], Inline]
Layers = Annotated[
    str, arg(help="Selection, as for PDiffRecorder: last-norms:N, norms, head, lora, all, or a glob of module names.")
]
FitPath = Positional[
    Annotated[
        Path,
        arg(metavar="FIT", help="Folder of a fit, or its generator.safetensors, or hf://user/name[@revision]."),
    ]
]
LogTo = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(
        metavar="tensorboard:FOLDER|wandb:PROJECT|mlflow:URI",
        help="Also log curves and figures there; may be given several times.",
    ),
]
FitStore = Annotated[
    Path | None, arg(metavar="STORE", help="The snapshot store; the one the generator was fitted on unless given.")
]
MoreStores = Positional[Annotated[tuple[str, ...], arg(metavar="[STORE ...]")]]
TaskName = Annotated[
    str, arg(metavar="MODULE:FUNCTION", help="Returns a pdiff_plugin.Task; modules are also looked for in this folder.")
]


def demo(
    *,
    dial: Switch = False,
    out: Path | None = None,
    seed: Seed = 0,
    num_threads: int | None = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Run the whole path on scikit-learn's digits: train with PDiffRecorder, fit, generate, swap, judge.

    Args:
        dial: Instead of one training, a sweep over 24 rotations: fitted to every other one, judged at those between.
        out: Folder for the store, the generator and the result; pdiff-demo, or pdiff-dial, unless given.
        num_threads: CPU threads; PyTorch's choice unless given. Figures repeat exactly for one choice on one machine.
    """
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
    out = out or Path("pdiff-dial" if dial else "pdiff-demo")
    (_demo_of_a_dial if dial else _demo_of_a_run)(out, seed, fresh, json)


def _demo_of_a_run(out: Path, seed: int, fresh: bool, json: bool) -> None:
    from pdiff_plugin import demo as module

    console.tell("Training a small network on 150 images of digits; PDiffRecorder records its last two BatchNorms.")
    with console.progress() as on_progress:
        result = module.run(out, seed=seed, fresh=fresh, on_progress=on_progress)
    page = _page_of(out, lambda: pdiff.write_report(out / "evaluation"))
    if json:
        describe.print_json(result.to_json())
        return
    describe.show_evaluation(result)
    console.say(
        f"\nEverything is in {out}/. Try next:\n"
        f"  pdiff inspect {out}/store\n"
        f"  pdiff inspect {out}/fit\n"
        f"  pdiff generate {out}/fit --num-members 8 --out {out}/members\n"
        f"  cd {out} && pdiff evaluate fit --task task:task --num-members 64\n"
        f"  {page}"
    )


def _demo_of_a_dial(out: Path, seed: int, fresh: bool, json: bool) -> None:
    from pdiff_plugin import dial_demo as module
    from pdiff_plugin.evaluation.condition_page import write_condition_report

    console.tell("Training a small network at 24 rotations of digits, from one start; PDiffRecorder records each.")
    with console.progress() as on_progress:
        result = module.run(out, seed=seed, fresh=fresh, on_progress=on_progress)
    page = _page_of(out, lambda: write_condition_report(result, out / "evaluation"))
    if json:
        describe.print_json(result.to_json())
        return
    describe.show_condition_evaluation(result)
    console.say(
        f"\nEverything is in {out}/. Try next:\n"
        f"  pdiff condition {out}/store\n"
        f"  pdiff inspect {out}/fit\n"
        f"  pdiff generate {out}/fit --condition angle=50 --num-members 8 --out {out}/at-50\n"
        f"  cd {out} && pdiff evaluate fit --task task:task --conditions held-out\n"
        f"  {page}"
    )


def _page_of(out: Path, write: Callable[[], Path]) -> str:
    """The command that shows the report, or that makes it once there is what draws it."""
    try:
        return f"open {write()}"
    except MissingDependencyError as error:
        return f"pdiff report {out}/evaluation   # {error}"


def layers(
    model: Positional[Annotated[str, arg(metavar="MODEL")]],
    *,
    layers: Layers = str(RecorderConfig.layers),
    json: Json = False,
) -> None:
    """Show what would be recorded of a model.

    Args:
        model: `timm:NAME`, or `package.module:function` returning a torch.nn.Module.
    """
    document = describe.layers(model, load_model(model), layers)
    (describe.print_json if json else describe.show_layers)(document)


def inspect(path: Positional[Path], *, picture: Path | None = None, json: Json = False) -> None:
    """Show what is in a snapshot store, or in a fitted generator.

    Args:
        path: A store, a generator file, the folder of a fit, or hf://user/name[@revision].
        picture: PNG file to draw the conditions of a store into, where one or two numbers among them vary.
    """
    from pdiff_plugin.generator.generator_file import FILE_NAME

    if picture is not None:
        from pdiff_plugin.evaluation.condition_map import save_picture

        save_picture(list(pdiff.SnapshotStore.open(path).conditions.values()), picture)
    if path.suffix == ".safetensors" or (path / FILE_NAME).is_file() or hub_address(str(path)):
        document, show = describe.generator(str(path), _loaded(path)), describe.show_generator
    else:
        document, show = describe.store(path), describe.show_store
    (describe.print_json if json else show)(document)


def condition(
    store: Positional[Annotated[Path, arg(metavar="STORE")]],
    *,
    set: Annotated[
        UseAppendAction[tuple[tuple[str, ...], ...]],
        arg(
            metavar="RUN NAME=VALUE ...",
            help="A run and its whole condition: --set run-001 angle=45 style=ink user=0.5,-1. Values are numbers, "
            "true or false, lists of numbers with commas, else text.",
        ),
    ] = (),
    json: Json = False,
) -> None:
    """Show at which condition each run of a store was recorded, or set it.

    All conditions of a store have the same names; those that are set in one command are checked together.

    Args:
        store: The snapshot store.
    """
    from pdiff_plugin.snapshots.conditions import read_pairs, set_conditions

    given: dict[str, dict[str, Any]] = {}
    for run, *pairs in filter(None, set):
        if not pairs:
            raise ConfigError("--set", run, "must be a run and NAME=VALUE pairs: --set run-001 angle=45")
        given[run] = read_pairs(pairs, "--set")
    if given:
        set_conditions(store, given)
    document = describe.conditions(store)
    (describe.print_json if json else describe.show_conditions)(document)


def import_(
    paths: Positional[tuple[Path, ...]],
    *,
    store: Path,
    layers: Layers = str(RecorderConfig.layers),
    model: str | None = None,
    ema: Switch = False,
    trajectory: str | None = None,
    conditions: Annotated[
        Path | None,
        arg(
            metavar="TABLE",
            help="A sweep of runs: CSV file with a row for each. A column trajectory, run, file, path, checkpoint, "
            "name or logdir names the run's files or a folder above them, the others are its condition (in exports of "
            "Optuna, Ray and W&B those with their prefix).",
        ),
    ] = None,
    columns: tuple[str, ...] = (),
    condition: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="NAME=REGEX",
            help=r"A sweep of runs: where their files' or folders' names hold the condition. --condition "
            r'"angle=(\d+)" finds angle=45, angle_45 and angle45, and the number alone where the word is not in the '
            r"file's name; several names by several of them, or by named groups, (?P<angle>\d+).",
        ),
    ] = (),
    json: Json = False,
) -> None:
    """Make a snapshot store from checkpoints that a run or a sweep has left behind, one snapshot each.

    With --conditions or --condition, checkpoints of the same condition and the same place, but for the step, are one
    run. Nothing is imported unless all of them have a condition.

    Args:
        paths: .pt, .pth, .ckpt or .safetensors files, checkpoint-* folders, or a folder of these, all of one run.
        columns: Names of the condition among the columns of --conditions, where others are something else.
        store: The store to add to; one that holds snapshots keeps to the tensors that it has.
        model: `timm:NAME` or `package.module:function`, where names and shapes alone do not tell the layers.
        ema: Take the averaged weights that timm and others keep beside the trained ones.
        trajectory: Name of the run in the store (of several: NAME-1, NAME-2, ...); the next free one unless given.
    """
    found = _conditions_of(conditions, columns, condition)
    network = None if model is None else load_model(model)
    if layers != RecorderConfig.layers and (store / "layout.json").is_file():
        console.tell(f"{store} holds snapshots already: the same tensors are taken, whatever --layers {layers} says.")
    pdiff.import_checkpoints(
        paths, store=store, layers=layers, model=network, ema=ema, trajectory=trajectory, conditions=found
    )
    inspect(store, json=json)


def merge(
    store: Positional[Annotated[str, arg(metavar="STORE")]],
    more_stores: MoreStores = (),
    *,
    out: str,
    json: Json = False,
) -> None:
    """Put the runs of several snapshot stores into one, with their conditions.

    Run again after an interruption, or when there are more runs, it adds what is missing. Nothing is copied where all
    is on one disk, and the stores stay as they are.

    Args:
        store: A store, a pattern in quotes such as 'runs/*/pdiff-snapshots', or a URL such as s3://bucket/runs/a.
        more_stores: More of these.
        out: The store to add to, made if missing.
    """
    with console.progress() as on_progress:
        report = pdiff.merge_stores([store, *more_stores], out, on_progress=on_progress)
    if json:
        describe.print_json(report.to_json())
        return
    describe.show_merge(report)
    console.say(f"Next: pdiff inspect {out}   or   pdiff fit {out} --out FIT")


def fit(
    store: Positional[Annotated[str, arg(metavar="STORE")]],
    more_stores: MoreStores = (),
    *,
    out: str,
    preset: Literal["default", "paper"] = "default",
    autoencoder: AutoencoderName = "subspace",
    fresh: Fresh = False,
    log: LogTo = (),
    json: Json = False,
    cache_gb: float = CACHE_GB,
    config: Annotated[FitConfig, Inline] = FitConfig(),  # noqa: B008 (frozen)
    distributed: Where = DistributedConfig(),  # noqa: B008 (frozen)
) -> None:
    """Learn a generator from the snapshots of a store.

    Run again after an interruption, it goes on where it was.

    Args:
        store: The snapshot store; a URL such as s3://bucket/runs/a is read through Ray. A pattern in quotes, such as
            'runs/*/pdiff-snapshots', is all stores that it matches: they are merged in the run folder first.
        more_stores: More stores or patterns, merged with the first.
        out: Run folder for generator.safetensors and fit.json; may be a URL too.
        preset: Settings that the other flags change: `paper` is the published configuration of p-diff.
        autoencoder: Which one, if not the preset's; with --help, `--autoencoder conv` shows the settings of that.
        cache_gb: Of a store in a bucket, bound on what each worker keeps on disk, in GB. What does not fit is fetched
            twice.
    """
    from pdiff_plugin.snapshots.remote import is_remote

    del preset, autoencoder  # they have chosen the settings that `config` started from, see _fit_from
    stores = [store, *more_stores]
    with console.progress() as on_progress:
        if _runs_on_ray(distributed) or is_remote(out) or (is_remote(store) and not more_stores):
            from pdiff_plugin.cluster.fit import fit_distributed

            fitted = fit_distributed(
                stores,
                config,
                distributed,
                out=out,
                fresh=fresh,
                on_progress=on_progress,
                loggers=log,
                cache_gb=cache_gb,
            )
        else:
            fitted = pdiff.fit(stores, config, out=out, fresh=fresh, on_progress=on_progress, loggers=log)
    document = describe.generator(out, fitted)
    if json:
        describe.print_json(document)
        return
    describe.show_generator(document)
    names = fitted.variables.names if fitted.variables else []
    made_for = f" --condition {' '.join(f'{name}=VALUE' for name in names)}" if names else ""
    judged_at = " --conditions held-out" if names else ""
    console.say(
        f"Next: pdiff generate {out}{made_for} --num-members 16 --out members   or   "
        f"pdiff evaluate {out} --task MODULE:FUNCTION{judged_at}"
    )


def tune(
    store: Positional[Annotated[Path, arg(metavar="STORE")]],
    *,
    out: Path,
    task: TaskName | None = None,
    fresh: Fresh = False,
    json: Json = False,
    search: Annotated[TuneConfig, Inline] = TuneConfig(),  # noqa: B008 (frozen)
    config: FitConfig = FitConfig(),  # noqa: B008 (frozen)
) -> None:
    """Search for better settings of a fit, on Ray. Run again after an interruption, it goes on where it was.

    Trials are ranked by the energy distance of samples to held-out snapshots, or with --task by the ensemble's NLL on
    held-out data; lower is better. Searched: latent size, what the denoiser predicts, learning rate, patience and
    temperature. The best fit is left in the run folder as `pdiff fit` would leave it.

    Args:
        store: The snapshot store.
        out: Run folder for generator.safetensors, fit.json and tune.json.
        task: Returns a pdiff_plugin.Task, whose eval_loader judges the trials.
        config: Settings that are not searched, and the first trial.
    """
    from pdiff_plugin.cluster.tune import tune

    score = None
    if task is not None:
        from pdiff_plugin.evaluation.search_score import EnsembleNLL

        score = EnsembleNLL(made_by("--task", task, pdiff.Task), seed=search.seed)
    with console.progress() as on_progress:
        document = tune(store, config, search, out=out, score=score, fresh=fresh, on_progress=on_progress)
    if json:
        describe.print_json(document)
        return
    describe.show_trials(out, document)
    best = document["trials"][0]
    console.say(f"Next: pdiff generate {out} --temperature {best['temperature']} --num-members 16 --out members")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Which members are good enough."""

    keep_above: float | None = None
    """Drop members whose accuracy on the task's evaluation data is below this share; needs --task. Judge what is left
    on other data, for it was chosen on these."""
    task: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """Returns a pdiff_plugin.Task, for --keep-above."""

    def check(self) -> None:
        """Raise :class:`ConfigError` for what cannot work, before anything is made."""
        if self.keep_above is None:
            return
        if self.task is None:
            raise ConfigError(
                "--keep-above", self.keep_above, "must be given together with --task package.module:function"
            )
        if not 0.0 <= self.keep_above <= 1.0:
            raise ConfigError("--keep-above", self.keep_above, "must be a share of right answers, from 0 to 1")

    def keep(self, weights: pdiff.WeightSet) -> Sequence[int]:
        """Places of the members that are good enough."""
        from pdiff_plugin.evaluation.gate import keep_accurate

        try:
            return keep_accurate(made_by("--task", str(self.task), pdiff.Task), weights, self.keep_above or 0.0).indices
        except ConfigError as error:
            if error.field != "threshold":
                raise
            raise ConfigError("--keep-above", self.keep_above, error.expected) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class For:
    """What members are made for."""

    condition: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE")] = ()
    """Of a generator that was fitted on runs with conditions: make members for this condition, as in
    `--condition angle=50 style=ink user=0.5,-1`, or `user=@vector.npy` for a long list. Names left out take the values
    of recorded conditions in turn."""
    conditions: Annotated[Path | None, arg(metavar="FILE")] = None
    """Make members for many conditions: a file with one JSON mapping of names to values a line. Each gets a folder of
    its own, condition-0000 and so on."""

    def folders(self, out: Path) -> list[tuple[Path, dict[str, Any] | None]]:
        """Where members go, and the condition that they are made for."""
        from pdiff_plugin.snapshots.conditions import read_condition_lines, read_pairs

        if self.conditions is None:
            return [(out, read_pairs(self.condition, "--condition") if self.condition else None)]
        if self.condition:
            raise ConfigError("--conditions", str(self.conditions), "must be given without --condition")
        found = read_condition_lines(self.conditions)
        return [(out / f"condition-{number:04d}", condition) for number, condition in enumerate(found)]


def generate(
    generator: FitPath,
    *,
    out: Path,
    num_members: int = 16,
    seed: Seed = 0,
    overwrite: Switch = False,
    json: Json = False,
    made_for: Annotated[For, Inline] = For(),
    sampling: Annotated[SamplingConfig, Inline] = SamplingConfig(),  # noqa: B008 (frozen)
    gate: Annotated[Gate, Inline] = Gate(),
    distributed: Where = DistributedConfig(),  # noqa: B008 (frozen)
) -> None:
    """Sample new weights, one state dict a file, for `model.load_state_dict(..., strict=False)`.

    Args:
        out: Folder for member-0000.safetensors and so on.
        num_members: How many members to make.
        overwrite: Replace members that are in the folder already.
    """
    fitted = _loaded(generator)
    gate.check()
    from pdiff_plugin.generator.members import write_members

    folders = made_for.folders(out)
    for _, condition in folders:  # before anything is written
        fitted.conditions_of_members(1, condition, extrapolate=sampling.extrapolate)
    write = None
    if _runs_on_ray(distributed):
        from pdiff_plugin.cluster.members import write_members_on_workers

        write = partial(write_members_on_workers, generator=fitted.path or generator, distributed=distributed)
    paths: list[Path] = []
    with console.progress() as on_progress:
        for folder, condition in folders:
            paths += write_members(
                fitted,
                folder,
                sampling,
                condition=condition,
                num_members=num_members,
                seed=seed,
                overwrite=overwrite,
                keep=gate.keep if gate.keep_above is not None else None,
                write=write,
                on_progress=on_progress,
            )
    num_dropped = num_members * len(folders) - len(paths)
    if json:
        files = [str(path) for path in paths]
        describe.print_json({"members": files, "num_values": fitted.layout.num_values, "num_dropped": num_dropped})
        return
    if num_dropped:
        console.say(f"{num_dropped} of {num_members * len(folders)} members dropped: accuracy below {gate.keep_above}")
    console.say(f"{len(paths)} members of {fitted.layout.num_values:,} values each in {out}")


def refine(
    generator: FitPath,
    *,
    task: TaskName,
    loss: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None,
    measure: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None,
    out: Path,
    conditions: Path | None = None,
    log: LogTo = (),
    json: Json = False,
    config: Annotated[RefineConfig, Inline] = RefineConfig(),  # noqa: B008 (frozen)
) -> None:
    """Teach a generator by the loss of the task, for which recorded weights alone give no measure.

    Args:
        loss: Takes (model, condition) and returns the loss of one batch of training data there, drawn anew each time;
            unless given, that of the first batch of a new pass over the task's train_loader, which should shuffle.
        measure: As --loss, of data that it does not take; what is kept did best by this.
        out: Folder for the refined generator; interrupted, the same command goes on.
        conditions: File of conditions to learn at, one JSON mapping a line, best many that were never recorded; the
            recorded ones unless given. Those that it will be judged at should not be among them.
    """
    from pdiff_plugin.evaluation.condition_task import task_at
    from pdiff_plugin.evaluation.task_loss import task_loss
    from pdiff_plugin.snapshots.conditions import read_condition_lines

    fitted = _loaded(generator)
    learned_at = read_condition_lines(conditions) if conditions is not None else None
    if fitted.conditions:
        make = function_named("--task", task)
        model = task_at(make, fitted.conditions[0]).model
    else:
        judged = made_by("--task", task, pdiff.Task)
        make, model = lambda: judged, judged.model
    train = task_loss(make) if loss is None else find_function("--loss", loss, "model", "condition")
    chosen_by = None if measure is None else find_function("--measure", measure, "model", "condition")
    with console.progress() as on_progress:
        refined = pdiff.refine(
            fitted,
            model,
            train,
            config,
            conditions=learned_at,
            measure=chosen_by,
            out=out,
            on_progress=on_progress,
            loggers=log,
        )
    report = refined.report["refinement"]
    if json:
        describe.print_json(report)
        return
    describe.show_refinement(report)
    over = " --conditions held-out" if fitted.conditions else ""
    console.say(f"\nJudge it: pdiff evaluate {out} --task {task}{over}")


def sweep(
    generator: FitPath,
    *,
    task: TaskName,
    out: Path,
    store: FitStore = None,
    num_members: int = 32,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw accuracy against novelty over a range of diversities, beside the cheap baselines.

    Args:
        out: Folder for sweep.json and sweep.png.
        num_members: Members of every set.
    """
    from pdiff_plugin.snapshots.files import write_json

    fitted = _loaded(generator)
    judged, snapshots = made_by("--task", task, pdiff.Task), _store_of(fitted, store)
    out.mkdir(parents=True, exist_ok=True)
    with console.progress() as on_progress:
        result = pdiff.sweep(judged, snapshots, fitted, num_members=num_members, seed=seed, on_progress=on_progress)
    write_json(out / "sweep.json", result.to_json())
    try:
        result.save_picture(out / "sweep.png")
    except MissingDependencyError as error:
        console.tell(f"no picture is drawn: {error}")
    if json:
        describe.print_json(result.to_json())
        return
    headers, rows = result.table()
    console.table(f"{judged.name}: accuracy against novelty, {num_members} members each", headers, rows, keys=2)
    console.say(result.sentence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveBest:
    """What is kept of the best choice."""

    save_best: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder for best.safetensors: the best single model that any of the sets gives, or the best ensemble within
    --best-passes. It is chosen on one half of the data, and judged on the other."""
    best_passes: float = 1.0
    """Price of the choice, at most, in forward passes of the model."""
    best_by: Literal["loss", "score"] = "loss"
    """What it is the best in: of classes, `loss` is NLL and `score` accuracy."""

    def check(self) -> None:
        """Raise :class:`ConfigError` for what cannot work, before anything is scored."""
        if not self.best_passes >= 1:
            raise ConfigError("--best-passes", self.best_passes, "must be at least 1, the price of a single model")

    def save(self, result: pdiff.Evaluation) -> str:
        """Write the choice, and say how it is loaded; nothing where that was not asked for."""
        if self.save_best is None:
            return ""
        choice = result.best(self.best_passes, self.best_by)
        path = choice.save(self.save_best)
        return f"\nSaved {choice.text}. Load it with\n  {choice.loading(path)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverConditions:
    """Judging at conditions that were never fitted."""

    conditions: Annotated[tuple[str, ...], arg(metavar="held-out|RUN|NAME=VALUE,VALUE")] = ()
    """Judge at conditions: `held-out` for all that the generator was not fitted on (a quarter of those recorded where
    there are none), runs, or values as angle=45,135; where it was fitted on some of them it is fitted again without.
    The function of --task then takes names of the condition: `def task(angle): ...`."""
    train: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None
    """Trains the recorded layers of a model in place, (model, conditions, num_steps), for a joint model and a few steps
    of training at the condition; with --conditions."""
    extra: Annotated[tuple[str, ...], arg(metavar="NAME=MODULE:FUNCTION")] = ()
    """Further rows: a function of the condition (a dictionary) that returns weights, or a Task whose own model is
    judged as it is; with --conditions."""
    joint_steps: int = EvaluateConditionsConfig.joint_steps
    """Steps of the joint model; 0 makes none."""
    fine_tune_steps: tuple[int, ...] = EvaluateConditionsConfig.fine_tune_steps
    """Steps of training at the condition, from the average, the nearest and the generated weights."""
    train_seconds: float | None = EvaluateConditionsConfig.train_seconds
    """What training at one condition costs, in seconds, for the sentence; with --train it is estimated."""

    def check(self, config: EvaluateConfig, **others: Any) -> None:
        """Raise :class:`ConfigError` for flags that do not go together."""
        if not self.conditions:
            for name in (field.name for field in dataclasses.fields(self)):
                if getattr(self, name) != getattr(OverConditions, name):
                    raise ConfigError(_flag(name), getattr(self, name), "must be given together with --conditions")
            return
        changed = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        changed = {name: value for name, value in changed.items() if value != getattr(EvaluateConfig, name)}
        for name, value in {**changed, **{key: value for key, value in others.items() if value}}.items():
            if name not in ("num_members", "seed"):
                raise ConfigError(_flag(name), value, "does not go with --conditions; leave it out")

    def judge(
        self,
        task: str,
        store: pdiff.SnapshotStore,
        fitted: pdiff.WeightGenerator,
        config: EvaluateConfig,
        **options: Any,
    ) -> pdiff.ConditionEvaluation:
        """Judge over the conditions, with members and seed of ``config``, and ``options`` of the judge."""
        wrong = next((text for text in self.extra if not text.partition("=")[2]), None)
        if wrong is not None:
            raise ConfigError("--extra", wrong, "must be NAME=MODULE:FUNCTION")
        pairs = (text.partition("=") for text in self.extra)
        with console.progress() as on_progress:
            return pdiff.evaluate_conditions(
                function_named("--task", task),
                store,
                fitted,
                conditions=self.conditions,
                train=find_function("--train", self.train, "model", "conditions", "num_steps") if self.train else None,
                extra={name: find_function("--extra", function, "condition") for name, _, function in pairs},
                on_progress=on_progress,
                num_members=config.num_members,
                seed=config.seed,
                joint_steps=self.joint_steps,
                fine_tune_steps=self.fine_tune_steps,
                train_seconds=self.train_seconds,
                **options,
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def evaluate(
    generator: FitPath,
    *,
    task: TaskName,
    store: FitStore = None,
    train_with: Annotated[str | None, arg(metavar="MODULE:FUNCTION")] = None,
    out: Path | None = None,
    log: LogTo = (),
    json: Json = False,
    best: Annotated[SaveBest, Inline] = SaveBest(),
    over: Annotated[OverConditions, Inline] = OverConditions(),
    config: Annotated[FlagCreatePairsOff[EvaluateConfig], Inline] = EvaluateConfig(),  # noqa: B008 (frozen)
    distributed: Where = DistributedConfig(),  # noqa: B008 (frozen)
) -> None:
    """Judge generated members beside the snapshots and the cheap baselines, or with --conditions at conditions that
    were never fitted.

    Args:
        train_with: Takes a seed and returns a trained model; with it a real deep ensemble is trained and judged, too.
        out: Folder for the result, from which `pdiff report` draws; evaluation/ beside the generator unless given (of
            one on the Hub, in this folder).
    """
    if train_with is None and config.num_retrained != EvaluateConfig.num_retrained:
        raise ConfigError(
            "--num-retrained", config.num_retrained, "must be given together with --train-with package.module:function"
        )
    best.check()
    over.check(config, train_with=train_with, save_best=best.save_best)
    fitted = _loaded(generator)
    if over.conditions:
        folder = out or _beside(generator)
        folder.mkdir(parents=True, exist_ok=True)
        snapshots = _store_of(fitted, store)
        with _on_workers(distributed, "judge") as options:
            judged_over = over.judge(task, snapshots, fitted, config, refit_in=folder / "refit", loggers=log, **options)
        _show_over(judged_over, folder, json)
        return
    judged = made_by("--task", task, pdiff.Task)
    train = find_function("--train-with", train_with, "seed") if train_with else None
    snapshots = _store_of(fitted, store)
    # Before the scoring, which may take hours: a folder that cannot be made is told at once.
    folder = out or _beside(generator)
    for made in (folder, best.save_best or folder):
        made.mkdir(parents=True, exist_ok=True)
    with console.progress() as on_progress, _on_workers(distributed, "score") as options:
        result = pdiff.evaluate(
            judged, snapshots, fitted, **vars(config), retrain=train, on_progress=on_progress, loggers=log, **options
        )
    result.save(folder)
    saved = best.save(result)
    if json:
        describe.print_json(result.to_json())
        return
    describe.show_evaluation(result, best.best_passes)
    console.say(saved or "\nTo have it: the same command with --save-best DIR (and --best-passes 8)")
    console.say(f"Pictures: pdiff report {folder}")


def _beside(generator: Path) -> Path:
    """Where the result of an evaluation goes unless told."""
    if hub_address(str(generator)):
        return Path("evaluation")
    return (generator if generator.is_dir() else generator.parent) / "evaluation"


def _show_over(result: pdiff.ConditionEvaluation, folder: Path, json: bool) -> None:
    path = result.save(folder)
    if json:
        describe.print_json(result.to_json())
        return
    describe.show_condition_evaluation(result)
    console.say(f"\nWrote {path}. Pictures: pdiff report {folder}")


def report(evaluation: Positional[Annotated[Path, arg(metavar="EVALUATION")]], *, out: Path | None = None) -> None:
    """Draw a saved evaluation as one self-contained HTML page and PNG pictures; one over conditions as another page.

    Args:
        evaluation: Folder that `pdiff evaluate` or `pdiff demo` wrote.
        out: Folder for report.html and the pictures; that of the evaluation unless given.
    """
    from pdiff_plugin.evaluation.condition_page import write_condition_report
    from pdiff_plugin.evaluation.condition_result import JSON_NAME
    from pdiff_plugin.evaluation.result import JSON_NAME as EVALUATION_NAME

    is_over = evaluation.name == JSON_NAME or (evaluation / JSON_NAME).is_file()
    if is_over:
        folder = out or (evaluation if evaluation.is_dir() else evaluation.parent)
        console.say(f"Wrote {write_condition_report(pdiff.ConditionEvaluation.load(evaluation), folder)}")
    if not is_over or (evaluation / EVALUATION_NAME).is_file():
        console.say(f"Wrote {pdiff.write_report(evaluation, out)}")


def push(
    generator: FitPath,
    repo: Positional[Annotated[str, arg(metavar="user/name")]],
    *,
    revision: str | None = None,
    private: Switch = False,
    base_model: str | None = None,
    evaluation: Path | None = None,
) -> None:
    """Upload a generator to the Hugging Face Hub, with a model card that begins with the verdict of its evaluation.

    Args:
        repo: The repository, made if missing.
        revision: Branch to push to, made if missing; main unless given.
        private: Make the repository a private one.
        base_model: The model whose weights these are, as the Hub names it (timm/resnet18.a1_in1k).
        evaluation: Folder that `pdiff evaluate` wrote; evaluation/ beside the generator, if there is one, unless given.
    """
    fitted = _loaded(generator)
    found = evaluation or _beside(generator)
    judged = _evaluation_in(found) if evaluation is not None or found.is_dir() else None
    if judged is None:
        console.tell(f"no evaluation in {found}: the model card will say that it was not evaluated")
    address = fitted.push_to_hub(
        repo, private=private or None, branch=revision, evaluation=judged, base_model=base_model
    )
    console.say(f"Pushed: {address}")


def _evaluation_in(folder: Path) -> pdiff.Evaluation | pdiff.ConditionEvaluation:
    """The one in a folder; of a generator judged in both ways the one over conditions, which is what it is for."""
    from pdiff_plugin.evaluation.condition_result import JSON_NAME

    kind = pdiff.ConditionEvaluation if (folder / JSON_NAME).is_file() else pdiff.Evaluation
    return kind.load(folder)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "layers": layers,
    "inspect": inspect,
    "condition": condition,
    "import": import_,
    "merge": merge,
    "fit": fit,
    "tune": tune,
    "refine": refine,
    "generate": generate,
    "sweep": sweep,
    "evaluate": evaluate,
    "report": report,
    "push": push,
}
_CONFIGS = (
    *(FitConfig, *AUTOENCODER_CONFIGS.values(), DiffusionConfig, ConditionConfig, TuneConfig, RefineConfig),
    *(SamplingConfig, Gate, SaveBest, OverConditions, EvaluateConfig, DistributedConfig),
)
_PRESETS: dict[str, Callable[[], FitConfig]] = {"default": FitConfig, "paper": FitConfig.paper}


def main(args: list[str] | None = None) -> int:
    """Run `pdiff`; returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if "--version" in args:
        print(pdiff.__version__)
        return 0
    debug = "--debug" in args
    args = _present_spelling([a for a in args if a != "--debug"])
    console.log_to_stderr()
    remove_abandoned()
    if {"-h", "--help"} & set(args[1:]):
        for kind in _CONFIGS:
            _join_help_lines(kind)
    app = tyro.extras.SubcommandApp()
    for name, function in COMMANDS.items():
        app.command(name=name)(_fit_from(args) if function is fit else function)
    try:
        with _terminable():
            app.cli(
                prog="pdiff",
                description=(
                    "Fit a generator to recorded snapshots of a model's layers, sample new weights, judge them.\n\n"
                    "Start with `pdiff demo`. --version and --debug (tracebacks) go with every command."
                ),
                args=args,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left. Python would complain once more on flushing stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PDiffError, OSError) as error:
        # An OSError is a file where a folder should be, or a full disk: the system's words name the path.
        if debug:
            console.err.print_exception()
        told = storage_error(error, error.filename or "A file") if isinstance(error, OSError) else None
        console.error(told or error)
        return 1
    except Terminated:
        console.tell("Told to end (SIGTERM). What was finished is kept; run the same command again to go on.")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        console.tell("Interrupted. What was finished is kept; run the same command again to go on.")
        return 130
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C, which leaves what the same command can go on from, unless somebody else handles it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fit_from(args: list[str]) -> Callable[..., None]:
    """The command `fit` whose settings start from the preset and the autoencoder that ``args`` ask for.

    These decide which flags there are and their defaults, so they are looked for before the parser is built.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--autoencoder", nargs="?")
    given, _ = parser.parse_known_args(args)
    config = _PRESETS.get(given.preset, FitConfig)()  # a name that is none is refused by the parser
    kind = AUTOENCODER_CONFIGS.get(given.autoencoder, type(config.autoencoder))
    if kind is not type(config.autoencoder):
        config = dataclasses.replace(config, autoencoder=kind())
    return partial(fit, config=config, autoencoder=config.autoencoder.kind)


def _present_spelling(args: list[str]) -> list[str]:
    """``args`` in the present spelling; one that will be removed is told on stderr."""
    if args[:1] == ["generate"] and "--sweep" in args:
        console.tell("DeprecationWarning: `pdiff generate --sweep` will be removed; use `pdiff sweep`.")
        kept = [a for a in args[1:] if a not in ("--sweep", "--overwrite")]
        is_counted = any(a.startswith(("--num-members", "--num_members")) for a in kept)
        return ["sweep", *kept, *([] if is_counted else ["--num-members", "16"])]
    if args[:1] == ["fit"]:  # short for the flags of a config in the config
        short = {"--condition": "--condition.kinds", "--hold-out": "--condition.hold-out"}
        return [short.get(a, a) for a in args]
    if args[:1] == ["evaluate"] and any(a.partition("=")[0] == "--retrain" for a in args):
        console.tell("DeprecationWarning: `pdiff evaluate --retrain` will be removed; use --num-retrained.")
        return [a.replace("--retrain", "--num-retrained") if a.startswith("--retrain") else a for a in args]
    return args


def _conditions_of(table: Path | None, columns: Sequence[str], patterns: Sequence[str]) -> Any:
    """What `import_checkpoints` takes as ``conditions``, from the flags of `import`."""
    if columns and table is None:
        raise ConfigError("--columns", " ".join(columns), "must be given together with --conditions TABLE")
    if table is not None and patterns:
        raise ConfigError("--condition", patterns[0], "must be left out with --conditions: one of them names them all")
    if table is None and not patterns:
        return None
    from pdiff_plugin.recording.runs import conditions_in_names, read_table

    return conditions_in_names(patterns) if table is None else read_table(table, columns)


def _join_help_lines(kind: type[Any]) -> None:
    """Let the field docstrings of ``kind`` flow: in those of several lines tyro keeps the line breaks of the source."""
    texts = {p.arg_name: p.description for p in docstring_parser.parse_from_object(kind).params}
    for field in dataclasses.fields(kind):
        if text := texts.get(field.name):
            field.metadata = MappingProxyType({"help": " ".join(text.split())})


def _runs_on_ray(distributed: DistributedConfig) -> bool:
    return distributed.num_workers > 1 or bool(distributed.address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def _on_workers(distributed: DistributedConfig, option: Literal["score", "judge"]) -> Iterator[dict[str, Any]]:
    """The option of an evaluation that shares out its work, where that was asked for."""
    if not _runs_on_ray(distributed):
        yield {}
        return
    from pdiff_plugin.cluster.connection import connected, wait_for_room
    from pdiff_plugin.cluster.scores import ClusterJudge, ClusterScorer

    makers = {"score": ClusterScorer, "judge": ClusterJudge}
    with connected(distributed.address):
        wait_for_room(distributed)
        yield {option: makers[option](distributed)}


def _loaded(generator: Path) -> pdiff.WeightGenerator:
    """The generator on disk, or on the Hub."""
    if (address := hub_address(str(generator))) is None:
        return pdiff.WeightGenerator.load(generator)
    return pdiff.WeightGenerator.from_pretrained(address[0], revision=address[1])


def _store_of(fitted: pdiff.WeightGenerator, given: Path | None) -> pdiff.SnapshotStore:
    """The store that was given, else the one that the generator was fitted on."""
    recorded: str = fitted.provenance["store"]
    try:
        return pdiff.SnapshotStore.open(given or recorded)
    except StoreNotFoundError as error:
        if given is not None:
            raise
        raise StoreNotFoundError(recorded, "the fit names it, but it is not there; pass --store") from error


if __name__ == "__main__":
    sys.exit(main())
