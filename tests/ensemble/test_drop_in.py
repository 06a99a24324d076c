"""An ensemble in place of the model, in evaluation code that knows nothing of ensembles."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pdiff_plugin import DiffusionEnsemble

NUM_CLASSES = 3


@pytest.fixture
def data():
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(0, NUM_CLASSES, (40,), generator=rng)
    x = F.one_hot(targets, NUM_CLASSES) + 0.7 * torch.randn(40, NUM_CLASSES, generator=rng)
    return TensorDataset(x, targets)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_CLASSES, NUM_CLASSES), nn.BatchNorm1d(NUM_CLASSES))
    nn.init.eye_(model[0].weight)
    return model.eval()


@pytest.fixture
def ensemble(model):
    rng = torch.Generator().manual_seed(1)
    return DiffusionEnsemble(
        model,
        {"1.weight": 1 + 3 * torch.rand(4, NUM_CLASSES, generator=rng), "1.bias": torch.randn(4, 3, generator=rng)},
    )


def evaluate(model, dataset):
    """A user's own loop."""
    model.eval()
    loss = correct = 0.0
    with torch.no_grad():
        for x, y in DataLoader(dataset, batch_size=16):
            logits = model(x)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            correct += (logits.argmax(1) == y).sum().item()
    return loss / len(dataset), correct / len(dataset)


def by_hand(ensemble, data):
    x, y = data.tensors
    mean = ensemble.members(x).softmax(-1).mean(0)
    return -mean[torch.arange(len(y)), y].log().mean().item(), (mean.argmax(1) == y).float().mean().item()


def test_cross_entropy_in_a_users_loop_accepts_the_ensemble(model, ensemble, data):
    loss, accuracy = evaluate(ensemble, data)

    assert (loss, accuracy) == pytest.approx(by_hand(ensemble, data), rel=1e-5)
    assert loss != pytest.approx(evaluate(model, data)[0], rel=1e-3)


def test_torchmetrics_accepts_the_ensemble(ensemble, data):
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics = torchmetrics.MetricCollection(
        {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(NUM_CLASSES, average="micro"),
            "ece": torchmetrics.classification.MulticlassCalibrationError(NUM_CLASSES, n_bins=10),
        }
    )
    x, y = data.tensors

    for inputs, targets in DataLoader(data, batch_size=16):
        metrics.update(ensemble(inputs), targets)

    found = metrics.compute()
    assert found["accuracy"].item() == pytest.approx(by_hand(ensemble, data)[1])
    # Log-probabilities are logits whose softmax is the mean probability, so calibration is measured on that.
    mean = ensemble.members(x).softmax(-1).mean(0)
    expected = torchmetrics.functional.classification.multiclass_calibration_error(mean, y, NUM_CLASSES, n_bins=10)
    assert found["ece"].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.filterwarnings(
    "ignore:The '.*_dataloader' does not have many workers",  # Lightning's advice on loading data faster
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning",  # Lightning's own use of torch
)
def test_a_lightning_test_run_accepts_the_ensemble(model, ensemble, data, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def test_step(self, batch, batch_idx):
            x, y = batch
            logits = self.net(x)
            self.log("loss", F.cross_entropy(logits, y))
            self.log("accuracy", (logits.argmax(1) == y).float().mean())

    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )

    (found,) = trainer.test(Lit(ensemble), DataLoader(data, batch_size=16), verbose=False)

    loss, accuracy = by_hand(ensemble, data)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert not ensemble.training
