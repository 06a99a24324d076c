import json

import fastai.callback.progress  # noqa: F401 (gives Learner no_bar)
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn

from pdiff_plugin.integrations.fastai import PDiffRecorder


class Probe(Callback):
    order = 100

    def __init__(self, job, recorder):
        self.job, self.recorder = job, recorder

    def after_step(self):
        self.job.probe(self.learn.model.state_dict())

    def after_epoch(self):
        if self.job.save and self.epoch == 0:
            self.learn.save("saved")
            self.job.checkpoint.write_text(json.dumps(self.recorder.state_dict()))


def train(job):
    inputs, targets = job.examples()
    size = toolbox.BATCH_SIZE  # noqa: F821 (given by the loader)
    data = list(zip(inputs, targets, strict=True))
    loaders = DataLoaders(*(DataLoader(data, bs=size, num_workers=0) for _ in range(2)), path=job.folder, device="cpu")
    learn = Learner(loaders, toolbox.make_net(), nn.functional.cross_entropy, path=job.folder)  # noqa: F821
    recorder = None if job.settings is None else PDiffRecorder(**job.settings)
    callbacks = [Probe(job, recorder), *([] if recorder is None else [recorder])]
    if job.accumulate > 1:
        callbacks.append(GradientAccumulation(size * job.accumulate))
    if job.resume:
        learn.create_opt()
        learn.load("saved", with_opt=True, weights_only=True)
        recorder.load_state_dict(json.loads(job.checkpoint.read_text()))
    try:
        with learn.no_bar(), learn.no_logging():
            learn.fit(job.epochs, 1e-2, cbs=callbacks, start_epoch=1 if job.resume else 0)
    except BaseException:
        if recorder is not None:
            recorder.close()
        raise
    assert torch.is_grad_enabled()
    return dict(learn.model.state_dict())
