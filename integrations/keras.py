"""Keras 3 on the torch backend.

model.fit(x, y, callbacks=[PDiffRecorder()])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_plugin.errors import ConfigError

from ._adapter import Adapter, Requires

problem: ImportError | None = None
try:
    import keras
    from keras.callbacks import Callback
except ImportError as error:
    Callback, problem = object, error


class PDiffRecorder(Adapter, Callback):
    """Records snapshots during ``fit``; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    Tensors are named by their variables' paths, with dots: ``batch_normalization.gamma``; :func:`assign`
    puts such weights back. Keras has no event for an exception: what is not yet written then follows within seconds, or
    on ``close()``. To resume with ``initial_epoch``, keep ``state_dict()`` beside the saved model.
    """

    requires = Requires("keras", problem)
    _mirror: nn.Module | None = None

    def _check(self) -> None:
        super()._check()
        if keras.backend.backend() != "torch":
            raise ConfigError("KERAS_BACKEND", keras.backend.backend(), "must be 'torch' to be recorded")

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._mirror = None

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch = epoch
        if self._mirror is not None:
            return
        # Only the first epoch's number tells how many are left after `initial_epoch`.
        self._mirror = mirror(self.model)
        steps = self.params["steps"]
        every = self.model.optimizer.gradient_accumulation_steps or 1
        num_left = (self.params["epochs"] - epoch) * steps // every if steps else None
        self.recorder.start(
            self._mirror,
            total_steps=self._num_steps() + num_left if num_left else None,
            steps_per_epoch=max(1, steps // every) if steps else None,
        )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        steps = self.params["steps"]
        epoch = self._epoch + (batch + 1) / steps if steps else None
        assert self._mirror is not None
        self.recorder.observe(self._mirror, step=self._num_steps(), epoch=epoch, metrics=logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.close()

    def _num_steps(self) -> int:
        return int(self.model.optimizer.iterations)


def mirror(model: keras.Model) -> nn.Module:
    """The variables of a Keras model as plain modules, named by their paths. Memory is shared."""
    root = nn.Module()
    # A variable's own layer comes after those around it.
    nested = sorted(model._flatten_layers(), key=lambda layer: len(layer.variables), reverse=True)
    layers = {id(variable): layer for layer in nested for variable in layer.variables}
    for variable in model.variables:
        *path, leaf = _name(model, variable).split(".")
        module = root
        for depth, part in enumerate(path):
            if part not in module._modules:
                layer = layers.get(id(variable)) if depth == len(path) - 1 else None
                module.add_module(part, _module_of_class(type(layer).__name__ if layer is not None else "Module"))
            module = module.get_submodule(part)
        if variable.path.endswith(("moving_mean", "moving_variance")) or not variable.trainable:
            module.register_buffer(leaf, variable.value.detach())
        else:
            module.register_parameter(leaf, variable.value)
    return root


def assign(model: keras.Model, weights: Mapping[str, Tensor]) -> None:
    """Put recorded or generated weights into a Keras model, by their names."""
    variables = {_name(model, variable): variable for variable in model.variables}
    with torch.no_grad():
        for name, tensor in weights.items():
            variables[name].assign(tensor)


def _name(model: keras.Model, variable: keras.Variable) -> str:
    # Paths begin with the model's name if it was built in code and not if it was loaded from a file.
    path: str = variable.path.removeprefix(f"{model.name}/")
    return path.replace(".", "_").replace("/", ".")


def _module_of_class(name: str) -> nn.Module:
    """An empty module whose class has this name, by which norm layers and heads are found."""
    bases = (nn.Linear,) if name == "Dense" else (nn.Module,)
    module: nn.Module = type(name, bases, {"__init__": nn.Module.__init__})()
    return module
