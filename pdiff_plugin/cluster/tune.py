"""Searching for better settings of a fit: flat trials on Ray Tune, bad ones stopped early.

    OUT/generator.safetensors, fit.json    the best fit, as `pdiff fit` would have written it
    OUT/tune.json                          every trial: settings, score, what its fit measured
    OUT/search/                            while running: Tune's own state and the trials' fits; gone afterwards

The default settings are one of the trials, so that the best is never worse than they by its own score.

The score of a generator, lower is better, is the energy distance between its samples and the held-out snapshots, over
the mean distance between held-out snapshots:  (2 E|x - y| - E|x - x'| - E|y - y'|) / E|y - y'|, for samples x and
held-out snapshots y as standardised weights. It is 0 for samples of the snapshots' own distribution, and rises with a
wrong centre, with too little and with too much spread (Székely & Rizzo 2013). It does not see copying: that has a
column of its own.

Shapes: M samples, H held-out snapshots, D values in a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from ray.tune import Callback
from torch import Tensor

from pdiff_plugin.cluster.connection import check_shared, connected, wait_for_room
from pdiff_plugin.config import DistributedConfig, FitConfig, TuneConfig
from pdiff_plugin.errors import ConfigError, FitExistsError, PDiffError, WorkersFailedError
from pdiff_plugin.fitting.fit import fit
from pdiff_plugin.fitting.runtime import CHECKPOINT_SUFFIX, Runtime
from pdiff_plugin.fitting.statistics_stage import measure_store, part_to_fit, variables_of
from pdiff_plugin.generator.alignment import reader
from pdiff_plugin.generator.generator import WeightGenerator
from pdiff_plugin.generator.generator_file import FILE_NAME
from pdiff_plugin.progress import OnProgress, Progress
from pdiff_plugin.snapshots.files import is_number, parse_json, read_json, reading, write_json
from pdiff_plugin.snapshots.fingerprint import fingerprint, fingerprint_of_first_columns
from pdiff_plugin.snapshots.shards import layout_files
from pdiff_plugin.snapshots.statistics import transform
from pdiff_plugin.snapshots.store import SnapshotStore

logger = logging.getLogger(__name__)

FORMAT = "pdiff-tune"
FORMAT_VERSION = 1
# A generator and the temperature to sample it at -> a number, lower is better.
Score = Callable[[WeightGenerator, float], float]

_NUM_SAMPLES = 64
# A trial is fitted with a ninth of the steps, a third and all of them; ASHA stops two thirds of the trials at each.
_RUNGS = (9, 3, 1)
_TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: not a line of Tune's own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
}


@dataclass(frozen=True)
class Searched:
    """One setting that is searched.

    Attributes:
        part: of a :class:`FitConfig` where it is; that of sampling is in none.
        choices: what is tried.
        factor: without choices, tried is anything between the base's value over and times this, by its logarithm.
    """

    part: Literal["autoencoder", "diffusion", "sampling"]
    choices: tuple[Any, ...] = ()
    factor: float = 1.0

    def value(self, name: str, config: FitConfig) -> Any:
        """What ``config`` has; samples are judged at their natural temperature."""
        return 1.0 if self.part == "sampling" else getattr(getattr(config, self.part), name)


SPACE = {
    "latent_dim": Searched("autoencoder", (16, 32, 64, 128)),
    "prediction_type": Searched("diffusion", ("flow", "v_prediction", "epsilon")),
    "lr": Searched("diffusion", factor=4.0),
    "patience": Searched("diffusion", (2, 5, 10)),
    "temperature": Searched("sampling", (0.8, 0.9, 1.0, 1.1)),
}


def tune(
    store: SnapshotStore | str | os.PathLike[str],
    base: FitConfig | None = None,
    search: TuneConfig | None = None,
    *,
    out: str | os.PathLike[str],
    score: Score | None = None,
    fresh: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Try settings around ``base`` and keep the fit of the best. The same call goes on where one was interrupted.

    Args:
        store: a snapshot store or its folder, on storage that every node sees.
        base: settings that are not searched for, and the first trial.
        search: what is searched and where it runs.
        out: run folder, on storage that every node sees.
        score: judges a generator; the weight-space score of :class:`HeldoutScore` unless given, or
            :class:`ConditionScore` of a store with conditions.
        fresh: start anew.
        on_progress: told the number of trials that have ended.

    Returns:
        The document of ``tune.json``; ``trials`` is ordered by score.

    Raises:
        FitExistsError: ``out`` holds a search of other settings or other snapshots, or a fit.
        WorkersFailedError: no trial succeeded.
    """
    base, search = base or FitConfig(), search or TuneConfig()
    store = store if isinstance(store, SnapshotStore) else SnapshotStore.open(store)
    store = part_to_fit(store, base)
    base = base.settled(store.layout.num_values)
    folder = Path(out).resolve()
    document = _open(store, base, search, folder, score, fresh=fresh)
    if document["status"] == "finished":
        return document
    work = folder / "search"
    work.mkdir(parents=True, exist_ok=True)
    distributed = DistributedConfig(
        address=search.address, cpus_per_worker=search.cpus_per_trial, gpus_per_worker=search.gpus_per_trial
    )
    path = store.path.resolve()
    # Once for all trials: their fits go on from here.
    split, _, _ = measure_store(store, base, Runtime(work, on_progress))
    if score is None:
        score = ConditionScore() if split.is_pooled else HeldoutScore(path, split.rows[split.heldout], base)
    with _environment(_TUNE_SETTINGS), connected(search.address):
        wait_for_room(distributed)
        check_shared([*layout_files(path), folder / "tune.json"])
        trials = _search(path, base, search, work, score, on_progress)
    if not trials:
        raise WorkersFailedError("the search", "no trial succeeded", "See the warnings above; --fresh starts anew.")
    trials.sort(key=lambda trial: trial["score"])
    best = Path(trials[0]["folder"])
    for name in (FILE_NAME, "fit.json"):
        os.replace(best / name, folder / name)
    document |= {
        "status": "finished",
        "trials": [{k: v for k, v in trial.items() if k != "folder"} for trial in trials],
    }
    write_json(folder / "tune.json", document)
    shutil.rmtree(work)
    return document


