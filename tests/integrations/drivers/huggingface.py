from torch import nn
from transformers import Trainer, TrainingArguments

from pdiff_plugin.integrations.huggingface import PDiffRecorder


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = toolbox.make_net()  # noqa: F821 (given by the loader)

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(job, **arguments):
    model = Model()
    inputs, targets = job.examples()
    recorders = [] if job.settings is None else [PDiffRecorder(**job.settings)]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(job.folder),
            num_train_epochs=job.epochs,
            per_device_train_batch_size=toolbox.BATCH_SIZE,  # noqa: F821
            gradient_accumulation_steps=job.accumulate,
            save_strategy="epoch" if job.save else "no",
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_grad_norm=0.0,
            **arguments,
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(inputs, targets, strict=True)],
        optimizers=(toolbox.make_optimizer(model, job), None),  # noqa: F821
        callbacks=recorders,
    )
    steps = job.num_batches // job.accumulate
    try:
        trainer.train(resume_from_checkpoint=str(job.folder / f"checkpoint-{steps}") if job.resume else None)
    except BaseException:
        for recorder in recorders:
            recorder.close()
        raise
    return dict(model.state_dict())
