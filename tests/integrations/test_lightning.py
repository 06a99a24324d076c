import json
import warnings

import pytest
import torch
from torch import nn

from pdiff_plugin import PDiffRecorder as CoreRecorder
from pdiff_plugin import SnapshotStore, import_checkpoints
from pdiff_plugin.errors import ConditionError, ConfigError

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

from pdiff_plugin.integrations.lightning import PDiffRecorder  # noqa: E402

pytestmark = [
    # Lightning's own, about itself.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Module(lightning.LightningModule):
    def __init__(self, toolbox):
        super().__init__()
        self.net = toolbox.make_net()

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset):
    def __init__(self, job):
        self.job = job

    def __iter__(self):
        return iter(self.job.batches())


def make_trainer(tmp_path, callbacks, **kwargs):
    return lightning.Trainer(
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def fit(module, data, tmp_path, recorder, **kwargs):
    trainer = make_trainer(tmp_path, [recorder], **kwargs)
    trainer.fit(module, DataLoader(data, batch_size=None))
    return SnapshotStore.open(tmp_path / "pdiff-snapshots")


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ({"max_epochs": 2}, [8, 9, 10]),
        ({"max_epochs": -1, "max_time": {"seconds": 1}}, None),
        ({"max_steps": 7}, [5, 6, 7]),
    ],
    ids=["epochs", "time", "steps"],
)
def test_data_of_unknown_length_keeps_the_newest_steps(toolbox, tmp_path, limit, steps):
    store = fit(Module(toolbox), Stream(toolbox.Job(tmp_path)), tmp_path, PDiffRecorder(max_snapshots=3), **limit)
    found = store.steps.tolist()
    assert found == (steps or list(range(found[-1] - 2, found[-1] + 1)))


def test_max_steps_ends_the_window_before_the_epochs_do(toolbox, tmp_path):
    batches = toolbox.Job(tmp_path).batches()
    store = fit(Module(toolbox), batches, tmp_path, PDiffRecorder(), max_steps=8, max_epochs=20)
    assert store.steps.tolist() == [4, 5, 6, 7, 8]


def test_logged_metrics_and_the_epoch_are_stored(toolbox, tmp_path):
    store = fit(Module(toolbox), toolbox.Job(tmp_path).batches(), tmp_path, PDiffRecorder(), max_epochs=1)
    assert store.epochs == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(metrics["loss"] > 0 for metrics in store.metrics)


def test_manual_optimization_with_two_optimizers_is_recorded(toolbox, tmp_path):
    class Manual(Module):
        def __init__(self, toolbox):
            super().__init__(toolbox)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[:3], self.net[3:])]

    store = fit(Manual(toolbox), toolbox.Job(tmp_path).batches(), tmp_path, PDiffRecorder(), max_epochs=1)
    assert store.steps.tolist() == [2, 4, 6, 8, 10]
    assert len(torch.unique(store.rows(), dim=0)) == 5


def test_a_step_that_the_gradient_scaler_skips_is_not_recorded(toolbox, tmp_path):
    class Overflowing(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 2 else 1.0)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    batches = toolbox.Job(tmp_path).batches()
    store = fit(Overflowing(toolbox), batches, tmp_path, PDiffRecorder(), max_epochs=1, plugins=[plugin])
    assert store.steps.tolist() == [1, 2, 4, 5]


def test_training_that_is_stopped_early_leaves_the_newest_snapshots(toolbox, tmp_path):
    class Stopping(Module):
        def on_train_epoch_end(self):
            self.trainer.should_stop = self.trainer.global_step == 10

    batches = toolbox.Job(tmp_path).batches()
    recorder = PDiffRecorder(keep_newest=True, last_steps=3)
    assert fit(Stopping(toolbox), batches, tmp_path, recorder, max_epochs=100).steps.tolist() == [8, 9, 10]


def fit_and_go_on(toolbox, tmp_path, make_recorder, make_logger):
    """Train for one epoch of five steps, then from its checkpoint for a second one."""
    for max_epochs, checkpoint in ((1, None), (2, tmp_path / "x.ckpt")):
        trainer = lightning.Trainer(
            callbacks=[make_recorder()],
            max_epochs=max_epochs,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            accelerator="cpu",
            logger=make_logger(),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(toolbox), DataLoader(toolbox.Job(tmp_path).batches(), batch_size=None), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "x.ckpt")


def test_a_function_as_layers_goes_on_after_a_checkpoint(toolbox, tmp_path):
    def make_recorder():
        return PDiffRecorder(layers=lambda name, _: name.startswith("net.6"))

    fit_and_go_on(toolbox, tmp_path, make_recorder, lambda: False)
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == list(range(1, 11))


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_resumed_training_goes_on_in_the_store_of_its_checkpoint_though_its_log_folder_is_new(toolbox, tmp_path):
    fit_and_go_on(toolbox, tmp_path, PDiffRecorder, lambda: CSVLogger(tmp_path))
    found = {path.parent.name: SnapshotStore.open(path) for path in tmp_path.glob("**/pdiff-snapshots")}
    assert list(found) == ["version_0"]
    assert found["version_0"].trajectories == ["run-001"]
    assert found["version_0"].steps.tolist() == list(range(1, 11))


