"""Every error this package raises on purpose.

Each one names the thing, what was found, what was expected and the next move. It is rebuilt from its fields, so that it
survives the pickle trip home from a worker process.

    PDiffError
    ├── ConfigError               (ValueError)         a setting is out of range
    │   └── DataError                                  what a user's loader or model gave
    ├── SelectionError            (ValueError)         `layers` picks nothing, or nothing that is trained
    ├── LayoutMismatchError       (ValueError)         tensors differ from those recorded
    │   └── StoresDifferError                          stores of other tensors are to be merged
    ├── UnsupportedTensorError    (TypeError)          a tensor that cannot be recorded
    ├── StoreNotFoundError        (FileNotFoundError)  a path that is not a snapshot store
    ├── GeneratorNotFoundError    (FileNotFoundError)  a path without a generator file
    ├── EvaluationNotFoundError   (FileNotFoundError)  a path without an evaluation
    ├── WeightsNotKeptError       (RuntimeError)       weights are asked of an evaluation that was read from a file
    ├── FormatError               (ValueError)         a file that is not what it should be
    ├── FormatVersionError        (ValueError)         written by a newer release
    ├── CheckpointError           (ValueError)         a checkpoint that cannot be imported
    ├── ConditionError            (ValueError)         a run's condition that is none, or unlike those of other runs
    │   └── UnknownConditionError                      members for a condition that could not have been recorded
    ├── TrajectoryExistsError     (FileExistsError)    recording would add to somebody's finished run
    ├── TrajectoryInUseError      (RuntimeError)       another process records into the same trajectory
    ├── UnmergeableStoreError     (ValueError)         a store that cannot be merged with others
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
    ├── BucketError               (OSError)            a bucket that refuses us, or does not answer
    ├── HubError                  (OSError)            the Hugging Face Hub refuses us, or does not answer
    ├── FolderInUseError          (RuntimeError)       another process writes to a folder
    ├── StorageError              (OSError)            no room on a disk, or one that can only be read
    ├── StorageNotSharedError     (FileNotFoundError)  a path that a node of the cluster cannot see
    └── WorkersFailedError        (RuntimeError)       workers died or failed more often than allowed
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any

__all__ = [
    "BucketError",
    "CheckpointError",
    "ClusterAccessError",
    "ClusterTooSmallError",
    "ClusterUnreachableError",
    "ConcurrentUseError",
    "ConditionError",
    "ConfigError",
    "DataError",
    "EvaluationNotFoundError",
    "FitExistsError",
    "FolderInUseError",
    "FormatError",
    "FormatVersionError",
    "GeneratorNotFoundError",
    "HubError",
    "LayoutMismatchError",
    "MembersExistError",
    "MissingDependencyError",
    "NotHookableError",
    "PDiffError",
    "SelectionError",
    "StorageError",
    "StorageNotSharedError",
    "StoreNotFoundError",
    "StoresDifferError",
    "TrainingModeError",
    "TrajectoryExistsError",
    "TrajectoryInUseError",
    "UnknownConditionError",
    "UnmergeableStoreError",
    "UnsupportedTensorError",
    "UnusableSnapshotsError",
    "WeightsNotKeptError",
    "WorkersFailedError",
]


# Names of tensors, runs and folders come out of strangers' files: what would move the cursor, colour the rest of the
# screen, turn the direction of text or cannot be encoded is shown as an escape instead.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_FOUND = 400  # characters of what a file holds in an error


def visible(text: str) -> str:
    """``text`` with its control characters as escapes; line breaks and tabs stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class PDiffError(Exception):
    """Base of all errors raised on purpose. Each one is a dataclass; its ``args`` are the text that it shows.

    The text has no control characters, whatever the names in it.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__str__" in vars(cls):
            tell = cls.__str__
            setattr(cls, "__str__", wraps(tell)(lambda self: visible(tell(self))))  # noqa: B010 (mypy refuses the other)

    def __post_init__(self) -> None:
        # OSError would read two arguments as errno and strerror: here they are neither, and both stay None.
        self.args = (str(self),)

    def __reduce__(self) -> Any:
        if not is_dataclass(self):  # somebody's own subclass
            return super().__reduce__()
        return type(self), tuple(getattr(self, field.name) for field in fields(self)), vars(self)


@dataclass(eq=False)
class ConfigError(PDiffError, ValueError):
    """A setting has a value that cannot work."""

    field: str
    found: Any
    expected: str

    def __str__(self) -> str:
        return f"{self.field} = {self.found!r}: it {self.expected}."


class DataError(ConfigError):
    """What a user's loader or model gave is not what it must be."""


