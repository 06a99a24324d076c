import os

import torch
from composer import Trainer
from composer.models import ComposerModel
from torch import nn
from torch.utils.data import DataLoader

from pdiff_plugin.integrations.composer import PDiffRecorder


class Model(ComposerModel):
    def __init__(self):
        super().__init__()
        self.net = toolbox.make_net()  # noqa: F821 (given by the loader)

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])


def train(job):
    callbacks = []
    if job.settings is not None:
        callbacks = [PDiffRecorder(**{"store": job.folder / "pdiff-snapshots", **job.settings})]
    model = Model()
    batches = job.batches()
    # A batch of Composer is one step; its microbatches are the accumulation.
    groups = [batches[i : i + job.accumulate] for i in range(0, len(batches), job.accumulate)]
    data = [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]
    saving = {"save_folder": str(job.checkpoint), "save_interval": "1ep", "save_filename": "ep{epoch}.pt"}
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=None),
        max_duration=f"{job.epochs}ep",
        optimizers=toolbox.make_optimizer(model, job),  # noqa: F821
        callbacks=callbacks,
        device="cpu",
        seed=3,  # Composer seeds everything itself, by the clock unless told
        device_train_microbatch_size=toolbox.BATCH_SIZE,  # noqa: F821
        progress_bar=False,
        console_log_interval=0,
        load_path=os.fspath(job.checkpoint / "ep1.pt") if job.resume else None,
        save_overwrite=True,
        **(saving if job.save else {}),
    )
    try:
        trainer.fit()
    finally:
        trainer.close()
    return dict(model.state_dict())