def test_validation_and_prediction_record_nothing(toolbox, tmp_path):
    recorder = PDiffRecorder()
    trainer = lightning.Trainer(callbacks=[recorder], default_root_dir=tmp_path, logger=False, accelerator="cpu")
    module = Module(toolbox)
    module.predict_step = lambda batch, *args: module.net(batch[0])
    trainer.predict(module, DataLoader(toolbox.Job(tmp_path).batches(), batch_size=None))
    assert not (tmp_path / "pdiff-snapshots").exists()


@pytest.mark.filterwarnings("ignore:.*save_weights_only")
def test_the_checkpoints_of_the_same_run_give_the_same_rows(toolbox, tmp_path):
    trainer = lightning.Trainer(
        callbacks=[
            PDiffRecorder(),
            ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ],
        max_epochs=1,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(toolbox), DataLoader(toolbox.Job(tmp_path).batches(), batch_size=None))
    recorded = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    imported = import_checkpoints(tmp_path / "checkpoints", store=tmp_path / "imported")
    assert imported.layout == recorded.layout
    assert imported.steps.tolist() == recorded.steps.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(imported.rows(), recorded.rows())


class Saving(Module):
    def __init__(self, toolbox, angle, style="ink", extra=None):
        super().__init__(toolbox)
        self.save_hyperparameters(ignore=["toolbox"])


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("hparams", {"angle": 45.0, "style": "ink"}),
        (["angle"], {"angle": 45.0}),
        ({"mine": 1}, {"mine": 1}),
    ],
)
def test_the_condition_may_be_the_hparams_of_the_module_or_some_of_them(toolbox, tmp_path, condition, expected):
    module = Saving(toolbox, 45.0, extra={"nested": 1})
    recorder = PDiffRecorder(condition=condition)
    store = fit(module, toolbox.Job(tmp_path).batches(), tmp_path, recorder, max_epochs=1)
    assert store.conditions == {"run-001": expected}


def test_a_ready_recorder_may_ask_for_the_hparams_too(toolbox, tmp_path):
    recorder = PDiffRecorder(recorder=CoreRecorder(tmp_path / "pdiff-snapshots", condition="hparams"))
    store = fit(Saving(toolbox, 45.0), toolbox.Job(tmp_path).batches(), tmp_path, recorder, max_epochs=1)
    assert store.conditions == {"run-001": {"angle": 45.0, "style": "ink"}}


@pytest.mark.parametrize(
    ("make", "condition", "error", "text"),
    [
        (Module, "hparams", ConfigError, "needs hparams of the module"),
        (lambda toolbox: Saving(toolbox, 1.0), ["angle", "tilt"], ConfigError, "names 'tilt', which hparams of the"),
        (lambda toolbox: Saving(toolbox, 1.0), ["extra"], ConditionError, "found a NoneType under 'extra'"),
        (lambda toolbox: Saving(toolbox, 1.0), "angle", ConfigError, "must be a dict, 'hparams', or a list of names"),
    ],
)
def test_a_condition_that_the_module_does_not_have_is_refused(toolbox, tmp_path, make, condition, error, text):
    with pytest.raises(error, match=text):
        fit(make(toolbox), toolbox.Job(tmp_path).batches(), tmp_path, PDiffRecorder(condition=condition), max_epochs=1)


def test_the_key_in_a_checkpoint_does_not_change_with_the_condition():
    assert PDiffRecorder(condition={"a": 1}).state_key == PDiffRecorder().state_key


def is_fit_for_a_fit(store, last_step):
    """Whether a store has rows of different weights, enough for a fit, up to about the end of the training."""
    steps = store.steps.tolist()
    is_near = last_step * 0.9 <= steps[-1] <= last_step
    return len(steps) >= 10 and is_near and len(torch.unique(store.rows(), dim=0)) == len(steps)


def test_early_stopping_leaves_sparse_snapshots(toolbox, tmp_path, caplog):
    class NeverBetter(Module):
        def on_train_epoch_end(self):
            self.log("score", 1.0)

    stopping = EarlyStopping("score", patience=24, check_on_train_epoch_end=True)
    recorder = PDiffRecorder()
    trainer = make_trainer(tmp_path, [recorder, stopping], max_epochs=100)
    trainer.fit(NeverBetter(toolbox), DataLoader(toolbox.Job(tmp_path).batches(), batch_size=None))
    assert trainer.global_step == 125
    assert is_fit_for_a_fit(SnapshotStore.open(tmp_path / "pdiff-snapshots"), 125)
    assert "training ended at step 125 of the planned 500" in caplog.text


