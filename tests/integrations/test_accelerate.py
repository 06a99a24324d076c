import pytest
import torch
from torch import nn

from pdiff_plugin import SnapshotStore

accelerate = pytest.importorskip("accelerate")

from pdiff_plugin.integrations.accelerate import PDiffRecorder  # noqa: E402


def test_the_optimizer_may_be_given_before_or_after_prepare(toolbox, tmp_path):
    for prepared in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        net = toolbox.make_net()
        raw = torch.optim.SGD(net.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(net, raw)
        folder = tmp_path / str(prepared)
        with PDiffRecorder(folder).attach(accelerator, model, optimizer if prepared else raw):
            for inputs, targets in toolbox.Job(tmp_path).batches():
                accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        assert SnapshotStore.open(folder).steps.tolist() == [1, 2, 3, 4, 5]
        assert [name.split(".")[0] for name in SnapshotStore.open(folder).layout.names] == ["1"] * 4 + ["4"] * 4


def test_a_step_that_the_gradient_scaler_skips_is_not_recorded(toolbox, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    net = toolbox.make_net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
    with PDiffRecorder(tmp_path).attach(accelerator, model, optimizer):
        for index, (inputs, targets) in enumerate(toolbox.Job(tmp_path).batches()):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss * (torch.inf if index == 2 else 1.0))
            optimizer.step()
            optimizer.zero_grad()
    rows = SnapshotStore.open(tmp_path).rows()
    assert len(rows) == 4
    assert rows.isfinite().all()
