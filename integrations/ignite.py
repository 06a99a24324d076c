"""PyTorch-Ignite.

PDiffRecorder().attach(trainer, model, optimizer)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._adapter import Adapter, Requires

problem: ImportError | None = None
try:
    from ignite.engine import Events
except ImportError as error:
    problem = error

if TYPE_CHECKING:
    from ignite.engine import Engine
    from torch import nn
    from torch.optim import Optimizer


class PDiffRecorder(Adapter):
    """Records snapshots while an ``Engine`` trains; see :class:`pdiff_plugin.RecorderConfig` for the settings.

    To resume, put it into ``Checkpoint({"recorder": recorder, ...})``. No handler is registered for exceptions, as that
    would swallow them: what is not yet written then follows within seconds, or on ``close()``.
    """

    requires = Requires("ignite", problem, package="pytorch-ignite")

    def attach(
        self, engine: Engine, model: nn.Module, optimizer: Optimizer, *, gradient_accumulation_steps: int = 1
    ) -> PDiffRecorder:
        """Follow ``optimizer`` while ``engine`` runs.

        Args:
            gradient_accumulation_steps: iterations to a step, as given to ``create_supervised_trainer``.
        """

        def start() -> None:
            state, every = engine.state, gradient_accumulation_steps
            length = state.epoch_length
            total_steps = state.max_epochs * length // every if length and state.max_epochs else None
            self.recorder.start(
                model,
                total_steps=total_steps or None,  # fewer iterations than one step needs
                steps_per_epoch=max(1, length // every) if length else None,
                watch=optimizer,
            )

        def observe() -> None:
            state = engine.state
            epoch = state.iteration / state.epoch_length if state.epoch_length else None
            self.recorder.observe(model, epoch=epoch, metrics=state.metrics)

        engine.add_event_handler(Events.STARTED, start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, observe)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self.close)
        return self
