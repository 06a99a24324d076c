import json

import keras

from pdiff_plugin.integrations.keras import PDiffRecorder, mirror


def make_model(job):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(16, name="first"),
            keras.layers.BatchNormalization(name="bn1"),
            keras.layers.ReLU(),
            keras.layers.Dense(16, name="second"),
            keras.layers.BatchNormalization(name="bn2"),
            keras.layers.ReLU(),
            keras.layers.Dense(10, name="head"),
        ],
        name="net",
    )
    every = job.accumulate if job.accumulate > 1 else None
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=every)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


class Probe(keras.callbacks.Callback):
    def __init__(self, job, recorder):
        super().__init__()
        self.job, self.recorder, self.seen = job, recorder, None

    def on_train_begin(self, logs=None):
        self.seen = int(self.model.optimizer.iterations)

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) > self.seen:
            self.seen += 1
            self.job.probe(mirror(self.model).state_dict())

    def on_epoch_end(self, epoch, logs=None):
        if self.job.save and epoch == 0:
            self.job.folder.mkdir(exist_ok=True)
            self.model.save(self.job.folder / "saved.keras")
            self.job.checkpoint.write_text(json.dumps(self.recorder.state_dict()))


def train(job):
    inputs, targets = job.examples()
    recorder = None
    if job.settings is not None:
        recorder = PDiffRecorder(**{"store": job.folder / "pdiff-snapshots", **job.settings})
    model = make_model(job)
    if job.resume:
        model = keras.saving.load_model(job.folder / "saved.keras")
        recorder.load_state_dict(json.loads(job.checkpoint.read_text()))
    try:
        model.fit(
            inputs.numpy(),
            targets.numpy(),
            batch_size=toolbox.BATCH_SIZE,  # noqa: F821 (given by the loader)
            epochs=job.epochs,
            initial_epoch=1 if job.resume else 0,
            shuffle=False,
            verbose=0,
            callbacks=[*([] if recorder is None else [recorder]), Probe(job, recorder)],
        )
    except BaseException:
        if recorder is not None:
            recorder.close()
        raise
    return dict(mirror(model).state_dict())
