import contextlib

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn

from pdiff_plugin.integrations.accelerate import PDiffRecorder


def train(job):
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=job.accumulate,
        project_config=ProjectConfiguration(project_dir=str(job.folder)),
    )
    net = toolbox.make_net()  # noqa: F821 (given by the loader)
    model, optimizer = accelerator.prepare(net, toolbox.make_optimizer(net, job))  # noqa: F821
    per_epoch = job.num_batches // job.accumulate
    recorder = contextlib.nullcontext()
    if job.settings is not None:
        recorder = PDiffRecorder(**job.settings).attach(
            accelerator, model, optimizer, total_steps=job.epochs * per_epoch, steps_per_epoch=per_epoch
        )
    first_epoch = 0
    if job.resume:
        accelerator.load_state(str(job.checkpoint))
        first_epoch = 1
    with recorder:
        for epoch in range(first_epoch, job.epochs):
            for inputs, targets in job.batches():
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
                    optimizer.step()
                    optimizer.zero_grad()
            if job.save and epoch == 0:
                accelerator.save_state(str(job.checkpoint))
    accelerator.free_memory()
    return dict(net.state_dict())
