"""Every error this package raises on purpose.

Each one names the thing, what was found, what was expected and the next move. The fields go to ``super()`` and the text
is built in ``__str__``, so that an error survives the pickle trip home from a worker process.

    PDiffError
    ├── ConfigError               (ValueError)         a setting is out of range
    ├── SelectionError            (ValueError)         `layers` picks nothing, or nothing that is trained
    ├── LayoutMismatchError       (ValueError)         tensors differ from those recorded
    ├── UnsupportedTensorError    (TypeError)          a tensor that cannot be recorded
    ├── StoreNotFoundError        (FileNotFoundError)  a path that is not a snapshot store
    ├── GeneratorNotFoundError    (FileNotFoundError)  a path without a generator file
    ├── EvaluationNotFoundError   (FileNotFoundError)  a path without an evaluation
    ├── WeightsNotKeptError       (RuntimeError)       weights are asked of an evaluation that was read from a file
    ├── FormatError               (ValueError)         a file that is not what it should be
    ├── FormatVersionError        (ValueError)         written by a newer release
    ├── CheckpointError           (ValueError)         a checkpoint that cannot be imported
    ├── TrajectoryExistsError     (FileExistsError)    recording would add to somebody's finished run
    ├── UnusableSnapshotsError    (ValueError)         empty, too few, constant, or too many non-finite rows
    ├── FitExistsError            (FileExistsError)    the output folder holds another fit
    ├── MembersExistError         (FileExistsError)    the output folder holds members already
    ├── TrainingModeError         (RuntimeError)       an ensemble was given a model in train mode
    ├── ConcurrentUseError        (RuntimeError)       two ensembles would run over one model at the same time
    ├── NotHookableError          (TypeError)          an optimizer without step hooks
    ├── MissingDependencyError    (ImportError)        an optional package is not installed
    ├── ClusterUnreachableError   (ConnectionError)    no Ray cluster answers at an address
    ├── ClusterAccessError        (PermissionError)    a Ray cluster refuses us
    ├── ClusterTooSmallError      (RuntimeError)       a cluster that can never run what was asked
    ├── StorageNotSharedError     (FileNotFoundError)  a path that a node of the cluster cannot see
    └── WorkersFailedError        (RuntimeError)       workers died or failed more often than allowed
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CheckpointError",
    "ClusterAccessError",
    "ClusterTooSmallError",
    "ClusterUnreachableError",
    "ConcurrentUseError",
    "ConfigError",
    "EvaluationNotFoundError",
    "FitExistsError",
    "FormatError",
    "FormatVersionError",
    "GeneratorNotFoundError",
    "LayoutMismatchError",
    "MembersExistError",
    "MissingDependencyError",
    "NotHookableError",
    "PDiffError",
    "SelectionError",
    "StorageNotSharedError",
    "StoreNotFoundError",
    "TrainingModeError",
    "TrajectoryExistsError",
    "UnsupportedTensorError",
    "UnusableSnapshotsError",
    "WeightsNotKeptError",
    "WorkersFailedError",
]


class PDiffError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(PDiffError, ValueError):
    """A setting has a value that cannot work."""

    def __init__(self, field: str, found: Any, expected: str) -> None:
        # The text goes to super() here, because the command line's parser shows args[0]; pickling rebuilds from fields.
        super().__init__(f"{field} = {found!r}: it {expected}.")
        self.field, self.found, self.expected = field, found, expected

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, Any, str]]:
        return type(self), (self.field, self.found, self.expected)


class SelectionError(PDiffError, ValueError):
    """``layers`` picks nothing that can be recorded."""

    def __init__(self, layers: str, reason: str, nearest: tuple[str, ...] = (), advice: str = "") -> None:
        super().__init__(layers, reason, nearest, advice)
        self.layers, self.reason, self.nearest, self.advice = layers, reason, tuple(nearest), advice

    def __str__(self) -> str:
        text = f"layers={self.layers} {self.reason}."
        if self.nearest:
            text += f" Nearest names in this model: {', '.join(self.nearest)}."
        return f"{text} {self.advice}".rstrip()


class LayoutMismatchError(PDiffError, ValueError):
    """Tensors differ from the recorded layout; the first difference is named."""

    def __init__(self, name: str, expected: str, found: str, where: str = "the store") -> None:
        super().__init__(name, expected, found, where)
        self.name, self.expected, self.found, self.where = name, expected, found, where

    def __str__(self) -> str:
        return (
            f"tensor {self.name!r}: {self.where} recorded {self.expected}, found {self.found}. "
            "Build the model as in the recorded run, or record into a new store."
        )


class UnsupportedTensorError(PDiffError, TypeError):
    """A tensor that cannot be part of a snapshot."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(name, found, expected)
        self.name, self.found, self.expected = name, found, expected

    def __str__(self) -> str:
        return f"tensor {self.name!r} is {self.found}; {self.expected}."


