"""The `pdiff` command: one function per subcommand, whose signature is its flags and whose docstring is its help.

Exit codes: 0 done, 1 an error that names the next move, 2 wrong usage, 130 interrupted (run again to go on).
Nothing heavy is imported before a subcommand runs, so that ``pdiff --help`` is quick.
"""

from __future__ import annotations

import dataclasses
import json as _json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from pdiff_plugin._version import __version__
from pdiff_plugin.config import DistributedConfig, FitConfig, Sampler, TuneConfig
from pdiff_plugin.errors import ConfigError, MissingDependencyError, PDiffError
from pdiff_plugin.user_code import find_function, load_model, made_by

if TYPE_CHECKING:
    from torch import Tensor

    from pdiff_plugin.generator.generator import WeightGenerator
    from pdiff_plugin.generator.members import LatentWriter
    from pdiff_plugin.generator.weights import WeightSet
    from pdiff_plugin.progress import OnProgress
    from pdiff_plugin.snapshots.store import SnapshotStore

_LAYERS = "last-norms:2"
_Inline = arg(name="")  # a config's fields become flags without its own name in front


def demo(
    *,
    out: Path = Path("pdiff-demo"),
    seed: int = 0,
    num_threads: int | None = None,
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Run the whole path on scikit-learn's digits: train with PDiffRecorder, fit, generate, swap, judge.

    Args:
        out: Folder for the store, the generator and the result.
        seed: Seed of every draw.
        num_threads: CPU threads; PyTorch's choice unless given. Figures repeat exactly for one choice on one machine.
        fresh: Replace what an earlier demo left in the folder.
        json: Print the result as one JSON document on stdout.
    """
    from pdiff_plugin import console
    from pdiff_plugin import demo as module
    from pdiff_plugin.evaluation.page import write_report

    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
    console.tell("Training a small network on 150 images of digits; PDiffRecorder records its last two BatchNorms.")
    with console.progress() as on_progress:
        result = module.run(out, seed=seed, fresh=fresh, on_progress=on_progress)
    try:
        page = f"open {write_report(out / 'evaluation')}"
    except MissingDependencyError as error:
        page = f"pdiff report {out}/evaluation   # {error}"
    if json:
        _print_json(result.to_json())
        return
    _show_evaluation(result)
    console.say(
        f"\nEverything is in {out}/. Try next:\n"
        f"  pdiff inspect {out}/store\n"
        f"  pdiff inspect {out}/fit\n"
        f"  pdiff generate {out}/fit --num-members 8 --out {out}/members\n"
        f"  cd {out} && pdiff evaluate fit --task task:task --num-members 64\n"
        f"  {page}"
    )


def layers(model: Positional[str], *, layers: str = _LAYERS, json: bool = False) -> None:
    """Show what would be recorded of a model.

    Args:
        model: `timm:NAME`, or `package.module:function` returning a torch.nn.Module.
        layers: Selection, as for PDiffRecorder: last-norms:N, norms, head, lora, all, or a glob of module names.
        json: Print one JSON document on stdout.
    """
    from pdiff_plugin import console
    from pdiff_plugin.recording.selection import select

    network = load_model(model)
    selection = select(network, layers)
    layout = selection.layout
    total = sum(p.numel() for p in network.parameters())
    if json:
        _print_json(
            {
                "model": model,
                "layers": layers,
                "tensors": layout.to_json(),
                "num_values": layout.num_values,
                "num_model_parameters": total,
                "frozen": list(selection.frozen),
            }
        )
        return
    rows = [[s.name, s.kind, s.dtype, " x ".join(map(str, s.shape)), f"{s.numel:,}"] for s in layout]
    share = sum(s.numel for s in layout if s.kind == "parameter") / max(total, 1)
    note = (
        f"{layout.num_values:,} values in {len(layout.tensors)} tensors; {share:.3%} of the model's {total:,} "
        f"parameters. 300 snapshots take {300 * 4 * layout.num_values / 2**20:,.1f} MiB."
    )
    if selection.frozen:
        note += f"\nLeft out because frozen: {', '.join(selection.frozen)}."
    console.table(f"{model}, layers={layers}", ["tensor", "kind", "dtype", "shape", "values"], rows, note=note)


def inspect(path: Positional[Path], *, json: bool = False) -> None:
    """Show what is in a snapshot store, or in a fitted generator.

    Args:
        path: A store, a generator file or the folder of a fit.
        json: Print one JSON document on stdout.
    """
    from pdiff_plugin.generator.generator_file import FILE_NAME

    is_generator = path.suffix == ".safetensors" or (path / FILE_NAME).is_file()
    document = _describe_generator(path) if is_generator else _describe_store(path)
    if json:
        _print_json(document)
        return
    from pdiff_plugin import console

    if is_generator:
        report = document["report"]
        rows = [[name, _text(value)] for name, value in report.items()]
        console.table(f"generator {path}", ["measured by the fit", ""], rows, numeric=False)
        console.say(_describe_layout(document))
        return
    rows = [
        [t["id"], str(t["snapshots"]), f"{t['first_step']}..{t['last_step']}", t["base"], t["rest_drift"]]
        for t in document["trajectories"]
    ]
    headers = ["trajectory", "snapshots", "steps", "base", "drift of the rest"]
    console.table(
        f"store {path}: {document['num_snapshots']} snapshots", headers, rows, note=_describe_layout(document)
    )
    for problem in document["problems"]:
        console.say(f"! {problem}")


def import_(
    paths: Positional[tuple[Path, ...]],
    *,
    store: Path,
    layers: str = _LAYERS,
    model: str | None = None,
    ema: bool = False,
    trajectory: str | None = None,
    json: bool = False,
) -> None:
    """Make a snapshot store from checkpoints that a run has left behind, one snapshot each.

    Args:
        paths: .pt, .pth, .ckpt or .safetensors files, checkpoint-* folders, or a folder of these, all of one run.
        store: The store to add to.
        layers: Selection, as for PDiffRecorder; a store that holds snapshots keeps to the tensors that it has.
        model: `timm:NAME` or `package.module:function`, where names and shapes alone do not tell the layers.
        ema: Take the averaged weights that timm and others keep beside the trained ones.
        trajectory: Name of the run in the store; the next free one unless given.
        json: Print what the store holds as one JSON document on stdout.
    """
    from pdiff_plugin import console
    from pdiff_plugin.recording.checkpoints import import_checkpoints

    network = None if model is None else load_model(model)
    if layers != _LAYERS and (store / "layout.json").is_file():
        console.tell(f"{store} holds snapshots already: the same tensors are taken, whatever --layers {layers} says.")
    import_checkpoints(paths, store=store, layers=layers, model=network, ema=ema, trajectory=trajectory)
    inspect(store, json=json)


def fit(
    store: Positional[str],
    *,
    out: str,
    fresh: bool = False,
    json: bool = False,
    preset: Literal["default", "paper"] = "default",
    config: Annotated[FitConfig, _Inline] = FitConfig(),  # noqa: B008 (frozen)
    distributed: Annotated[DistributedConfig, _Inline] = DistributedConfig(),  # noqa: B008 (frozen)
) -> None:
    """Learn a generator from the snapshots of a store. Run again after an interruption, it goes on where it was.

    Args:
        store: The snapshot store; a URL such as s3://bucket/runs/a is read through Ray.
        out: Run folder for generator.safetensors and fit.json; may be a URL too.
        fresh: Start anew and replace the fit in the run folder.
        json: Print what the fit measured as one JSON document on stdout.
        preset: `paper` is the published configuration of p-diff; with it only --seed, --device and --memory-gb apply.
        config: Settings of the fit.
        distributed: Where it runs.
    """
    from pdiff_plugin import console
    from pdiff_plugin.snapshots.remote import is_remote

    if preset == "paper":
        if config != FitConfig(seed=config.seed, device=config.device, memory_gb=config.memory_gb):
            raise ConfigError(
                "--preset", preset, "cannot be combined with other settings; in Python, change FitConfig.paper()"
            )
        published = FitConfig.paper(seed=config.seed, device=config.device)
        config = dataclasses.replace(published, memory_gb=config.memory_gb)
    with console.progress() as on_progress:
        if _runs_on_ray(distributed) or is_remote(store) or is_remote(out):
            from pdiff_plugin.cluster.fit import fit_distributed

            generator = fit_distributed(store, config, distributed, out=out, fresh=fresh, on_progress=on_progress)
        else:
            from pdiff_plugin.fitting.fit import fit as run

            generator = run(store, config, out=out, fresh=fresh, on_progress=on_progress)
    if json:
        _print_json(_describe_fitted(out, generator))
        return
    report = generator.report
    rows = [[name, _text(value)] for name, value in report.items()]
    console.table(f"fitted {out}", ["measured", ""], rows, numeric=False)
    console.say(
        f"Next: pdiff generate {out} --num-members 16 --out members   or   pdiff evaluate {out} --task MODULE:FUNCTION"
    )


def tune(
    store: Positional[Path],
    *,
    out: Path,
    task: str | None = None,
    fresh: bool = False,
    json: bool = False,
    search: Annotated[TuneConfig, _Inline] = TuneConfig(),  # noqa: B008 (frozen)
    config: FitConfig = FitConfig(),  # noqa: B008 (frozen)
) -> None:
    """Search for better settings of a fit, on Ray. Run again after an interruption, it goes on where it was.

    Trials are ranked by the energy distance of samples to held-out snapshots, or with --task by the ensemble's NLL on
    held-out data; lower is better. Searched: latent size, what the denoiser predicts, learning rate, patience and
    temperature. The best fit is left in the run folder as `pdiff fit` would leave it.

    Args:
        store: The snapshot store.
        out: Run folder for generator.safetensors, fit.json and tune.json.
        task: `package.module:function` returning a pdiff_plugin.Task, whose eval_loader judges the trials.
        fresh: Start anew and replace the search in the run folder.
        json: Print all trials as one JSON document on stdout.
        search: What is tried and where.
        config: Settings that are not searched, and the first trial.
    """
    from pdiff_plugin import console
    from pdiff_plugin.cluster.tune import tune as run

    score = None
    if task is not None:
        from pdiff_plugin.evaluation.search_score import EnsembleNLL
        from pdiff_plugin.evaluation.task import Task

        score = EnsembleNLL(made_by("--task", task, Task), seed=search.seed)
    with console.progress() as on_progress:
        document = run(store, config, search, out=out, score=score, fresh=fresh, on_progress=on_progress)
    if json:
        _print_json(document)
        return
    columns = ["score", "latent_dim", "prediction_type", "lr", "patience", "temperature", "max_steps", "copy_ratio"]
    rows = [
        ["default" if trial["is_default"] else str(number), *(_text(trial[column]) for column in columns)]
        for number, trial in enumerate(document["trials"], start=1)
    ]
    console.table(f"tuned {out}", ["trial", *columns], rows, note=f"score: {document['score']}; lower is better")
    best = document["trials"][0]
    console.say(f"Next: pdiff generate {out} --temperature {best['temperature']} --num-members 16 --out members")


def generate(
    generator: Positional[Path],
    *,
    out: Path,
    num_members: int = 16,
    seed: int = 0,
    num_sampling_steps: int | None = None,
    temperature: float = 1.0,
    diversity: float = 1.0,
    sampler: Sampler | None = None,
    trajectory: str | None = None,
    keep_above: float | None = None,
    sweep: bool = False,
    task: str | None = None,
    store: Path | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
    address: str | None = None,
    json: bool = False,
) -> None:
    """Sample new weights: one safetensors state dict per member, for `model.load_state_dict(..., strict=False)`.

    Args:
        generator: Folder of a fit, or its generator.safetensors.
        out: Folder for member-0000.safetensors and so on.
        num_members: How many members to make.
        seed: Seed of the draw.
        num_sampling_steps: Steps from noise to latents; the sampler's usual number unless given.
        temperature: Factor on the initial noise; below 1 members move toward the centre of the snapshots.
        diversity: Spread of the members over that of the snapshots, in (0, 2], by the curve that the fit measured.
        sampler: The one that fits the generator unless given.
        trajectory: Make members of this run only.
        keep_above: Drop members whose accuracy on the task's evaluation data is below this share; needs --task. Judge
            what is left on other data, for it was chosen on these.
        sweep: Make no members, but a table and a picture (sweep.json, sweep.png) of accuracy against novelty over a
            range of diversities, beside those of the cheap alternatives; needs --task, and takes only --num-members,
            --seed and --store besides.
        task: `package.module:function` returning a pdiff_plugin.Task, for --keep-above and --sweep.
        store: The snapshot store for --sweep; the one the generator was fitted on unless given.
        overwrite: Replace members that are in the folder already.
        num_workers: Processes that share the work; with more than one, or an address, it runs on Ray.
        address: host:port of a running Ray cluster; RAY_ADDRESS unless given.
        json: Print the list of files as one JSON document on stdout.
    """
    from pdiff_plugin import console
    from pdiff_plugin.generator.generator import WeightGenerator
    from pdiff_plugin.generator.members import write_members

    fitted = WeightGenerator.load(generator)
    for flag, given in (("--keep-above", keep_above), ("--sweep", sweep or None)):
        if given is not None and task is None:
            raise ConfigError(flag, given, "must be given together with --task package.module:function")
    if sweep:
        _refuse_beside_sweep(
            num_sampling_steps=num_sampling_steps,
            temperature=temperature,
            diversity=diversity,
            sampler=sampler,
            trajectory=trajectory,
            keep_above=keep_above,
            num_workers=num_workers,
            address=address,
        )
        _sweep(fitted, str(task), store, out, num_members, seed, json)
        return
    if store is not None:
        raise ConfigError("--store", str(store), "must be given together with --sweep; members need no store")
    if keep_above is not None and not 0.0 <= keep_above <= 1.0:
        raise ConfigError("--keep-above", keep_above, "must be a share of right answers, from 0 to 1")
    keep: Callable[[WeightSet], Sequence[int]] | None = None
    if keep_above is not None:
        from pdiff_plugin.evaluation.gate import keep_accurate
        from pdiff_plugin.evaluation.task import Task

        judge, threshold = made_by("--task", str(task), Task), keep_above

        def keep(weights: WeightSet) -> Sequence[int]:
            try:
                return keep_accurate(judge, weights, threshold).indices
            except ConfigError as error:
                if error.field != "threshold":
                    raise
                raise ConfigError("--keep-above", threshold, error.expected) from error

    write: LatentWriter | None = None
    distributed = DistributedConfig(num_workers=num_workers, address=address)
    if _runs_on_ray(distributed):
        from pdiff_plugin.cluster.members import write_members_on_workers

        def write(
            latents: Tensor, folder: Path, header: Mapping[str, str], on_progress: OnProgress | None
        ) -> list[Path]:
            return write_members_on_workers(generator, latents, folder, header, distributed, on_progress)

    with console.progress() as on_progress:
        paths = write_members(
            fitted,
            out,
            num_members=num_members,
            seed=seed,
            overwrite=overwrite,
            keep=keep,
            write=write,
            on_progress=on_progress,
            num_sampling_steps=num_sampling_steps,
            temperature=temperature,
            diversity=diversity,
            sampler=sampler,
            trajectory=trajectory,
        )
    num_dropped = num_members - len(paths)
    files = [str(path) for path in paths]
    if json:
        _print_json({"members": files, "num_values": fitted.layout.num_values, "num_dropped": num_dropped})
    else:
        if num_dropped:
            console.say(f"{num_dropped} of {num_members} members dropped: accuracy below {keep_above}")
        console.say(f"{len(files)} members of {fitted.layout.num_values:,} values each in {out}")


def _refuse_beside_sweep(**given: Any) -> None:
    for name, value in given.items():
        if value != signature(generate).parameters[name].default:
            raise ConfigError(
                f"--{name.replace('_', '-')}", value, "cannot be combined with --sweep, which chooses its own settings"
            )


def _sweep(
    fitted: WeightGenerator, task: str, store: Path | None, out: Path, num_members: int, seed: int, json: bool
) -> None:
    from pdiff_plugin import console
    from pdiff_plugin.evaluation.sweep import sweep
    from pdiff_plugin.evaluation.task import Task
    from pdiff_plugin.snapshots.files import write_json

    made, snapshots = made_by("--task", task, Task), _store_of(fitted.provenance["store"], store)
    out.mkdir(parents=True, exist_ok=True)
    with console.progress() as on_progress:
        found = sweep(made, snapshots, fitted, num_members=num_members, seed=seed, on_progress=on_progress)
    write_json(out / "sweep.json", found.to_json())
    try:
        found.save_picture(out / "sweep.png")
    except MissingDependencyError as error:
        console.tell(f"no picture is drawn: {error}")
    if json:
        _print_json(found.to_json())
        return
    console.table(f"{made.name}: accuracy against novelty, {num_members} members each", *found.table(), keys=2)
    console.say(found.sentence)


def evaluate(
    generator: Positional[Path],
    *,
    task: str,
    store: Path | None = None,
    num_members: int = 32,
    num_draws: int = 1,
    sets: Literal["all", "core"] = "all",
    retrain: int = 0,
    train_with: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    num_workers: int = 1,
    address: str | None = None,
    json: bool = False,
) -> None:
    """Judge generated members beside the snapshots and the cheap alternatives.

    Args:
        generator: Folder of a fit, or its generator.safetensors.
        task: `package.module:function` returning a pdiff_plugin.Task; modules are also looked for in this folder.
        store: The snapshot store; the one the generator was fitted on unless given.
        num_members: Members of every set.
        num_draws: Times that random sets are drawn, for errors that know the spread between draws.
        sets: `core` judges fewer alternatives.
        retrain: Also train this many models anew, for a real deep ensemble; needs --train-with.
        train_with: `package.module:function` that takes a seed and returns a trained model.
        seed: Seed of every draw.
        out: Folder for the result, from which `pdiff report` draws; evaluation/ beside the generator unless given.
        num_workers: Processes that share the work; with more than one, or an address, it runs on Ray.
        address: host:port of a running Ray cluster; RAY_ADDRESS unless given.
        json: Print the result as one JSON document on stdout.
    """
    from pdiff_plugin import console
    from pdiff_plugin.evaluation.evaluate import evaluate as run
    from pdiff_plugin.evaluation.task import Task
    from pdiff_plugin.generator.generator import WeightGenerator

    if bool(retrain) != bool(train_with):
        raise ConfigError("--retrain", retrain, "must be given together with --train-with package.module:function")
    fitted = WeightGenerator.load(generator)
    made = made_by("--task", task, Task)
    train = find_function("--train-with", train_with, "seed") if train_with else None
    snapshots = _store_of(fitted.provenance["store"], store)
    # Before the scoring, which may take hours: a folder that cannot be made is told at once.
    folder = out or (generator if generator.is_dir() else generator.parent) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    distributed = DistributedConfig(num_workers=num_workers, address=address)
    with console.progress() as on_progress, _scorer(distributed) as options:
        result = run(
            made,
            snapshots,
            fitted,
            num_members=num_members,
            seed=seed,
            sets=sets,
            num_draws=num_draws,
            retrain=train,
            num_retrained=retrain or 1,
            on_progress=on_progress,
            **options,
        )
    result.save(folder)
    if json:
        _print_json(result.to_json())
    else:
        _show_evaluation(result)
        console.say(f"\nPictures: pdiff report {folder}")


def report(evaluation: Positional[Path], *, out: Path | None = None) -> None:
    """Draw a saved evaluation as one self-contained HTML page and PNG pictures.

    Args:
        evaluation: Folder that `pdiff evaluate` or `pdiff demo` wrote.
        out: Folder for report.html and the pictures; that of the evaluation unless given.
    """
    from pdiff_plugin import console
    from pdiff_plugin.evaluation.page import write_report

    console.say(f"Wrote {write_report(evaluation, out)}")


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "layers": layers,
    "inspect": inspect,
    "import": import_,
    "fit": fit,
    "tune": tune,
    "generate": generate,
    "evaluate": evaluate,
    "report": report,
}


def main(args: list[str] | None = None) -> int:
    """Run `pdiff`; returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if "--version" in args:
        print(__version__)
        return 0
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    from pdiff_plugin import console

    console.log_to_stderr()
    app = tyro.extras.SubcommandApp()
    for name, function in COMMANDS.items():
        app.command(name=name)(function)
    try:
        app.cli(
            prog="pdiff",
            description=(
                "Neural Network Diffusion as a plug-in: fit a generator to recorded snapshots of chosen layers, sample "
                "new weights, and find out whether that was worth it. Start with `pdiff demo`. "
                "--version and --debug (tracebacks) go with every command."
            ),
            args=args,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
        )
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left. Python would complain once more on flushing stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (PDiffError, OSError) as error:
        # An OSError is a file where a folder should be, or a full disk: the system's words name the path.
        if debug:
            console.err.print_exception()
        console.error(error)
        return 1
    except KeyboardInterrupt:
        console.tell("Interrupted. What was finished is kept; run the same command again to go on.")
        return 130
    return 0


def _runs_on_ray(distributed: DistributedConfig) -> bool:
    return distributed.num_workers > 1 or bool(distributed.address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def _scorer(distributed: DistributedConfig) -> Iterator[dict[str, Any]]:
    """Options of `evaluate` that share out its work, where that was asked for."""
    if not _runs_on_ray(distributed):
        yield {}
        return
    from pdiff_plugin.cluster.connection import connected, wait_for_room
    from pdiff_plugin.cluster.scores import ClusterScorer

    with connected(distributed.address):
        wait_for_room(distributed)
        yield {"score": ClusterScorer(distributed)}


def _store_of(recorded: str, given: Path | None) -> SnapshotStore:
    from pdiff_plugin.errors import StoreNotFoundError
    from pdiff_plugin.snapshots.store import SnapshotStore

    try:
        return SnapshotStore.open(given or recorded)
    except StoreNotFoundError as error:
        if given is not None:
            raise
        raise StoreNotFoundError(recorded, "the fit names it, but it is not there; pass --store") from error


def _describe_store(path: Path) -> dict[str, Any]:
    from pdiff_plugin.snapshots.store import SnapshotStore

    store = SnapshotStore.open(path)
    trajectories = []
    for number, name in enumerate(store.trajectories):
        steps = store.steps[store.trajectory_index == number]
        header = store.base_header(name)
        drift = header.get("rest_drift")
        trajectories.append(
            {
                "id": name,
                "snapshots": len(steps),
                "first_step": int(steps[0]),
                "last_step": int(steps[-1]),
                "base": "yes" if header else "no",
                "rest_drift": f"{float(drift):.2%}" if drift else "-",
            }
        )
    return {
        "store": str(path),
        "num_snapshots": len(store),
        "num_values": store.layout.num_values,
        "row_dtype": str(store.row_dtype).removeprefix("torch."),
        "tensors": store.layout.to_json(),
        "trajectories": trajectories,
        "problems": store.problems,
    }


def _describe_generator(path: Path) -> dict[str, Any]:
    from pdiff_plugin.generator.generator import WeightGenerator

    return _describe_fitted(str(path), WeightGenerator.load(path))


def _describe_fitted(path: str, fitted: WeightGenerator) -> dict[str, Any]:
    return {
        "generator": path,
        "num_values": fitted.layout.num_values,
        "tensors": fitted.layout.to_json(),
        "trajectories": fitted.trajectories,
        "config": fitted.config.to_json(),
        "report": fitted.report,
        "provenance": fitted.provenance,
    }


def _describe_layout(document: dict[str, Any]) -> str:
    tensors = document["tensors"]
    names = ", ".join(t["name"] for t in tensors[:6]) + (", ..." if len(tensors) > 6 else "")
    return f"{document['num_values']:,} values in {len(tensors)} tensors: {names}"


def _show_evaluation(result: Any) -> None:
    from pdiff_plugin import console
    from pdiff_plugin.evaluation.evaluate import FOOTNOTE

    title = f"{result.details['task']}: {result.details['num_items']} items"
    console.table(title, *result.table(), note=FOOTNOTE, lead=("acc mean", "ens NLL", "IoU"))
    console.say(f"\n{result.verdict.sentence}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_text(v) for v in value)
    return str(value)


def _print_json(document: Any) -> None:
    print(_json.dumps(document, indent=2))


if __name__ == "__main__":
    sys.exit(main())
