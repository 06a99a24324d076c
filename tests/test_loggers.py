"""What is logged is what the fit and the evaluation have found, read back by each backend's own reader."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pdiff_plugin import (
    DiffusionConfig,
    FitConfig,
    LightningLogger,
    MlflowLogger,
    TensorBoardLogger,
    WandbLogger,
    WeightGenerator,
    fit,
)
from pdiff_plugin.cli import main
from pdiff_plugin.errors import ConfigError, MissingDependencyError
from pdiff_plugin.loggers import Log, logged
from pdiff_plugin.progress import Progress

# What the backends themselves warn of, and sockets and files that they leave to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)

STORE = Path(__file__).parent / "data" / "store-v1-fitted"
QUICK = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=40, eval_every_n_steps=20))
FIGURES = ("train_loss", "heldout_loss", "novelty", "spread_ratio")
# Name of a curve -> step -> value.
Curves = dict[str, dict[int, float]]


@dataclass
class Fitted:
    """A fit that was logged to everything at once."""

    generator: WeightGenerator
    document: dict[str, Any]
    folder: Path

    def expected(self) -> Curves:
        """The curves in fit.json, without what was not measured."""
        return {
            f"diffusion/{name}": {
                entry["step"]: entry[name] for entry in self.document["history"] if entry[name] is not None
            }
            for name in FIGURES
        }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    from lightning.pytorch.loggers import CSVLogger

    folder = tmp_path_factory.mktemp("logged")
    with (
        mock.patch.dict(os.environ, {"WANDB_ERROR_REPORTING": "false"}),  # a test talks to nobody
        TensorBoardLogger(folder / "board") as board,
        WandbLogger("pdiff", mode="offline", dir=str(folder)) as wandb,
        LightningLogger(CSVLogger(str(folder), name="lightning", version="0", flush_logs_every_n_steps=1)) as lightning,
    ):
        generator = fit(STORE, QUICK, out=folder / "fit", loggers=[board, wandb, lightning])
    return Fitted(generator, json.loads((folder / "fit" / "fit.json").read_text()), folder)


def assert_curves(found: Curves, fitted: Fitted) -> None:
    for name, curve in fitted.expected().items():
        assert found[name] == pytest.approx(curve, rel=1e-5), name
    assert found["report/fidelity"] == pytest.approx({0: fitted.generator.report["fidelity"]})
    assert found["report/novelty"] == pytest.approx({0: fitted.generator.report["novelty"]})


def board_curves(folder: Path) -> tuple[Curves, dict[str, str]]:
    """Curves and texts of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    curves = {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    return curves, texts


def test_tensorboard_shows_what_fit_json_says(fitted: Fitted) -> None:
    curves, texts = board_curves(fitted.folder / "board")
    assert_curves(curves, fitted)
    settings = json.loads(texts["fit/text_summary"].removeprefix("```json\n").removesuffix("\n```"))
    assert settings["diffusion"]["max_steps"] == 40
    assert settings["store"] == str(STORE)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: those of a LevelDB log, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_an_offline_run_of_wandb_holds_what_fit_json_says(fitted: Fitted) -> None:
    (path,) = fitted.folder.glob("wandb/offline-run-*/*.wandb")
    curves: Curves = {}
    settings: dict[str, Any] = {}
    for record in wandb_records(path):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            step = row.get(f"{name.partition('/')[0]}/step")
            if step is not None:
                curves.setdefault(name, {})[step] = value
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    assert_curves(curves, fitted)
    assert settings["fit"]["diffusion"]["max_steps"] == 40


def test_mlflow_holds_what_fit_json_says(fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # a test talks to nobody
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    with MlflowLogger(uri) as logger:
        fit(STORE, QUICK, loggers=[logger])

    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(logger.run_id)
    history = {name: client.get_metric_history(logger.run_id, name) for name in run.data.metrics}
    assert_curves({name: {one.step: one.value for one in entries} for name, entries in history.items()}, fitted)
    assert run.data.params["fit/diffusion/max_steps"] == "40"
    assert mlflow.active_run() is None
    assert run.info.status == "FINISHED"


def test_a_logger_of_lightning_holds_what_fit_json_says(fitted: Fitted) -> None:
    curves: Curves = {}
    with open(fitted.folder / "lightning" / "0" / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    curves.setdefault(name, {})[step] = float(value)
    assert_curves(curves, fitted)
    assert "max_steps: 40" in (fitted.folder / "lightning" / "0" / "hparams.yaml").read_text()


def test_a_fit_that_is_logged_is_the_same_bit_for_bit(fitted: Fitted) -> None:
    alone = fit(STORE, QUICK)
    one, other = (g.sample(4, rng=torch.Generator().manual_seed(0)) for g in (alone, fitted.generator))
    assert all(torch.equal(one[name], other[name]) for name in one)


class Failing:
    """A logger whose disk is full from some call on."""

    def __init__(self, num_good: int) -> None:
        self.num_left, self.num_calls = num_good, 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.num_calls += 1
        self.num_left -= 1
        if self.num_left < 0:
            raise OSError(28, "No space left on device")

    def log_config(self, config: Mapping[str, Any]) -> None:
        self.log({}, 0)

    def close(self) -> None:
        self.log({}, 0)


@pytest.mark.parametrize("num_good", [0, 2])
def test_a_logger_that_fails_costs_one_warning_and_not_the_fit(
    num_good: int, recorder: Any, caplog: pytest.LogCaptureFixture, fitted: Fitted
) -> None:
    failing = Failing(num_good)

    with caplog.at_level(logging.WARNING, "pdiff_plugin.loggers"):
        fit(STORE, QUICK, loggers=[failing, recorder])

    assert failing.num_calls == num_good + 1
    assert [record.getMessage() for record in caplog.records if record.name == "pdiff_plugin.loggers"] == [
        "Failing has failed and logs no more of this: OSError: [Errno 28] No space left on device"
    ]
    assert_curves(recorder.curves, fitted)


def test_a_backend_that_refuses_to_begin_costs_one_warning_and_not_the_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with logged([f"tensorboard:{tmp_path}/file/runs"], {}) as log:
        assert log.on_progress is None
    assert "tensorboard:" in caplog.text
    assert "has failed and logs no more of this: NotADirectoryError" in caplog.text


@pytest.mark.parametrize("text", ["tensorboard", "tensorboard:", "comet:x", "runs/a"])
def test_a_text_that_names_no_logger_is_refused_before_anything_is_fitted(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be tensorboard:FOLDER, wandb:PROJECT or mlflow:URI"):
        fit(STORE, QUICK, out=tmp_path / "fit", loggers=[text])
    assert not (tmp_path / "fit" / "generator.safetensors").exists()


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "mlflow"])
def test_a_backend_that_is_not_installed_is_told_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "pdiff-plugin\[{package}\]"'):
        logged([f"{package}:x"], {}).__enter__()


def test_what_was_not_measured_is_not_logged_and_nobody_is_asked_for_nothing(recorder: Any) -> None:
    log = Log([recorder], None)
    log.record(Progress("diffusion", 20, 40, {"train_loss": 1.0, "novelty": math.nan}))
    log.record(Progress("statistics", 5, 10))
    log.figures({"report": {"fidelity": 0.5, "heldout_loss": None, "ok": True, "names": ["a"], "runs": {"a": 1}}})
    assert recorder.curves == {
        "diffusion/train_loss": {20: 1.0},
        "report/fidelity": {0: 0.5},
        "report/ok": {0: 1.0},
        "report/runs/a": {0: 1.0},
    }
    assert recorder.num_calls == 2


def test_a_logger_that_was_given_stays_open_and_one_that_was_named_is_closed_even_after_an_interrupt(
    recorder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    close = TensorBoardLogger.close
    monkeypatch.setattr(TensorBoardLogger, "close", lambda self: (closed.append("named"), close(self)))

    with pytest.raises(KeyboardInterrupt), logged([recorder, f"tensorboard:{tmp_path}"], {"fit": {}}):
        raise KeyboardInterrupt

    assert closed == ["named"]
    assert not recorder.is_closed


def test_a_finished_fit_logs_nothing_as_nothing_is_done(recorder: Any, fitted: Fitted) -> None:
    fit(STORE, QUICK, out=fitted.folder / "fit", loggers=[recorder])
    assert (recorder.curves, recorder.settings) == ({}, {})


TASK = """
import torch
from pdiff_plugin import SnapshotStore, Task

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Linear(5, 8)

    def forward(self, x):
        return self.norm(x)

def task():
    rng = torch.Generator().manual_seed(0)
    return Task(Net(), [(torch.randn(40, 5, generator=rng), torch.arange(40) % 8)])
"""


def test_the_commands_log_where_they_are_told(
    walk_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logged_task.py").write_text(TASK)
    quick = ["--diffusion.max-steps", "40", "--diffusion.eval-every-n-steps", "20"]

    logs = ["--log", "tensorboard:one", "--log", "tensorboard:two"]
    assert main(["fit", str(walk_store), "--out", "fit", *quick, *logs]) == 0
    command = ["evaluate", "fit", "--task", "logged_task:task", "--num-members", "4", "--sets", "core"]
    assert main([*command, "--log", "tensorboard:judged"]) == 0

    assert board_curves(tmp_path / "one") == board_curves(tmp_path / "two")
    history = json.loads((tmp_path / "fit" / "fit.json").read_text())["history"]
    assert set(board_curves(tmp_path / "one")[0]["diffusion/heldout_loss"]) == {one["step"] for one in history}
    document = json.loads((tmp_path / "fit" / "evaluation" / "evaluation.json").read_text())
    curves, texts = board_curves(tmp_path / "judged")
    for name, figures in document["sets"].items():
        assert curves[f"evaluate/{name}/ensemble_nll"] == pytest.approx({0: figures["ensemble_nll"]}, rel=1e-6)
    assert document["verdict"] in json.loads(texts["verdict/text_summary"][8:-4])["sentence"]


def test_a_text_that_names_no_logger_is_told_on_the_command_line(
    walk_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(walk_store), "--out", str(walk_store.parent / "fit"), "--log", "comet:x"]) == 1
    assert "must be tensorboard:FOLDER, wandb:PROJECT or mlflow:URI" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )
