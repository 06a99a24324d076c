"""Where the curves of a fit and the figures of an evaluation also go: TensorBoard, Weights & Biases, MLflow, Lightning.

A logger is anything with the three methods of :class:`Logger`. Those here keep no state of their backend but one run,
and import it when they are made. What a logger raises costs the job nothing: one warning, and it is asked no more.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from pdiff_plugin.errors import ConfigError, MissingDependencyError, PDiffError
from pdiff_plugin.progress import OnProgress, Progress

logger = logging.getLogger(__name__)

L = TypeVar("L", bound="_OneRun")

# What MLflow takes in one request, and in one parameter.
_MLFLOW_METRICS, _MLFLOW_PARAMS, _MLFLOW_CHARACTERS = 1000, 100, 6000


class Logger(Protocol):
    """What takes figures."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take figures of one step; names are paths such as ``diffusion/heldout_loss``, all of one first part."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take settings and sentences, nested as JSON is."""

    def close(self) -> None:
        """Write what is left; nothing comes afterwards."""


# ``tensorboard:FOLDER``, ``wandb:PROJECT`` and ``mlflow:URI`` are opened and closed by the job that they are given to.
Loggers = Sequence[Logger | str]


class _OneRun:
    """A logger that ``with`` closes."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: L) -> L:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class TensorBoardLogger(_OneRun):
    """Writes event files into a folder, settings as texts."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        with _installed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(os.fspath(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # or a fit that is killed would leave its last two minutes unwritten

    def log_config(self, config: Mapping[str, Any]) -> None:
        for name, value in config.items():
            text = value if isinstance(value, str) else f"```json\n{json.dumps(value, indent=2, default=str)}\n```"
            self.writer.add_text(name, text)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLogger(_OneRun):
    """Logs into a new run of a project; ``WANDB_MODE=offline`` and its other settings are W&B's own.

    Args:
        project: name of the project.
        **options: further arguments of ``wandb.init``.
    """

    def __init__(self, project: str, **options: Any) -> None:
        with _installed("wandb"):
            import wandb

        # A run of the user's own goes on beside it, and what he prints is not copied.
        mine = {"reinit": "create_new", "settings": wandb.Settings(console="off")}
        self.run: Any = wandb.init(project=project, **{**mine, **options})
        self._known: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # W&B has one step for all curves, which may not fall back: each stage gets an axis of its own.
        stages = {name.partition("/")[0] for name in metrics}
        for stage in stages - self._known:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._known |= stages
        self.run.log({**metrics, **{f"{stage}/step": step for stage in stages}})

    def log_config(self, config: Mapping[str, Any]) -> None:
        self.run.config.update(dict(config), allow_val_change=True)

    def close(self) -> None:
        self.run.finish()


class MlflowLogger(_OneRun):
    """Logs into a new run of an experiment; MLflow's own active run is left alone.

    Args:
        uri: of the tracking server, or ``sqlite:///mlflow.db``.
        experiment: its name; made if missing.
    """

    def __init__(self, uri: str, experiment: str = "pdiff-plugin") -> None:
        with _installed("mlflow"):
            from mlflow import MlflowClient

        self.client: Any = MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        number = self.client.create_experiment(experiment) if found is None else found.experiment_id
        self.run_id: str = self.client.create_run(number).info.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        entries = [Metric(_mlflow_name(name), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(entries), _MLFLOW_METRICS):
            self.client.log_batch(self.run_id, metrics=entries[start : start + _MLFLOW_METRICS])

    def log_config(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        texts = {_mlflow_name(name): str(value)[:_MLFLOW_CHARACTERS] for name, value in flattened(config)}
        entries = [Param(name, text) for name, text in texts.items()]
        for start in range(0, len(entries), _MLFLOW_PARAMS):
            self.client.log_batch(self.run_id, params=entries[start : start + _MLFLOW_PARAMS])

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


class LightningLogger(_OneRun):
    """Hands everything on to a logger of Lightning, whatever it logs to."""

    def __init__(self, lightning_logger: Any) -> None:
        self.logger = lightning_logger

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(dict(metrics), step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        self.logger.log_hyperparams(dict(flattened(config)))

    def close(self) -> None:
        self.logger.finalize("success")


class Log:
    """What a job logs: everything goes to all loggers, and none of those that have failed is asked again.

    Args:
        loggers: open ones.
        on_progress: told the job's progress, too.
    """

    def __init__(self, loggers: Sequence[Logger], on_progress: OnProgress | None) -> None:
        self._loggers, self._watcher = list(loggers), on_progress

    @property
    def on_progress(self) -> OnProgress | None:
        """What the job is to tell its progress; None where nobody listens."""
        return self._tell if self._loggers else self._watcher

    def record(self, progress: Progress) -> None:
        """Log the figures of a report of progress, each stage under its name."""
        self._log({progress.stage: progress.metrics}, progress.step)

    def figures(self, found: Mapping[str, Any]) -> None:
        """Log what was found in the end: the numbers of a nested mapping, as step 0."""
        for name, part in found.items():
            self._log({name: part}, 0)

    def config(self, config: Mapping[str, Any]) -> None:
        """Log settings, or a sentence."""
        for one in list(self._loggers):
            with self._forgiven(one):
                one.log_config(config)

    def close(self, loggers: Sequence[Logger]) -> None:
        """Close those that still work."""
        for one in loggers:
            if one in self._loggers:
                with self._forgiven(one):
                    one.close()

    def _tell(self, progress: Progress) -> None:
        if self._watcher is not None:
            self._watcher(progress)
        self.record(progress)

    def _log(self, found: Mapping[str, Any], step: int) -> None:
        # NaN is what was not measured.
        numbers = {name: float(value) for name, value in flattened(found) if isinstance(value, int | float)}
        metrics = {name: value for name, value in numbers.items() if not math.isnan(value)}
        for one in list(self._loggers) if metrics else ():
            with self._forgiven(one):
                one.log(metrics, step)

    @contextmanager
    def _forgiven(self, one: Logger) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of somebody else's code, from a full disk to a server that is gone
            self._loggers.remove(one)
            _warn(type(one).__name__, error)


@contextmanager
def logged(loggers: Loggers, config: Mapping[str, Any], on_progress: OnProgress | None = None) -> Iterator[Log]:
    """Log a job, beginning with its settings; loggers that are given as text are opened for it and closed after it.

    Raises:
        ConfigError: a text that names no logger.
        MissingDependencyError: its package is not installed.
    """
    opened = {place: _opened(one) for place, one in enumerate(loggers) if isinstance(one, str)}
    found = [opened.get(place, one) for place, one in enumerate(loggers)]
    log = Log([one for one in found if one is not None and not isinstance(one, str)], on_progress)
    try:
        log.config(config)
        yield log
    finally:
        log.close([one for one in opened.values() if one is not None])


_KINDS = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MlflowLogger}


def _opened(text: str) -> Logger | None:
    """The logger that a text names; None where its backend refuses, which is told."""
    kind, _, where = text.partition(":")
    if kind not in _KINDS or not where:
        raise ConfigError("log", text, "must be tensorboard:FOLDER, wandb:PROJECT or mlflow:URI")
    try:
        made: Logger = _KINDS[kind](where)
    except PDiffError:
        raise
    except Exception as error:
        _warn(text, error)
        return None
    return made


def flattened(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names as paths and values of a nested mapping."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _warn(name: str, error: Exception) -> None:
    logger.warning("%s has failed and logs no more of this: %s: %s", name, type(error).__name__, error)


def _mlflow_name(name: str) -> str:
    """A name with what MLflow refuses replaced."""
    return re.sub(r"[^\w\-. :/]", "_", name)


@contextmanager
def _installed(package: str) -> Iterator[None]:
    """Tell how ``package`` is installed where it is not; the extra has its name."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingDependencyError(package, package) from error