def _open(
    store: SnapshotStore, base: FitConfig, search: TuneConfig, folder: Path, score: Score | None, *, fresh: bool
) -> dict[str, Any]:
    """The document of ``tune.json``, checked or new."""
    where = ("address", "cpus_per_trial", "gpus_per_trial", "num_concurrent", "max_failures")
    settings = {key: value for key, value in dataclasses.asdict(search).items() if key not in where}
    mine: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "status": "running",
        "store": str(store.path.resolve()),
        "snapshots": fingerprint_of_first_columns(store),
        "fingerprint": fingerprint(store),
        "config": base.to_json(),
        "search": settings,
        "score": str(score) if score is not None else _own_score(store, base),
        "trials": [],
    }
    mine = json.loads(json.dumps(mine))  # as it will be read again: with lists for tuples
    path = folder / "tune.json"
    if path.exists() and not fresh:
        found = _read(path)
        found.setdefault("fingerprint", mine["fingerprint"])  # which searches of old do not have
        for key in ("store", "snapshots", "fingerprint", "config", "search", "score"):
            if found.get(key) != mine[key]:
                what = "on other snapshots" if key in ("snapshots", "fingerprint") else f"with another {key}"
                raise FitExistsError(str(folder), f"a search {what}")
        return found
    if (folder / "fit.json").exists() and not fresh:
        raise FitExistsError(str(folder), "of `pdiff fit`")
    if fresh:
        shutil.rmtree(folder / "search", ignore_errors=True)
        for name in ("tune.json", "fit.json", FILE_NAME):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)
    return mine


def _read(path: Path) -> dict[str, Any]:
    """The document of a ``tune.json``.

    Raises:
        FormatError: it is none.
        FormatVersionError: from a newer release.
    """
    found = read_json(path, FORMAT, FORMAT_VERSION)
    with reading(str(path), f"a {FORMAT} document; --fresh replaces it"):
        # By way of the dataclass, so that a setting which came later has its default.
        found["config"] = json.loads(json.dumps(FitConfig.from_json(found["config"]).to_json()))
        if found["status"] not in ("running", "finished"):
            raise ValueError(f"the status {found['status']!r}")
        for trial in found["trials"]:
            _check_trial(trial)
    return found


def _check_trial(trial: dict[str, Any]) -> None:
    if not is_number(trial["score"]) or type(trial["is_default"]) is not bool:
        raise ValueError("a trial without a score, or of unknown settings")