@dataclass(eq=False)
class SelectionError(PDiffError, ValueError):
    """``layers`` picks nothing that can be recorded."""

    layers: str
    reason: str
    nearest: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        text = f"layers={self.layers} {self.reason}."
        if self.nearest:
            text += f" Nearest names in this model: {', '.join(self.nearest)}."
        return f"{text} {self.advice}".rstrip()


@dataclass(eq=False)
class LayoutMismatchError(PDiffError, ValueError):
    """Tensors differ from the recorded layout; the first difference is named."""

    name: str
    expected: str
    found: str
    where: str = "the store"

    def __str__(self) -> str:
        return (
            f"tensor {self.name!r}: {self.where} recorded {self.expected}, found {self.found}. "
            "Build the model as in the recorded run, or record into a new store."
        )


@dataclass(eq=False)
class StoresDifferError(LayoutMismatchError):
    """Stores of other tensors are to be merged; the first difference is named."""

    other: str = "the other"

    def __str__(self) -> str:
        return (
            f"tensor {self.name!r}: {self.where} has {self.expected}, {self.other} has {self.found}. Stores can be "
            "merged if they hold the same tensors: leave one of the two out."
        )


@dataclass(eq=False)
class UnsupportedTensorError(PDiffError, TypeError):
    """A tensor that cannot be part of a snapshot."""

    name: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"tensor {self.name!r} is {self.found}; {self.expected}."


