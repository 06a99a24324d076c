import signal

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from pdiff_plugin.integrations.lightning import PDiffRecorder


class Module(lightning.LightningModule):
    def __init__(self, job):
        super().__init__()
        self.job = job
        self.net = toolbox.make_net()  # noqa: F821 (given by the loader)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return toolbox.make_optimizer(self.net, self.job, self)  # noqa: F821


def train(job):
    callbacks = [] if job.settings is None else [PDiffRecorder(**job.settings)]
    if job.save or job.resume:
        callbacks.append(ModelCheckpoint(job.checkpoint, filename="{epoch}", save_top_k=-1))
    module = Module(job)
    trainer = lightning.Trainer(
        max_epochs=job.epochs,
        accumulate_grad_batches=job.accumulate,
        callbacks=callbacks,
        default_root_dir=job.folder,
        enable_checkpointing=job.save or job.resume,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            module,
            DataLoader(job.batches(), batch_size=None),
            ckpt_path=job.checkpoint / "epoch=0.ckpt" if job.resume else None,
        )
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores SIGINT after Ctrl-C
    return dict(module.state_dict())
