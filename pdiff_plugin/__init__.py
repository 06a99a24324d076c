"""Neural Network Diffusion (p-diff) as a plug-in for the trainer you already have.

The public names below load on first use, so that ``import pdiff_plugin`` costs neither torch nor Ray.
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from pdiff_plugin._version import __version__ as __version__

# In a bare checkout the adapters live beside this package; an installed package has them inside.
_here = _os.path.dirname(__file__)
if not _os.path.isdir(_os.path.join(_here, "integrations")) and _os.path.isfile(
    _os.path.join(_os.path.dirname(_here), "integrations", "__init__.py")
):
    __path__.append(_os.path.dirname(_here))

if _TYPE_CHECKING:
    from pdiff_plugin.config import CollectConfig as CollectConfig
    from pdiff_plugin.config import ConditionConfig as ConditionConfig
    from pdiff_plugin.config import ConvConfig as ConvConfig
    from pdiff_plugin.config import Cycle as Cycle
    from pdiff_plugin.config import DiffusionConfig as DiffusionConfig
    from pdiff_plugin.config import EvaluateConditionsConfig as EvaluateConditionsConfig
    from pdiff_plugin.config import EvaluateConfig as EvaluateConfig
    from pdiff_plugin.config import FitConfig as FitConfig
    from pdiff_plugin.config import Perturb as Perturb
    from pdiff_plugin.config import RecorderConfig as RecorderConfig
    from pdiff_plugin.config import RefineConfig as RefineConfig
    from pdiff_plugin.config import Reinit as Reinit
    from pdiff_plugin.config import SamplingConfig as SamplingConfig
    from pdiff_plugin.config import SubspaceConfig as SubspaceConfig
    from pdiff_plugin.ensemble.batchnorm import recalibrate_batchnorm as recalibrate_batchnorm
    from pdiff_plugin.ensemble.dial import Dial as Dial
    from pdiff_plugin.ensemble.ensemble import DiffusionEnsemble as DiffusionEnsemble
    from pdiff_plugin.ensemble.ensemble import ensemble_from_diffusion as ensemble_from_diffusion
    from pdiff_plugin.ensemble.soup import best_member as best_member
    from pdiff_plugin.ensemble.soup import greedy_soup as greedy_soup
    from pdiff_plugin.ensemble.soup import uniform_soup as uniform_soup
    from pdiff_plugin.errors import PDiffError as PDiffError
    from pdiff_plugin.evaluation.alignment import check_alignment as check_alignment
    from pdiff_plugin.evaluation.choice import Choice as Choice
    from pdiff_plugin.evaluation.condition_page import write_condition_report as write_condition_report
    from pdiff_plugin.evaluation.condition_result import ConditionEvaluation as ConditionEvaluation
    from pdiff_plugin.evaluation.conditions import evaluate_conditions as evaluate_conditions
    from pdiff_plugin.evaluation.evaluate import evaluate as evaluate
    from pdiff_plugin.evaluation.page import write_report as write_report
    from pdiff_plugin.evaluation.result import Evaluation as Evaluation
    from pdiff_plugin.evaluation.sweep import Sweep as Sweep
    from pdiff_plugin.evaluation.sweep import sweep as sweep
    from pdiff_plugin.evaluation.task import Task as Task
    from pdiff_plugin.evaluation.task_loss import task_loss as task_loss
    from pdiff_plugin.fitting.fit import fit as fit
    from pdiff_plugin.fitting.refine import refine as refine
    from pdiff_plugin.generator.generator import WeightGenerator as WeightGenerator
    from pdiff_plugin.generator.weights import WeightSet as WeightSet
    from pdiff_plugin.loggers import LightningLogger as LightningLogger
    from pdiff_plugin.loggers import Logger as Logger
    from pdiff_plugin.loggers import MlflowLogger as MlflowLogger
    from pdiff_plugin.loggers import TensorBoardLogger as TensorBoardLogger
    from pdiff_plugin.loggers import WandbLogger as WandbLogger
    from pdiff_plugin.modules.swap import swap_ as swap_
    from pdiff_plugin.modules.swap import swapped as swapped
    from pdiff_plugin.recording.checkpoints import import_checkpoints as import_checkpoints
    from pdiff_plugin.recording.collect import collect as collect
    from pdiff_plugin.recording.recorder import PDiffRecorder as PDiffRecorder
    from pdiff_plugin.snapshots.conditions import set_conditions as set_conditions
    from pdiff_plugin.snapshots.layout import Layout as Layout
    from pdiff_plugin.snapshots.merge import MergeReport as MergeReport
    from pdiff_plugin.snapshots.merge import merge_stores as merge_stores
    from pdiff_plugin.snapshots.store import SnapshotStore as SnapshotStore

_HOME = {
    "Choice": "evaluation.choice",
    "ConditionEvaluation": "evaluation.condition_result",
    "CollectConfig": "config",
    "ConvConfig": "config",
    "Cycle": "config",
    "DiffusionConfig": "config",
    "Dial": "ensemble.dial",
    "DiffusionEnsemble": "ensemble.ensemble",
    "EvaluateConditionsConfig": "config",
    "EvaluateConfig": "config",
    "Evaluation": "evaluation.result",
    "ConditionConfig": "config",
    "set_conditions": "snapshots.conditions",
    "FitConfig": "config",
    "Layout": "snapshots.layout",
    "LightningLogger": "loggers",
    "Logger": "loggers",
    "MergeReport": "snapshots.merge",
    "MlflowLogger": "loggers",
    "TensorBoardLogger": "loggers",
    "WandbLogger": "loggers",
    "PDiffError": "errors",
    "PDiffRecorder": "recording.recorder",
    "Perturb": "config",
    "RecorderConfig": "config",
    "RefineConfig": "config",
    "Reinit": "config",
    "SamplingConfig": "config",
    "SnapshotStore": "snapshots.store",
    "SubspaceConfig": "config",
    "Sweep": "evaluation.sweep",
    "Task": "evaluation.task",
    "WeightGenerator": "generator.generator",
    "WeightSet": "generator.weights",
    "best_member": "ensemble.soup",
    "check_alignment": "evaluation.alignment",
    "collect": "recording.collect",
    "ensemble_from_diffusion": "ensemble.ensemble",
    "evaluate": "evaluation.evaluate",
    "evaluate_conditions": "evaluation.conditions",
    "fit": "fitting.fit",
    "greedy_soup": "ensemble.soup",
    "import_checkpoints": "recording.checkpoints",
    "merge_stores": "snapshots.merge",
    "recalibrate_batchnorm": "ensemble.batchnorm",
    "refine": "fitting.refine",
    "swap_": "modules.swap",
    "swapped": "modules.swap",
    "sweep": "evaluation.sweep",
    "task_loss": "evaluation.task_loss",
    "uniform_soup": "ensemble.soup",
    "write_condition_report": "evaluation.condition_page",
    "write_report": "evaluation.page",
}

__all__ = [  # noqa: RUF022 (the order of the path: record, fit, sample, swap, judge)
    "PDiffRecorder",
    "RecorderConfig",
    "collect",
    "CollectConfig",
    "Perturb",
    "Reinit",
    "Cycle",
    "import_checkpoints",
    "SnapshotStore",
    "Layout",
    "ConditionConfig",
    "set_conditions",
    "merge_stores",
    "MergeReport",
    "FitConfig",
    "SubspaceConfig",
    "ConvConfig",
    "DiffusionConfig",
    "fit",
    "refine",
    "RefineConfig",
    "task_loss",
    "WeightGenerator",
    "SamplingConfig",
    "WeightSet",
    "swapped",
    "swap_",
    "ensemble_from_diffusion",
    "DiffusionEnsemble",
    "Dial",
    "uniform_soup",
    "greedy_soup",
    "best_member",
    "recalibrate_batchnorm",
    "Task",
    "check_alignment",
    "evaluate",
    "EvaluateConfig",
    "Evaluation",
    "Choice",
    "evaluate_conditions",
    "EvaluateConditionsConfig",
    "ConditionEvaluation",
    "sweep",
    "Sweep",
    "write_report",
    "write_condition_report",
    "Logger",
    "TensorBoardLogger",
    "WandbLogger",
    "MlflowLogger",
    "LightningLogger",
    "PDiffError",
]


def __getattr__(name: str) -> _Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
