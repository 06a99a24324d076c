import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

from pdiff_plugin.integrations.ignite import PDiffRecorder


def train(job):
    net = toolbox.make_net()  # noqa: F821 (given by the loader)
    optimizer = toolbox.make_optimizer(net, job)  # noqa: F821
    trainer = create_supervised_trainer(
        net, optimizer, nn.functional.cross_entropy, gradient_accumulation_steps=job.accumulate
    )
    objects = {"net": net, "optimizer": optimizer, "trainer": trainer}
    recorder = None
    if job.settings is not None:
        settings = {"store": job.folder / "pdiff-snapshots", **job.settings}
        recorder = PDiffRecorder(**settings).attach(trainer, net, optimizer, gradient_accumulation_steps=job.accumulate)
        objects["recorder"] = recorder
    if job.save:
        saver = DiskSaver(str(job.checkpoint), create_dir=True, require_empty=False)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED(once=1), Checkpoint(objects, saver, filename_pattern="saved.pt")
        )
    if job.resume:
        Checkpoint.load_objects(objects, torch.load(job.checkpoint / "saved.pt", weights_only=True))
    try:
        trainer.run(job.batches(), max_epochs=job.epochs)
    except BaseException:
        if recorder is not None:
            recorder.close()
        raise
    return dict(net.state_dict())