class StoreNotFoundError(PDiffError, FileNotFoundError):
    """A path that is not a snapshot store."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return (
            f"{self.path} is not a snapshot store: {self.reason}. "
            "Give the folder that PDiffRecorder wrote (it holds layout.json and trajectories/)."
        )


class GeneratorNotFoundError(PDiffError, FileNotFoundError):
    """A path without a generator file."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} holds no generator.safetensors. Give the --out folder of a finished `pdiff fit`."


class EvaluationNotFoundError(PDiffError, FileNotFoundError):
    """A path without an evaluation."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} holds no evaluation.json. Give the --out folder of `pdiff evaluate` or of `pdiff demo`."


class WeightsNotKeptError(PDiffError, RuntimeError):
    """An evaluation that was read from a file has no weights."""

    def __init__(self, num_passes: str) -> None:
        super().__init__(num_passes)
        self.num_passes = num_passes

    def __str__(self) -> str:
        return (
            "this evaluation was read from a file, which tells what was chosen and holds no weights. `pdiff evaluate "
            f"FIT --task MODULE:FUNCTION --save-best DIR --best-passes {self.num_passes}` makes them; in Python, "
            "evaluate() returns a result whose best() has them."
        )


class FormatError(PDiffError, ValueError):
    """A file is not what its place says it is."""

    def __init__(self, path: str, found: str, expected: str) -> None:
        super().__init__(path, found, expected)
        self.path, self.found, self.expected = path, found, expected

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, expected {self.expected}."


class FormatVersionError(PDiffError, ValueError):
    """A file was written by a newer release."""

    def __init__(self, path: str, found: int, supported: int) -> None:
        super().__init__(path, found, supported)
        self.path, self.found, self.supported = path, found, supported

    def __str__(self) -> str:
        return (
            f"{self.path} has format version {self.found}; this release reads versions up to {self.supported}. "
            "Upgrade with `pip install --upgrade pdiff-plugin`."
        )


class CheckpointError(PDiffError, ValueError):
    """A checkpoint that cannot be imported."""

    def __init__(self, path: str, reason: str, advice: str) -> None:
        super().__init__(path, reason, advice)
        self.path, self.reason, self.advice = path, reason, advice

    def __str__(self) -> str:
        return f"{self.path} cannot be imported: {self.reason}. {self.advice}"


class TrajectoryExistsError(PDiffError, FileExistsError):
    """Recording would add to a trajectory that already holds snapshots."""

    def __init__(self, path: str, num_snapshots: int) -> None:
        super().__init__(path, num_snapshots)
        self.path, self.num_snapshots = path, num_snapshots

    def __str__(self) -> str:
        return (
            f"{self.path} already holds {self.num_snapshots} snapshots. Choose another trajectory name (or none, for "
            "the next free one); to continue this run, restore the recorder with load_state_dict() first."
        )


class UnusableSnapshotsError(PDiffError, ValueError):
    """The snapshots of a store cannot be fitted."""

    def __init__(self, path: str, found: str, expected: str, advice: str) -> None:
        super().__init__(path, found, expected, advice)
        self.path, self.found, self.expected, self.advice = path, found, expected, advice

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, expected {self.expected}. {self.advice}"


class FitExistsError(PDiffError, FileExistsError):
    """The output folder holds a fit of other settings or other snapshots."""

    def __init__(self, path: str, difference: str) -> None:
        super().__init__(path, difference)
        self.path, self.difference = path, difference

    def __str__(self) -> str:
        return (
            f"{self.path} holds another fit ({self.difference}). "
            "Choose another output folder, or pass --fresh (fresh=True) to replace it."
        )


class MembersExistError(PDiffError, FileExistsError):
    """The output folder of `pdiff generate` holds members already."""

    def __init__(self, path: str, num_members: int) -> None:
        super().__init__(path, num_members)
        self.path, self.num_members = path, num_members

    def __str__(self) -> str:
        return (
            f"{self.path} already holds {self.num_members} members. "
            "Choose another output folder, or pass --overwrite to replace them."
        )


class TrainingModeError(PDiffError, RuntimeError):
    """An ensemble was given a model in train mode."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module

    def __str__(self) -> str:
        return (
            f"{self.module} is in train mode, in which members would share dropout and overwrite BatchNorm statistics. "
            "Call .eval() on the model (or the ensemble) first."
        )


