from inspect import signature

import pytest
import torch
from torch import nn

from pdiff_plugin import SnapshotStore

ignite = pytest.importorskip("ignite.engine")
from ignite.metrics import RunningAverage  # noqa: E402

from pdiff_plugin.integrations.ignite import PDiffRecorder  # noqa: E402


@pytest.mark.skipif("max_iters" not in signature(ignite.Engine.run).parameters, reason="this ignite needs an epoch")
def test_metrics_and_the_epoch_are_stored_and_a_stream_keeps_the_newest_steps(toolbox, tmp_path):
    net = toolbox.make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = ignite.create_supervised_trainer(net, optimizer, nn.functional.cross_entropy)
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
    PDiffRecorder(tmp_path, max_snapshots=3).attach(trainer, net, optimizer)
    trainer.run(iter(toolbox.Job(tmp_path).batches()), max_iters=4)
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [2, 3, 4]
    assert all(metrics["loss"] > 0 for metrics in store.metrics)


def test_fewer_batches_than_one_step_accumulates_leave_training_alone(toolbox, tmp_path):
    net = toolbox.make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = ignite.create_supervised_trainer(
        net, optimizer, nn.functional.cross_entropy, gradient_accumulation_steps=8
    )
    PDiffRecorder(tmp_path).attach(trainer, net, optimizer, gradient_accumulation_steps=8)
    assert trainer.run(toolbox.Job(tmp_path).batches(), max_epochs=1).iteration == 5
    assert list(tmp_path.iterdir()) == []


def test_terminate_closes_the_recording(toolbox, tmp_path):
    net = toolbox.make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = ignite.create_supervised_trainer(net, optimizer, nn.functional.cross_entropy)
    PDiffRecorder(tmp_path, last_steps=10).attach(trainer, net, optimizer)
    trainer.add_event_handler(ignite.Events.ITERATION_COMPLETED(once=7), trainer.terminate)
    trainer.run(toolbox.Job(tmp_path).batches(), max_epochs=2)
    store = SnapshotStore.open(tmp_path)
    assert store.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert store.epochs[-1] == 1.4


def test_an_exception_reaches_the_handlers_of_the_user_alone(toolbox, tmp_path):
    job = toolbox.Job(tmp_path, fail_at=3)
    net = toolbox.make_net()
    optimizer = toolbox.make_optimizer(net, job)
    trainer = ignite.create_supervised_trainer(net, optimizer, nn.functional.cross_entropy)
    PDiffRecorder(tmp_path).attach(trainer, net, optimizer)
    assert not trainer.has_event_handler(None, ignite.Events.EXCEPTION_RAISED)
    caught = []
    trainer.add_event_handler(ignite.Events.EXCEPTION_RAISED, caught.append)
    trainer.run(job.batches(), max_epochs=2)
    assert [str(error) for error in caught] == ["raised in training"]
