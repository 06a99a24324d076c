import json

import pytest
import torch
from torch import nn

from pdiff_plugin import PDiffRecorder as CoreRecorder
from pdiff_plugin import SnapshotStore, import_checkpoints
from pdiff_plugin.errors import ConfigError

transformers = pytest.importorskip("transformers")
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from pdiff_plugin.integrations.huggingface import PDiffRecorder  # noqa: E402


@pytest.fixture
def driver(load_driver):
    return load_driver("huggingface")


def tiny_bert():
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=2,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def train(model, folder, callbacks, num_steps=4, resume=None, **kwargs):
    data = [{"input_ids": torch.arange(i, i + 5) % 16, "labels": i % 2} for i in range(8 * num_steps)]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        **{"save_strategy": "no", "num_train_epochs": 1, **kwargs},
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_callback_that_the_trainer_rebuilds_from_its_checkpoint_goes_on(driver, toolbox, tmp_path):
    settings = {"last_steps": 7}
    whole = toolbox.Job(tmp_path / "whole", settings=settings)
    driver.train(whole)
    with pytest.raises(ValueError, match="raised in training"):
        driver.train(toolbox.Job(tmp_path / "parts", settings=settings, save=True, fail_at=7))
    resumed = toolbox.Job(tmp_path / "parts", settings=settings, resume=True)
    driver.train(resumed, restore_callback_states_from_checkpoint=True)
    parts = SnapshotStore.open(tmp_path / "parts" / "pdiff-snapshots")
    assert parts.trajectories == ["run-001"]
    assert parts.steps.tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert torch.equal(parts.rows(), SnapshotStore.open(tmp_path / "whole" / "pdiff-snapshots").rows())


def test_the_state_is_plain_json_and_rebuilds_the_callback(tmp_path):
    state = json.loads(json.dumps(PDiffRecorder(str(tmp_path), layers=["head"], last_steps=3).state()))
    again = PDiffRecorder.from_state(state)
    assert again.recorder.settings() == CoreRecorder(str(tmp_path), layers=["head"], last_steps=3).settings()


@pytest.mark.parametrize("make", [lambda: lambda name, _: "classifier" in name, lambda: ("norms", "head")])
def test_a_function_or_a_tuple_as_layers_goes_on_after_a_checkpoint(tmp_path, make):
    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callbacks = [Stopping(), PDiffRecorder(layers=make())]
    train(tiny_bert(), tmp_path, callbacks, save_strategy="steps", save_steps=2)
    train(tiny_bert(), tmp_path, [PDiffRecorder(layers=make())], resume=str(tmp_path / "checkpoint-2"))
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.trajectories == ["run-001"]
    assert store.steps.tolist() == [1, 2, 3, 4]


