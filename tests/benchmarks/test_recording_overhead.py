"""What recording costs a training step.

Plain ``pytest`` runs each measurement once, quickly, as a test. To measure, on an idle machine:

    pytest tests/benchmarks/test_recording_overhead.py --benchmark-enable --benchmark-columns=min,median,iqr,max -s
"""

import statistics
import time

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from pdiff_plugin import PDiffRecorder, SnapshotStore

SIZES = ["4096", "1M", "resnet18"]


def make_model(size):
    if size == "resnet18":
        return torchvision.models.resnet18()
    width = 1024 if size == "4096" else 2**18
    return nn.Sequential(nn.LayerNorm(width), nn.LayerNorm(width))


def measure(benchmark, function, between=lambda: None, rounds=200):
    """Time ``function``, with ``between`` before each round and not timed."""
    rounds = rounds if benchmark.enabled else 2
    benchmark.pedantic(function, setup=between, rounds=rounds, warmup_rounds=2 if benchmark.enabled else 0)


@pytest.fixture(params=SIZES)
def case(request, benchmark):
    benchmark.group = f"one recorded step, {request.param}"
    return make_model(request.param), 40 if request.param == "resnet18" else 200


def test_recorder(benchmark, case, tmp_path):
    model, rounds = case
    recorder = PDiffRecorder(tmp_path, layers="all", save_base=False).attach(model)
    recorder.step()
    writer = recorder._session._writer

    def training_goes_on():
        # As in a real loop, whose steps take longer than writing; the disk is busy all the same.
        while benchmark.enabled and not writer._free and not writer._num_unmade:
            time.sleep(0.001)

    measure(benchmark, recorder.step, training_goes_on, rounds)
    recorder.close()
    assert recorder.error is None
    assert len(SnapshotStore.open(tmp_path)) >= 2


def test_safetensors_save_file(benchmark, case, tmp_path):
    model, rounds = case
    measure(benchmark, lambda: save_file(dict(model.state_dict()), tmp_path / "x.safetensors"), rounds=rounds)


def test_torch_save(benchmark, case, tmp_path):
    model, rounds = case
    measure(benchmark, lambda: torch.save(model.state_dict(), tmp_path / "x.pt"), rounds=rounds)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("kind", ["recorder", "checkpoint"])
def test_lightning_callback(benchmark, tmp_path, kind):
    """The trainer's own hook, timed inside a real run: our callback, or a checkpoint on every step."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from pdiff_plugin.integrations.lightning import PDiffRecorder as LightningRecorder

    benchmark.group = "one step in Lightning, 4096"
    seconds = []

    def timed(base):
        class Timed(base):
            def on_train_batch_end(self, *args, **kwargs):
                start = time.perf_counter()
                super().on_train_batch_end(*args, **kwargs)
                seconds.append(time.perf_counter() - start)

        return Timed

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_model("4096")

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    if kind == "recorder":
        callback = timed(LightningRecorder)(tmp_path / "store", layers="all", save_base=False)
    else:
        callback = timed(ModelCheckpoint)(tmp_path, every_n_train_steps=1, save_top_k=-1, save_weights_only=True)
    steps = 200 if benchmark.enabled else 2
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=kind == "checkpoint",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader([torch.randn(8, 1024) for _ in range(steps)], batch_size=None)
    trainer.fit(Module(), data)
    assert len(seconds) == steps
    benchmark.pedantic(lambda: None, rounds=1)  # the numbers are those of the run above
    report(f"Lightning, {kind}, blocking per step", seconds, 1e6, "us")


def test_whole_loop(benchmark, tmp_path):
    """ResNet-18 steps in blocks, alternately recorded and not; chunks are written inside the recorded blocks."""
    block, num_blocks = (16, 24) if benchmark.enabled else (2, 2)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs, targets = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    wall, cpu = ({True: [], False: []} for _ in range(2))

    def train(is_recorded):
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(block):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if is_recorded:
                recorder.step()
        wall[is_recorded].append((time.perf_counter() - start) / block)
        cpu[is_recorded].append((time.process_time() - cpu_start) / block)  # all threads, the writer's too

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pdiff_plugin.recording.writer.CHUNK_ROWS", block // 2)
        recorder = PDiffRecorder(tmp_path, save_base=False).attach(model)
        for number in range(num_blocks):
            for is_recorded in (True, False) if number % 2 else (False, True):
                train(is_recorded)
        recorder.close()
    assert len(SnapshotStore.open(tmp_path)) == min(300, block * num_blocks)
    benchmark.pedantic(lambda: None, rounds=1)  # the numbers are those of the loop above
    for name, seconds in (("wall", wall), ("CPU", cpu)):
        report(f"ResNet-18 step, {name} time, not recorded", seconds[False], 1e3, "ms")
        report(f"ResNet-18 step, {name} time, recorded", seconds[True], 1e3, "ms")
        ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
        report(f"{name} time, recorded / not recorded, neighbouring blocks", ratios, 1.0, "")


def report(name, values, scale, unit):
    low, middle, high = (value * scale for value in statistics.quantiles(values, n=4))
    print(f"\n{name}: median {middle:.4g} {unit}, quartiles {low:.4g} to {high:.4g}, n={len(values)}")
