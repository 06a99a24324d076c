import contextlib
from importlib.util import find_spec

import pytest
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from torch import nn

from pdiff_plugin.integrations.ray_train import PDiffRecorder

if find_spec("ray.train.v2._internal.execution.local_mode") is None:
    pytest.skip("this Ray has no local mode", allow_module_level=True)
SCALING = ScalingConfig(num_workers=0)  # in this process: the loop, its context and wrappers are real


def train(job):
    net = toolbox.make_net()  # noqa: F821 (given by the loader)

    def loop(config):
        model = ray.train.torch.prepare_model(net)
        optimizer = toolbox.make_optimizer(net, job)  # noqa: F821
        per_epoch = job.num_batches // job.accumulate
        recorder = contextlib.nullcontext()
        if job.settings is not None:
            recorder = PDiffRecorder(**{"store": job.folder / "pdiff-snapshots", **job.settings})
        first_epoch = 0
        if job.resume:
            saved = torch.load(job.checkpoint, weights_only=True)
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            recorder.load_state_dict(saved["recorder"])
            first_epoch = 1
        if job.settings is not None:
            recorder.attach(model, optimizer, total_steps=job.epochs * per_epoch, steps_per_epoch=per_epoch)
        with recorder:
            for epoch in range(first_epoch, job.epochs):
                for index, (inputs, targets) in enumerate(job.batches()):
                    nn.functional.cross_entropy(model(inputs), targets).backward()
                    if (index + 1) % job.accumulate == 0:
                        optimizer.step()
                        optimizer.zero_grad()
                ray.train.report({"epoch": epoch})
                if job.save and epoch == 0:
                    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save({**state, "recorder": recorder.state_dict()}, job.checkpoint)

    job.folder.mkdir(exist_ok=True)
    ray.train.torch.TorchTrainer(
        loop,
        train_loop_config={},
        scaling_config=SCALING,
        run_config=RunConfig(name="run", storage_path=str(job.folder)),
    ).fit()
    return dict(net.state_dict())