class ConcurrentUseError(PDiffError, RuntimeError):
    """A model is in use by an ensemble that is running."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module

    def __str__(self) -> str:
        return (
            f"an ensemble over this {self.module} is already running, and its members take turns inside the live "
            "model. Give each thread its own copy.deepcopy of the model or the ensemble."
        )


class NotHookableError(PDiffError, TypeError):
    """An optimizer whose steps cannot be observed."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.optimizer = optimizer

    def __str__(self) -> str:
        return (
            f"{self.optimizer} has no step hooks: expected a torch.optim.Optimizer, or a wrapper with one as "
            "`.optimizer`. Attach without it, recorder.attach(model), and call recorder.step() after each update."
        )


class MissingDependencyError(PDiffError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package, self.extra = package, extra

    def __str__(self) -> str:
        return f'{self.package} is not installed. Install it with: pip install "pdiff-plugin[{self.extra}]"'


class ClusterUnreachableError(PDiffError, ConnectionError):
    """No Ray cluster answers at an address."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return (
            f"no Ray cluster at {self.address}: {self.reason}. Give --address (or RAY_ADDRESS) the host:port that "
            "`ray start --head` printed, or leave both out to work on this machine."
        )


class ClusterAccessError(PDiffError, PermissionError):
    """A Ray cluster refuses us."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return (
            f"{self.address} does not let this process in ({self.reason}). If the cluster asks for a token: "
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own token. "
            "Otherwise: is it Ray that listens there, and of the same version?"
        )


class ClusterTooSmallError(PDiffError, RuntimeError):
    """A cluster can never run what was asked of it."""

    def __init__(self, asked: str, found: str, waited_s: int) -> None:
        super().__init__(asked, found, waited_s)
        self.asked, self.found, self.waited_s = asked, found, waited_s

    def __str__(self) -> str:
        return (
            f"asked for {self.asked}; there is room for {self.found}. Waited {self.waited_s} s (--start-timeout-s). "
            "Lower --num-workers, --cpus-per-worker or --gpus-per-worker, pass --elastic, or add nodes."
        )


class StorageNotSharedError(PDiffError, FileNotFoundError):
    """A node of the cluster cannot see a path that its workers need."""

    def __init__(self, path: str, node: str) -> None:
        super().__init__(path, node)
        self.path, self.node = path, node

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be seen from node {self.node}. Put it on storage that every node mounts at the same "
            "path, or in a bucket (s3://...)."
        )


class WorkersFailedError(PDiffError, RuntimeError):
    """Workers died or failed more often than allowed, or could not be replaced."""

    def __init__(self, worker: str, cause: str, advice: str) -> None:
        super().__init__(worker, cause, advice)
        self.worker, self.cause, self.advice = worker, cause, advice

    def __str__(self) -> str:
        return f"{self.worker}: {self.cause}. {self.advice}"
