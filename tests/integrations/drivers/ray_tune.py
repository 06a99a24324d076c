import contextlib
import os

import torch
from ray import tune
from ray.train._internal.session import get_session
from ray.train._internal.storage import StorageContext
from ray.tune.experiment.trial import Trial, _TrialInfo
from ray.tune.result import DONE, RESULT_DUPLICATE, TRIAL_INFO
from ray.tune.trainable import wrap_function
from torch import nn

from pdiff_plugin.integrations.ray_tune import PDiffRecorder


class Storage(StorageContext):
    """One whose working folders need no Ray that runs."""

    def _get_session_path(self):
        return self.session


def run_trial(function, folder, config=None, *, stop_after=None, checkpoint=None, trial="run-001", bucket=None):
    """Tune's own way through a trial, in this process: its session, its thread, and how a scheduler stops it.

    Raises what the function raises.
    """
    raised = []

    def caught(config):
        try:
            function(config)
        except Exception as error:
            raised.append(error)
        except KeyboardInterrupt as error:
            raised.append(error)

    cwd, environment = os.getcwd(), dict(os.environ)
    storage = Storage(bucket or str(folder), "sweep", trial_dir_name=f"trial_{trial}")
    storage.session = str(folder / "session")
    info = _TrialInfo(Trial("trainable", trial_id=trial, storage=storage, stub=True))
    trainable = wrap_function(caught)({**(config or {}), TRIAL_INFO: info}, storage=storage)
    try:
        if checkpoint is not None:
            trainable.load_checkpoint(checkpoint)
        num_reports, result = 0, {}
        while not result.get(DONE) and RESULT_DUPLICATE not in result and num_reports != stop_after:
            result = trainable.train()
            num_reports += 1
    finally:
        thread = get_session().training_thread
        trainable.stop()
        thread.join(60)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
    if raised:
        raise raised[0]
    return folder / "sweep" / f"trial_{trial}"


def train(job):
    net = toolbox.make_net()  # noqa: F821 (given by the loader)

    def loop(config):
        optimizer = toolbox.make_optimizer(net, job)  # noqa: F821
        per_epoch = job.num_batches // job.accumulate
        recorder, first_epoch = contextlib.nullcontext(), 0
        if job.settings is not None:
            recorder = PDiffRecorder(**{"store": job.folder / "pdiff-snapshots", **job.settings})
        if job.resume:
            saved = torch.load(job.checkpoint, weights_only=True)
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            recorder.load_state_dict(saved["recorder"])
            first_epoch = 1
        if job.settings is not None:
            recorder.attach(net, optimizer, total_steps=job.epochs * per_epoch, steps_per_epoch=per_epoch)
        with recorder:
            for epoch in range(first_epoch, job.epochs):
                for index, (inputs, targets) in enumerate(job.batches()):
                    nn.functional.cross_entropy(net(inputs), targets).backward()
                    if (index + 1) % job.accumulate == 0:
                        optimizer.step()
                        optimizer.zero_grad()
                if job.save and epoch == 0:
                    state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save({**state, "recorder": recorder.state_dict()}, job.checkpoint)
                tune.report({"epoch": epoch})

    job.folder.mkdir(exist_ok=True)
    run_trial(loop, job.folder)
    return dict(net.state_dict())