@dataclass(eq=False)
class StoreNotFoundError(PDiffError, FileNotFoundError):
    """A path that is not a snapshot store."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path} is not a snapshot store: {self.reason}. "
            "Give the folder that PDiffRecorder wrote (it holds layout.json and trajectories/, or shards/)."
        )


@dataclass(eq=False)
class GeneratorNotFoundError(PDiffError, FileNotFoundError):
    """A path without a generator file."""

    path: str

    def __str__(self) -> str:
        return f"{self.path} holds no generator.safetensors. Give the --out folder of a finished `pdiff fit`."


@dataclass(eq=False)
class EvaluationNotFoundError(PDiffError, FileNotFoundError):
    """A path without an evaluation."""

    path: str
    name: str = "evaluation.json"

    def __str__(self) -> str:
        return f"{self.path} holds no {self.name}. Give the --out folder of `pdiff evaluate` or of `pdiff demo`."


@dataclass(eq=False)
class WeightsNotKeptError(PDiffError, RuntimeError):
    """An evaluation that was read from a file has no weights."""

    num_passes: str

    def __str__(self) -> str:
        return (
            "this evaluation was read from a file, which tells what was chosen and holds no weights. `pdiff evaluate "
            f"FIT --task MODULE:FUNCTION --save-best DIR --best-passes {self.num_passes}` makes them; in Python, "
            "evaluate() returns a result whose best() has them."
        )


@dataclass(eq=False)
class FormatError(PDiffError, ValueError):
    """A file is not what its place says it is."""

    path: str
    found: str
    expected: str
    advice: str = "Check the path; if it is right, copy the file again or write it anew."

    def __str__(self) -> str:
        found = str(self.found)
        found = found if len(found) <= _MAX_FOUND else f"{found[:_MAX_FOUND]}..."
        return f"{self.path}: found {found}, expected {self.expected}. {self.advice}".rstrip()


@dataclass(eq=False)
class FormatVersionError(PDiffError, ValueError):
    """A file was written by a newer release."""

    path: str
    found: int
    supported: int

    def __str__(self) -> str:
        return (
            f"{self.path} has format version {self.found}; this release reads versions up to {self.supported}. "
            "Upgrade with `pip install --upgrade pdiff-plugin`."
        )


@dataclass(eq=False)
class CheckpointError(PDiffError, ValueError):
    """A checkpoint that cannot be imported."""

    path: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path} cannot be imported: {self.reason}. {self.advice}"


@dataclass(eq=False)
class ConditionError(PDiffError, ValueError):
    """The condition of a run is none, or does not fit those of other runs."""

    where: str
    found: str
    expected: str

    def __str__(self) -> str:
        return (
            f"condition of {self.where}: found {self.found}, expected {self.expected}. Give all runs of a store the "
            "same names, and values of one type under each; `pdiff condition STORE` shows and sets those recorded."
        )


@dataclass(eq=False)
class UnknownConditionError(ConditionError):
    """Members are asked for at a condition that could not have been recorded, or outside the recorded range."""

    def __str__(self) -> str:
        return (
            f"{self.where}: found {self.found}, expected {self.expected}. `pdiff inspect FIT` shows what was recorded."
        )


@dataclass(eq=False)
class TrajectoryExistsError(PDiffError, FileExistsError):
    """Recording would add to a trajectory that already holds snapshots."""

    path: str
    num_snapshots: int

    def __str__(self) -> str:
        return (
            f"{self.path} already holds {self.num_snapshots} snapshots. Choose another trajectory name (or none, for "
            "the next free one); to continue this run, restore the recorder with load_state_dict() first."
        )


@dataclass(eq=False)
class TrajectoryInUseError(PDiffError, RuntimeError):
    """Another process records into the same trajectory."""

    path: str
    writer: str

    def __str__(self) -> str:
        return (
            f"{self.path} belongs to {self.writer}, which is recording into it. Two trainings must not write into one "
            "trajectory: stop one of them, or give this one another trajectory name (or none, for the next free one)."
        )


@dataclass(eq=False)
class UnmergeableStoreError(PDiffError, ValueError):
    """A store cannot be merged with others."""

    path: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path} cannot be merged: {self.reason}. {self.advice}."


@dataclass(eq=False)
class UnusableSnapshotsError(PDiffError, ValueError):
    """The snapshots of a store cannot be fitted."""

    path: str
    found: str
    expected: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, expected {self.expected}. {self.advice}"


@dataclass(eq=False)
class FitExistsError(PDiffError, FileExistsError):
    """The output folder holds a fit of other settings or other snapshots."""

    path: str
    difference: str

    def __str__(self) -> str:
        return (
            f"{self.path} holds another fit ({self.difference}). "
            "Choose another output folder, or pass --fresh (fresh=True) to replace it."
        )


@dataclass(eq=False)
class MembersExistError(PDiffError, FileExistsError):
    """The output folder of `pdiff generate` holds members already."""

    path: str
    num_members: int

    def __str__(self) -> str:
        return (
            f"{self.path} already holds {self.num_members} members. "
            "Choose another output folder, or pass --overwrite to replace them."
        )


@dataclass(eq=False)
class TrainingModeError(PDiffError, RuntimeError):
    """An ensemble was given a model in train mode."""

    module: str

    def __str__(self) -> str:
        return (
            f"{self.module} is in train mode, in which members would share dropout and overwrite BatchNorm statistics. "
            "Call .eval() on the model (or the ensemble) first."
        )


@dataclass(eq=False)
class ConcurrentUseError(PDiffError, RuntimeError):
    """A model is in use by an ensemble that is running."""

    module: str

    def __str__(self) -> str:
        return (
            f"an ensemble over this {self.module} is already running, and its members take turns inside the live "
            "model. Give each thread its own copy.deepcopy of the model or the ensemble."
        )


@dataclass(eq=False)
class NotHookableError(PDiffError, TypeError):
    """An optimizer whose steps cannot be observed."""

    optimizer: str

    def __str__(self) -> str:
        return (
            f"{self.optimizer} has no step hooks: expected a torch.optim.Optimizer, or a wrapper with one as "
            "`.optimizer`. Attach without it, recorder.attach(model), and call recorder.step() after each update."
        )


@dataclass(eq=False)
class MissingDependencyError(PDiffError, ImportError):
    """An optional package is not installed."""

    package: str
    extra: str

    def __str__(self) -> str:
        return f'{self.package} is not installed. Install it with: pip install "pdiff-plugin[{self.extra}]"'


@dataclass(eq=False)
class ClusterUnreachableError(PDiffError, ConnectionError):
    """No Ray cluster answers at an address."""

    address: str
    reason: str

    def __str__(self) -> str:
        return (
            f"no Ray cluster at {self.address}: {self.reason}. Give --address (or RAY_ADDRESS) the host:port that "
            "`ray start --head` printed, or leave both out to work on this machine."
        )


@dataclass(eq=False)
class ClusterAccessError(PDiffError, PermissionError):
    """A Ray cluster refuses us."""

    address: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.address} does not let this process in ({self.reason}). If the cluster asks for a token: "
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own token. "
            "Otherwise: is it Ray that listens there, and of the same version?"
        )


@dataclass(eq=False)
class ClusterTooSmallError(PDiffError, RuntimeError):
    """A cluster can never run what was asked of it."""

    asked: str
    found: str
    waited_s: int

    def __str__(self) -> str:
        return (
            f"asked for {self.asked}; there is room for {self.found}. Waited {self.waited_s} s (--start-timeout-s). "
            "Lower --num-workers, --cpus-per-worker or --gpus-per-worker, pass --elastic, or add nodes."
        )


@dataclass(eq=False)
class StorageError(PDiffError, OSError):
    """A file cannot be written where it belongs."""

    path: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be written: {self.reason}. {self.advice}. "
            "Run again, a fit or a search goes on where it was."
        )


@dataclass(eq=False)
class BucketError(PDiffError, OSError):
    """A bucket refuses us, or does not answer."""

    url: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.url}: {self.reason}. Check its name and the credentials and service address in the environment (of "
            "s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL) on every node, and that "
            "they may list, read and write there; then run the same command again."
        )


@dataclass(eq=False)
class HubError(PDiffError, OSError):
    """The Hugging Face Hub refuses us, or does not answer."""

    repo_id: str
    reason: str

    def __str__(self) -> str:
        return (
            f"hf://{self.repo_id}: {self.reason.rstrip('.')}. Check the name and the revision; a repository that is "
            "private or yours needs `hf auth login` or HF_TOKEN."
        )


@dataclass(eq=False)
class FolderInUseError(PDiffError, RuntimeError):
    """Another process writes to a folder: a fit in a bucket, or a store that others are merged into."""

    url: str
    owner: str

    def __str__(self) -> str:
        return f"{self.url} is in use: {self.owner} writes to it. Wait until that has ended, or choose another folder."


@dataclass(eq=False)
class StorageNotSharedError(PDiffError, FileNotFoundError):
    """A node of the cluster cannot see a path that its workers need."""

    path: str
    node: str

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be seen from node {self.node}. Put it on storage that every node mounts at the same "
            "path, or in a bucket (s3://...)."
        )


@dataclass(eq=False)
class WorkersFailedError(PDiffError, RuntimeError):
    """Workers died or failed more often than allowed, or could not be replaced."""

    worker: str
    cause: str
    advice: str

    def __str__(self) -> str:
        return f"{self.worker}: {self.cause}. {self.advice}"