def test_a_training_from_the_checkpoint_of_another_leaves_its_snapshots_alone(tmp_path):
    train(tiny_bert(), tmp_path / "a", [PDiffRecorder()], save_strategy="steps", save_steps=2)
    before = SnapshotStore.open(tmp_path / "a" / "pdiff-snapshots").rows()
    train(tiny_bert(), tmp_path / "b", [PDiffRecorder()], resume=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(SnapshotStore.open(tmp_path / "a" / "pdiff-snapshots").rows(), before)
    assert SnapshotStore.open(tmp_path / "b" / "pdiff-snapshots").steps.tolist() == [3, 4]


def test_logged_metrics_and_the_epoch_are_stored(tmp_path):
    train(tiny_bert(), tmp_path, [PDiffRecorder()])
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.epochs == [0.25, 0.5, 0.75, 1.0]
    # The trainer logs after its callbacks heard of the step, so the newest value is that of the step before.
    assert "loss" not in store.metrics[0]
    assert all(metrics["loss"] > 0 for metrics in store.metrics[1:])


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT, about transformers
def test_lora_matrices_of_a_peft_model_are_recorded(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    train(model, tmp_path, [PDiffRecorder(layers="lora")])
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert len(store) == 4
    assert all("lora_" in name for name in store.layout.names)
    assert torch.equal(store.state_dict(-1)[store.layout.names[0]], model.state_dict()[store.layout.names[0]])


def test_weights_that_the_trainer_loads_at_the_end_are_not_recorded(tmp_path):
    class LoadsOthers(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()

    train(tiny_bert(), tmp_path, [LoadsOthers(), PDiffRecorder()])
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.rows().abs().sum(1).min() > 0
    assert store.base()["classifier.weight"].abs().sum() > 0


def test_max_steps_sets_the_window(tmp_path):
    train(tiny_bert(), tmp_path, [PDiffRecorder(last_steps=2)], max_steps=6)
    assert SnapshotStore.open(tmp_path / "pdiff-snapshots").steps.tolist() == [5, 6]


def test_a_stream_of_unknown_length_has_its_steps_from_max_steps(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{"input_ids": torch.arange(5), "labels": i % 2} for i in range(64)])

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    Trainer(tiny_bert(), arguments, train_dataset=Stream(), callbacks=[PDiffRecorder(max_snapshots=3)]).train()
    assert SnapshotStore.open(tmp_path / "pdiff-snapshots").steps.tolist() == [3, 4, 5]


def test_bfloat16_weights_are_exact(tmp_path):
    model = tiny_bert().to(torch.bfloat16)
    train(model, tmp_path, [PDiffRecorder(layers="head", dtype="bfloat16")])
    state = SnapshotStore.open(tmp_path / "pdiff-snapshots").state_dict(-1)
    assert state["classifier.weight"].dtype == torch.bfloat16
    assert torch.equal(state["classifier.weight"], model.classifier.weight)
    assert isinstance(model.classifier, nn.Linear)


def test_the_checkpoints_of_the_same_run_give_the_same_rows(tmp_path):
    model = tiny_bert()
    train(model, tmp_path, [PDiffRecorder()], save_strategy="steps", save_steps=1)
    recorded = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    imported = import_checkpoints(tmp_path, store=tmp_path / "imported", model=model)
    assert imported.layout == recorded.layout
    assert imported.steps.tolist() == recorded.steps.tolist() == [1, 2, 3, 4]
    assert imported.epochs == recorded.epochs
    assert torch.equal(imported.rows(), recorded.rows())


class Trial(TrainerCallback):
    """What a hyperparameter search leaves in the state of its trial's trainer."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.trial_params = {"learning_rate": 0.5, "nested": {"a": 1}, "style": "ink"}


@pytest.mark.parametrize(
    ("callbacks", "condition", "expected"),
    [
        ([Trial()], "hparams", {"learning_rate": 0.5, "style": "ink"}),
        ([Trial()], ["style", "seed", "learning_rate"], {"style": "ink", "seed": 7, "learning_rate": 0.5}),
        ([], ["seed", "learning_rate"], {"seed": 7, "learning_rate": 0.25}),
        ([], {"mine": 1}, {"mine": 1}),
    ],
)
def test_the_condition_may_be_that_of_a_trial_or_of_the_arguments(tmp_path, callbacks, condition, expected):
    recorder = PDiffRecorder(condition=condition)
    train(tiny_bert(), tmp_path, [*callbacks, recorder], seed=7, learning_rate=0.25)
    assert SnapshotStore.open(tmp_path / "pdiff-snapshots").conditions == {"run-001": expected}


@pytest.mark.parametrize(
    ("condition", "text"),
    [("hparams", "needs a trial of a search"), (["angle"], "names 'angle', which a trial of a search")],
)
def test_a_condition_that_the_trainer_does_not_have_is_refused(tmp_path, condition, text):
    with pytest.raises(ConfigError, match=text):
        train(tiny_bert(), tmp_path, [PDiffRecorder(condition=condition)])


def is_fit_for_a_fit(store, last_step):
    """Whether a store has rows enough for a fit, up to about the end of the training."""
    steps = store.steps.tolist()
    return len(steps) >= 10 and last_step * 0.9 <= steps[-1] <= last_step


def test_early_stopping_with_gradient_accumulation_leaves_sparse_snapshots(tmp_path, caplog):
    data = [{"input_ids": torch.arange(i, i + 5) % 16, "labels": i % 2} for i in range(64)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=50,
        learning_rate=1e-9,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="never_better",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    stopping = EarlyStoppingCallback(early_stopping_patience=9)
    trainer = Trainer(
        tiny_bert(),
        arguments,
        train_dataset=data,
        eval_dataset=data[:8],
        compute_metrics=lambda _: {"never_better": 1.0},
        callbacks=[PDiffRecorder(layers="all"), stopping],
    )
    trainer.train()
    assert trainer.state.global_step == 40  # ten epochs of four steps, of 200 planned
    assert is_fit_for_a_fit(SnapshotStore.open(tmp_path / "pdiff-snapshots"), 40)
    assert "training ended at step 40 of the planned 200" in caplog.text


def test_a_callback_that_stops_training_after_a_resume_leaves_snapshots(tmp_path):
    class StopAt(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == self.step

    settings = {"save_strategy": "steps", "save_steps": 20, "num_train_epochs": 50}
    train(tiny_bert(), tmp_path, [PDiffRecorder(), StopAt(30)], **settings)
    resume = str(tmp_path / "checkpoint-20")
    train(tiny_bert(), tmp_path, [PDiffRecorder(), StopAt(50)], resume=resume, **settings)
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.trajectories == ["run-001"]
    assert is_fit_for_a_fit(store, 50)