def _search(
    store: Path, base: FitConfig, search: TuneConfig, work: Path, score: Score, on_progress: OnProgress | None
) -> list[dict[str, Any]]:
    """Run the trials; the best report of each."""
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, Tuner, with_parameters, with_resources
    from ray.tune import TuneConfig as RayTuneConfig
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    resources = {"cpu": search.cpus_per_trial, **({"gpu": search.gpus_per_trial} if search.gpus_per_trial else {})}
    function = with_resources(
        with_parameters(_trial, store=str(store), base=base, work=str(work), score=score), resources
    )
    default = {name: searched.value(name, base) for name, searched in SPACE.items()} | {"is_default": True}
    scheduler = ASHAScheduler(time_attr="rung", max_t=len(_RUNGS), grace_period=1, reduction_factor=3)
    searcher = BasicVariantGenerator(
        points_to_evaluate=[default],
        random_state=search.seed,
        max_concurrent=search.num_concurrent,
    )
    state = work / "tune"
    if Tuner.can_restore(str(state)):
        tuner = Tuner.restore(
            str(state), trainable=function, resume_errored=True, restart_errored=False, param_space=_space(base)
        )
    else:
        tuner = Tuner(
            function,
            param_space=_space(base),
            tune_config=RayTuneConfig(
                metric="score", mode="min", num_samples=search.num_trials, scheduler=scheduler, search_alg=searcher
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=str(work),
                verbose=0,
                failure_config=FailureConfig(max_failures=search.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                callbacks=[_Tell()],
            ),
        )
    token = _LISTENER.set((on_progress, search.num_trials))
    try:
        results = tuner.fit()
    finally:
        _LISTENER.reset(token)
    trials = []
    for index in range(len(results)):
        result = results[index]
        if result.error is not None:
            if isinstance(cause := getattr(result.error, "cause", None), PDiffError):
                raise cause
            logger.warning("a trial failed: %s", str(result.error).strip().splitlines()[-1])
        trials += _reports_of(work, result.config or {})
    return trials


def _reports_of(work: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The best of a trial's own reports, as a list of at most one."""
    reports = []
    for path in sorted(work.glob(f"{_key(settings)}-*/trial.json")):
        found = parse_json(path.read_bytes(), str(path), "what a trial reported")
        with reading(str(path), "what a trial reported"):
            _check_trial(found)
        reports.append({**found, "folder": str(path.parent)})
    return sorted(reports, key=lambda report: report["score"])[:1]


def _space(base: FitConfig) -> dict[str, Any]:
    """What is searched, as Tune draws from it."""
    from ray.tune import choice, loguniform

    space: dict[str, Any] = {}
    for name, searched in SPACE.items():
        if searched.choices:
            space[name] = choice(list(searched.choices))
        else:
            value = searched.value(name, base)
            space[name] = loguniform(value / searched.factor, value * searched.factor)
    return {**space, "is_default": False}


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _configured(base: FitConfig, settings: dict[str, Any], max_steps: int) -> FitConfig:
    changes: dict[str, dict[str, Any]] = {"autoencoder": {}, "diffusion": {"max_steps": max_steps}, "sampling": {}}
    for name, searched in SPACE.items():
        changes[searched.part][name] = settings[name]
    if settings["prediction_type"] != base.diffusion.prediction_type:
        changes["diffusion"] |= {"sampler": None, "num_sampling_steps": None}  # chosen for the other type
    return dataclasses.replace(
        base,
        autoencoder=dataclasses.replace(base.autoencoder, **changes["autoencoder"]),
        diffusion=dataclasses.replace(base.diffusion, **changes["diffusion"]),
    )


def _trial(settings: dict[str, Any], *, store: str, base: FitConfig, work: str, score: Score) -> None:
    """One trial: fits of growing length, each judged."""
    from ray.tune import report

    for rung, divisor in enumerate(_RUNGS, start=1):
        if settings["is_default"] and divisor > 1:
            continue  # the yardstick is never stopped early
        max_steps = math.ceil(base.diffusion.max_steps / divisor)
        folder = Path(work) / f"{_key(settings)}-{rung}"
        folder.mkdir(exist_ok=True)
        statistics = f"statistics{CHECKPOINT_SUFFIX}"
        if not (folder / "fit.json").exists():
            shutil.copyfile(Path(work) / statistics, folder / statistics)
        generator = fit(store, _configured(base, settings, max_steps), out=folder)
        value = score(generator, settings["temperature"])
        if not math.isfinite(value):
            raise ValueError(f"the score is {value}")  # a failed trial: it can be neither best nor worst
        document = {
            "score": value,
            **settings,
            "max_steps": max_steps,
            **{key: generator.report.get(key) for key in ("spread_ratio", "copy_ratio", "fidelity", "diffusion_steps")},
        }
        write_json(folder / "trial.json", document)
        report({"score": document["score"], "rung": rung})


class HeldoutScore:
    """Energy distance of samples to the held-out snapshots, over the mean distance between those; lower is better.

    Args:
        store: the snapshots.
        heldout: numbers of those that were held out from the fit, (H,), H at least 2.
        seed: of the samples.

    Raises:
        ConfigError: fewer than two are held out.
    """

    name = "energy distance to held-out snapshots"

    def __init__(self, store: Path, heldout: Tensor, config: FitConfig | None = None, seed: int = 0) -> None:
        if len(heldout) < 2:
            expected = "must hold out at least 2 snapshots to score a search; raise it, or record more snapshots"
            raise ConfigError("heldout_fraction", f"{len(heldout)} of the snapshots", expected)
        self.store, self.heldout, self.config, self.seed = store, heldout, config or FitConfig(), seed

    def __str__(self) -> str:
        return self.name

    def __call__(self, generator: WeightGenerator, temperature: float) -> float:
        store = part_to_fit(SnapshotStore.open(self.store), self.config)
        latents = generator.sample_latents(
            _NUM_SAMPLES, temperature=temperature, rng=torch.Generator().manual_seed(self.seed)
        )
        squares = self._squared_distances(store, generator, latents, self.heldout)
        return energy_distance(squares.clamp_min(0).sqrt(), len(latents))

    @staticmethod
    def _squared_distances(store: SnapshotStore, generator: WeightGenerator, latents: Tensor, rows: Tensor) -> Tensor:
        """Between samples and snapshots at ``rows``, standardised per tensor, (M + H, M + H) float64."""
        place = {spec.name: number for number, spec in enumerate(store.layout)}
        scales = generator.autoencoder.scales
        read = reader(store, generator.alignment)
        total = torch.zeros(len(latents) + len(rows), len(latents) + len(rows), dtype=torch.float64)
        for name, columns, values in generator.autoencoder.decode_blocks(latents):
            both = torch.cat([values, read(columns.start, columns.stop, rows).to(values)])
            points = transform(both, name).double() / scales[place[name]]
            total += torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
        return total


class ConditionScore:
    """Error of samples at the conditions that a fit holds out, as a share of the average's; lower is better.

    It is what the fit measured at temperature one, whatever temperature is tried.
    """

    name = "error of samples at conditions held out"

    def __str__(self) -> str:
        return self.name

    def __call__(self, generator: WeightGenerator, temperature: float) -> float:
        del temperature
        return float(generator.report["condition"].get("heldout_error", math.nan))


def _own_score(store: SnapshotStore, base: FitConfig) -> str:
    """Name of the score that a search uses unless it is given one."""
    return HeldoutScore.name if variables_of(store, base) is None else ConditionScore.name


def energy_distance(distances: Tensor, num_samples: int) -> float:
    """Energy distance of the first ``num_samples`` points to the others, over the mean distance of the others.

    Args:
        distances: between all points, (M + H, M + H).
        num_samples: M.
    """
    M, H = num_samples, len(distances) - num_samples
    between = distances[:M, M:].mean()
    among_samples = distances[:M, :M].sum() / (M * (M - 1))
    among_others = distances[M:, M:].sum() / (H * (H - 1))
    return float((2 * between - among_samples - among_others) / among_others)


# Whom to tell of the search that this thread runs, and its number of trials. Tune pickles its callbacks, and a search
# that goes on gets the old ones back: it is therefore not in them.
_LISTENER: ContextVar[tuple[OnProgress | None, int]] = ContextVar("listener", default=(None, 0))


class _Tell(Callback):
    """Reports the number of trials that have ended, and the best score so far."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        listener, num_trials = _LISTENER.get()
        if listener is None:
            return
        ended = {t.trial_id for t in trials if t.is_finished()} | {trial.trial_id}
        scores = [t.last_result["score"] for t in trials if t.last_result and "score" in t.last_result]
        listener(Progress("tune", len(ended), num_trials, {"best_score": min(scores, default=math.nan)}))


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Ray Tune is configured by environment variables; what a user has set stays."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
