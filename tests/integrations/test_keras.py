import os

import pytest
import torch

from pdiff_plugin import SnapshotStore
from pdiff_plugin.errors import ConfigError

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

from pdiff_plugin.integrations.keras import PDiffRecorder, assign, mirror  # noqa: E402

# Keras on the torch backend, about numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture
def driver(load_driver):
    return load_driver("keras")


def test_names_are_the_paths_of_the_variables_and_layers_can_be_chosen_by_them(driver, toolbox, tmp_path):
    for layers, names in (
        ("last-norms:1", ["bn2.gamma", "bn2.beta", "bn2.moving_mean", "bn2.moving_variance"]),
        ("head", ["head.kernel", "head.bias"]),
        ("fir*", ["first.kernel", "first.bias"]),
    ):
        store = tmp_path / layers.strip("*")
        driver.train(toolbox.Job(tmp_path, epochs=1, settings={"store": store, "layers": layers}))
        assert SnapshotStore.open(store).layout.names == names


def test_recorded_weights_can_be_put_back(driver, toolbox, tmp_path):
    job = toolbox.Job(tmp_path)
    driver.train(job)
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    model = driver.make_model(job)
    assign(model, store.state_dict(-1))
    for name, tensor in store.state_dict(-1).items():
        assert torch.equal(mirror(model).state_dict()[name], tensor)
    assert torch.equal(model.get_layer("bn2").gamma.value, store.state_dict(-1)["bn2.gamma"])


def test_metrics_and_the_epoch_are_stored(driver, toolbox, tmp_path):
    driver.train(toolbox.Job(tmp_path))
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.epochs == [1.2, 1.4, 1.6, 1.8, 2.0]
    assert all(metrics["loss"] > 0 for metrics in store.metrics)


def test_a_second_fit_counts_on_from_the_optimizer(driver, toolbox, tmp_path):
    job = toolbox.Job(tmp_path)
    inputs, targets = (tensor.numpy() for tensor in job.examples())
    model = driver.make_model(job)
    recorder = PDiffRecorder(tmp_path)
    for _ in range(2):
        model.fit(inputs, targets, batch_size=32, epochs=1, verbose=0, callbacks=[recorder])
    store = SnapshotStore.open(tmp_path)
    assert store.trajectories == ["run-001", "run-002"]
    assert store.steps.tolist() == list(range(1, 11))


def test_fewer_batches_than_one_step_accumulates_leave_training_alone(toolbox, tmp_path):
    inputs, targets = (tensor.numpy() for tensor in toolbox.Job(tmp_path).examples())
    model = keras.Sequential([keras.Input((64,)), keras.layers.BatchNormalization(), keras.layers.Dense(10)])
    model.compile(
        keras.optimizers.SGD(gradient_accumulation_steps=8),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(inputs, targets, batch_size=32, verbose=0, callbacks=[PDiffRecorder(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ConfigError, match="KERAS_BACKEND = 'jax': it must be 'torch' to be recorded"):
        PDiffRecorder()
