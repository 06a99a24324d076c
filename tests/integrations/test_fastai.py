import pytest
import torch
from torch import nn

from pdiff_plugin import SnapshotStore

pytestmark = [
    # fastai's own, about its dependencies.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'mode.chained_assignment' option is deprecated"),
    pytest.mark.filterwarnings("ignore:(Exception occured in `LRFinder`|numpy.core is deprecated):DeprecationWarning"),
]


@pytest.fixture
def learn(toolbox, tmp_path):
    pytest.importorskip("fastai.callback.progress")
    pytest.importorskip("fastai.callback.schedule")
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.metrics import accuracy

    inputs, targets = toolbox.Job(tmp_path).examples()
    data = list(zip(inputs, targets, strict=True))
    loaders = DataLoaders(*(DataLoader(data, bs=32, num_workers=0) for _ in range(2)), path=tmp_path, device="cpu")
    learn = Learner(loaders, toolbox.make_net(), nn.functional.cross_entropy, path=tmp_path, metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        yield learn


def test_metrics_of_the_last_validation_and_the_epoch_are_stored(learn, tmp_path):
    from pdiff_plugin.integrations.fastai import PDiffRecorder

    learn.fit(2, 1e-2, cbs=PDiffRecorder())
    store = SnapshotStore.open(tmp_path / "pdiff-snapshots")
    assert store.epochs == [1.2, 1.4, 1.6, 1.8, 2.0]
    assert set(store.metrics[0]) == {"train_loss", "valid_loss", "accuracy"}
    assert 0 <= store.metrics[0]["accuracy"] <= 1


def test_a_torch_optimizer_is_recorded_too(learn, tmp_path):
    from fastai.optimizer import OptimWrapper

    from pdiff_plugin.integrations.fastai import PDiffRecorder

    learn.opt_func = lambda params, **kwargs: OptimWrapper(params, torch.optim.SGD, lr=0.1)
    learn.fit(1, 1e-2, cbs=PDiffRecorder())
    assert SnapshotStore.open(tmp_path / "pdiff-snapshots").steps.tolist() == [1, 2, 3, 4, 5]


def test_fewer_batches_than_one_step_accumulates_leave_training_alone(learn, tmp_path):
    from fastai.callback.training import GradientAccumulation

    from pdiff_plugin.integrations.fastai import PDiffRecorder

    learn.fit(1, 1e-2, cbs=[GradientAccumulation(8 * 32), PDiffRecorder()])
    assert not (tmp_path / "pdiff-snapshots").exists()


def test_the_learning_rate_finder_and_predictions_record_nothing(learn, tmp_path):
    from pdiff_plugin.integrations.fastai import PDiffRecorder

    learn.add_cb(PDiffRecorder())
    learn.lr_find(show_plot=False, num_it=5)
    learn.get_preds()
    assert not (tmp_path / "pdiff-snapshots").exists()
    learn.fit(1, 1e-2)
    assert len(SnapshotStore.open(tmp_path / "pdiff-snapshots")) == 5