def test_epochs_that_end_before_their_length_leave_sparse_snapshots(toolbox, tmp_path):
    class Short(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None  # skips the rest of the epoch

    store = fit(Short(toolbox), toolbox.Job(tmp_path).batches(), tmp_path, PDiffRecorder(), max_epochs=30)
    assert is_fit_for_a_fit(store, 60)


def test_a_limit_on_batches_counts(toolbox, tmp_path):
    batches = toolbox.Job(tmp_path).batches()
    store = fit(Module(toolbox), batches, tmp_path, PDiffRecorder(), max_epochs=4, limit_train_batches=3)
    assert store.steps.tolist() == [10, 11, 12]


def test_max_steps_within_an_epoch_leaves_its_window(toolbox, tmp_path):
    batches = toolbox.Job(tmp_path).batches()
    store = fit(Module(toolbox), batches, tmp_path, PDiffRecorder(), max_steps=3, max_epochs=20)
    assert store.steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize("saved_by", ["another trainer", "the recorder's own"])
def test_a_run_resumed_near_its_end_and_stopped_leaves_snapshots(toolbox, tmp_path, saved_by):
    class Stopping(Module):
        stop_at = 60

        def on_train_epoch_end(self):
            self.trainer.should_stop = self.trainer.global_step == self.stop_at

    def make_recorders(is_first):
        return [] if is_first and saved_by == "another trainer" else [PDiffRecorder()]

    loader = DataLoader(toolbox.Job(tmp_path).batches(), batch_size=None)
    first = make_trainer(tmp_path, make_recorders(True), max_epochs=40)
    first.fit(Stopping(toolbox), loader)
    first.save_checkpoint(tmp_path / "x.ckpt")
    module = Stopping(toolbox)
    module.stop_at = 130
    make_trainer(tmp_path, make_recorders(False), max_epochs=40).fit(module, loader, ckpt_path=tmp_path / "x.ckpt")
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.trajectories == ["run-001"]
    assert is_fit_for_a_fit(store, 130)


def test_two_networks_of_one_module_get_a_store_each(toolbox, tmp_path, caplog):
    class Gan(Module):
        def __init__(self, toolbox):
            super().__init__(toolbox)
            self.automatic_optimization = False
            self.critic = nn.Sequential(nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 1))

        def training_step(self, batch, batch_idx):
            losses = (super().training_step(batch, batch_idx), self.critic(batch[0]).mean())
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.critic)]

    recorders = [PDiffRecorder(layers="net.*"), PDiffRecorder(layers="critic.*")]
    trainer = make_trainer(tmp_path, recorders, max_epochs=1)
    trainer.fit(Gan(toolbox), DataLoader(toolbox.Job(tmp_path).batches(), batch_size=None))
    for name, first in (("pdiff-snapshots", "net.0.weight"), ("pdiff-snapshots-2", "critic.0.weight")):
        store = SnapshotStore.open(tmp_path / name)
        assert store.layout.names[0] == first
        assert len(store) == 5
    assert caplog.text.count("is for other tensors: these are recorded in") == 1


def run_cli(tmp_path, config):
    from lightning.pytorch.cli import LightningCLI

    class Plain(Module):
        def __init__(self, lr: float = 0.1):
            super().__init__(Plain.toolbox)

        def train_dataloader(self):
            return DataLoader(Plain.toolbox.Job(tmp_path).batches(), batch_size=None)

    Plain.toolbox = run_cli.toolbox
    (tmp_path / "config.yaml").write_text(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser's own, about itself and the trainer's
        return LightningCLI(Plain, args=["fit", "--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": ["net.6", "net.4"], "last_steps": 3, "condition": {"angle": 45.0}},
        {"config": {"layers": ["net.6", "net.4"], "last_steps": 3, "condition": {"angle": 45.0}}},
    ],
    ids=["one by one", "as one object"],
)
def test_the_command_line_interface_takes_the_settings_from_a_file_and_its_saved_file_can_be_run_again(
    toolbox, tmp_path, settings
):
    pytest.importorskip("jsonargparse")
    run_cli.toolbox = toolbox
    store = tmp_path / "store"
    callback = {
        "class_path": "pdiff_plugin.integrations.lightning.PDiffRecorder",
        "init_args": {"store": str(store), **settings},
    }
    trainer = {
        "callbacks": [callback],
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
    }
    cli = run_cli(tmp_path, json.dumps({"trainer": trainer}))
    recorders = [callback for callback in cli.trainer.callbacks if isinstance(callback, PDiffRecorder)]
    expected = CoreRecorder(store, layers=["net.6", "net.4"], last_steps=3, condition={"angle": 45.0})
    assert [recorder.recorder.settings() for recorder in recorders] == [expected.settings()]
    (saved,) = tmp_path.rglob("version_0/config.yaml")
    assert "Unable to serialize" not in saved.read_text()
    cli = run_cli(tmp_path, saved.read_text())
    recorders = [callback for callback in cli.trainer.callbacks if isinstance(callback, PDiffRecorder)]
    assert [recorder.recorder.settings() for recorder in recorders] == [expected.settings()]
    opened = SnapshotStore.open(store)
    assert opened.trajectories == ["run-001", "run-002"]
    assert opened.steps.tolist() == [3, 4, 5] * 2
