"""Settings, one frozen dataclass per job.

Field docstrings are the command line's help, field defaults are the only defaults, and the settings of a fit are saved
inside what it made. This module imports nothing heavy, so that ``pdiff --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pdiff_plugin.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow"]
# Samplers by what the denoiser must predict; the table in generator/samplers.py says how each of them works. The names
# stand here, so that neither the command line nor the refusal of a setting needs torch.
NoiseSampler = Literal["ddpm", "ddim"]
FlowSampler = Literal["flow", "heun"]
AnySampler = Literal["dpm-solver++"]
Sampler = Literal[NoiseSampler, AnySampler, FlowSampler, "one-step"]
DType = Literal["float32", "bfloat16"]
BasisDType = Literal["auto", DType]
RowDType = Literal["float64", "float32", "float16", "bfloat16"]
Standardise = Literal["tensor", "coordinate"]
Network = Literal["residual", "conv"]
LrSchedule = Literal["constant", "cosine"]
Align = Literal["none", "rebasin"]
Centre = Literal["auto", "mean", "nearest", "neighbours", "ridge", "gp", "network"]
Layers = str | Sequence[str] | Callable[[str, "Tensor"], bool]

C = TypeVar("C")

# Above this number of values a direction in float32 takes as much as 0.4 GB.
_MAX_FLOAT32_VALUES = 10**8
# Ten times what anybody uses. A generator's own settings come out of its file, and it is sampled by them.
_MAX_TIMESTEPS = 10_000


def configured(kind: type[C], config: C | None, changes: Mapping[str, Any]) -> C:
    """The settings of one job: ``config`` (the defaults unless given) with single fields changed.

    So that every job can be told its settings as one object, or field by field, or both:
    ``sample(16, SamplingConfig(diversity=0.5))`` and ``sample(16, diversity=0.5)``.

    Raises:
        TypeError: a name that is no field, as for any function that is called with an unknown argument.
        ConfigError: a value out of range.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    for name in changes:
        if name not in known:
            raise TypeError(f"unexpected argument {name!r}; {kind.__name__} has {', '.join(known)}")
    if config is None:
        return kind(**changes)
    return replace(config, **changes) if changes else config  # type: ignore[type-var]  # a dataclass


def _check(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        expected = f"must be at least {low}" if high == float("inf") else f"must be from {low} to {high}"
        raise ConfigError(name, value, expected)


def _check_choice(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        raise ConfigError(name, value, f"must be one of {', '.join(get_args(kind))}")


def _typed(kind: type[C], values: dict[str, Any]) -> C:
    """Settings from a document, each of the type that its field has."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is_of(value, hints[name]):
            raise ConfigError(name, value, f"must be of the type {getattr(hints[name], '__name__', hints[name])}")
    return kind(**values)


def _is_of(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    if hint is float:
        return type(value) in (int, float)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(one, inner[0]) for one in value)
    if get_origin(hint) is Literal:
        return type(value) is str and value in inner
    # Of several types one; a bool is no number.
    return any(_is_of(value, one) for one in inner) if inner else type(value) is hint


def check_sampler(sampler: Sampler, prediction_type: PredictionType) -> None:
    """Raise :class:`ConfigError` for a sampler that does not fit what the denoiser predicts."""
    own = FlowSampler if prediction_type == "flow" else NoiseSampler
    fitting = [*sorted(get_args(own)), *get_args(AnySampler)]
    if sampler not in (*fitting, "one-step"):
        named = f"{', '.join(map(repr, fitting[:-1]))} or {fitting[-1]!r}"
        raise ConfigError("sampler", sampler, f"must be {named} for a denoiser that predicts {prediction_type}")


@dataclass(frozen=True, kw_only=True)
class RecorderConfig:
    """What a recorder takes of a training, and when."""

    layers: Layers = "last-norms:2"
    """Which tensors: last-norms:N, norms, head, lora, all, a glob of names, a list of these, or a function."""
    every_n_steps: int | None = None
    """Optimizer steps between snapshots. Unless given, as few as `max_snapshots` allows."""
    last_epochs: int = 1
    """The window is this many epochs at the end of training, where their length is known, unless `last_steps` is
    given."""
    last_steps: int | None = None
    """The window is this many optimizer steps at the end of training."""
    max_snapshots: int = 300
    """Most snapshots kept. Without a length of epochs and `last_steps` the window is as many steps; while the end of
    training is not known, the newest are kept."""
    keep_newest: bool = False
    """Take the end as not known, even from a trainer that plans one: for training that may stop early. Snapshots are
    then written from the first step on, and the oldest deleted."""
    keep_sparse: bool = True
    """Until the window has enough of them, keep sparse snapshots from before it, in case training ends there. About as
    many are written as the window has (100 where an epoch has fewer steps), and the oldest deleted."""
    trajectory: str | None = None
    """Name of this run in the store; the next free `run-001`, `run-002`, ... unless given."""
    freeze_rest: bool = False
    """Train only the chosen tensors during the window, as the p-diff paper does."""
    dtype: RowDType = "float32"
    """Of the numbers on disk; `bfloat16` is half the size."""
    save_base: bool = True
    """Also keep the whole model of the last snapshot, once."""
    condition: Mapping[str, Any] | str | Sequence[str] | None = None
    """The setting that this run is trained at, kept beside its snapshots: names and numbers, text, true or false, or
    lists of numbers. All runs of a store have the same names. Under Lightning, transformers and Ray also `hparams`,
    or the names of some."""

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "last_epochs", "last_steps", "max_snapshots"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 1)
        _check_choice("dtype", self.dtype, RowDType)
        _keep_layers(self)
        if self.freeze_rest and self.keep_newest:
            raise ConfigError("freeze_rest", True, "needs to know where the window begins: leave keep_newest out")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON; of a function as ``layers`` only its name, ``condition`` if there is one."""
        layers = self.layers
        plain = layers_name(layers) if callable(layers) else layers if isinstance(layers, str) else list(layers)
        fields = {**vars(self), "layers": plain}
        # Trainers tell recorders apart by these, in checkpoints of earlier releases too, which do not know them all.
        newer = {"condition": None, "keep_sparse": True}
        return {name: value for name, value in fields.items() if name not in newer or value != newer[name]}


@dataclass(frozen=True, kw_only=True)
class Perturb:
    """The first branch starts from the given weights, the others from them plus noise.

    The cheapest and the least different: where training removes the noise again, there is one mode several times.
    """

    noise: float = 0.5
    """In standard deviations of each tensor's own values; a constant tensor gets none."""
    warmup_steps: int = 0
    """Steps of each trajectory before its first snapshot."""

    def __post_init__(self) -> None:
        if self.noise <= 0:
            raise ConfigError("noise", self.noise, "must be positive, or all branches would be the same")
        _check("warmup_steps", self.warmup_steps, 0)

    def num_warmup(self, num_snapshots: int) -> int:
        """Steps before the first of ``num_snapshots``."""
        return self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class Reinit:
    """Each branch starts from newly initialised layers.

    More different, at the price of a warm-up each; what these layers had learnt is learnt anew, so compare the losses
    with the given model's.
    """

    warmup_steps: int | None = None
    """Steps of each trajectory before its first snapshot, whose weights are worth nothing; as many as there are
    snapshots unless given."""

    def __post_init__(self) -> None:
        _check("warmup_steps", self.warmup_steps or 0, 0)

    def num_warmup(self, num_snapshots: int) -> int:
        """Steps before the first of ``num_snapshots``."""
        return num_snapshots if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """One run after the other, each from where the last one ended.

    The learning rate falls from its top to almost 0 along a cosine, then starts again (Huang et al. 2017, arXiv
    1704.00109); only the low end of each cycle is recorded. The longest: every trajectory costs full training steps.
    """

    warmup_steps: int | None = None
    """Steps of each trajectory before its first snapshot; three times the snapshots unless given, so that a cycle is
    recorded in its last quarter, below 15 % of its top rate."""

    def __post_init__(self) -> None:
        _check("warmup_steps", self.warmup_steps or 0, 0)

    def num_warmup(self, num_snapshots: int) -> int:
        """Steps before the first of ``num_snapshots``."""
        return 3 * num_snapshots if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """The paper's own procedure: which layers of a finished model are trained further, and how they are recorded."""

    layers: Layers = "last-norms:2"
    """Which tensors, as for the recorder."""
    num_snapshots: int = 300
    """Of each trajectory: its last steps, one snapshot each."""
    lr: float = 3e-2
    """Learning rate of AdamW: constant, or the top of each cycle."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    trajectory: str | None = None
    """Name of this run in the store (of several: NAME-1, NAME-2, ...); the next free one unless given."""
    num_trajectories: int = 1
    """How many short trainings of the chosen layers are recorded, each a trajectory of its own."""
    restart: Perturb | Reinit | Cycle = field(default_factory=Perturb)
    """How they come to differ."""
    seed: int = 0
    """Seed of the noise or the new values that they start from."""
    dtype: RowDType = "float32"
    """Of the numbers on disk; `bfloat16` is half the size."""
    save_base: bool = True
    """Also keep the whole model of the last snapshot of each trajectory."""

    def __post_init__(self) -> None:
        for name in ("num_snapshots", "num_trajectories"):
            _check(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay"):
            _check(name, getattr(self, name), 0)
        _check_choice("dtype", self.dtype, RowDType)
        _keep_layers(self)
        if not isinstance(self.restart, Perturb | Reinit | Cycle):
            raise ConfigError("restart", self.restart, "must be Perturb(), Reinit() or Cycle()")


def layers_name(layers: Callable[..., bool]) -> str:
    """A function given as ``layers`` as text: the same for the same function in another process."""
    return f"<function {getattr(layers, '__name__', type(layers).__name__)}>"


def _keep_layers(config: RecorderConfig | CollectConfig) -> None:
    """Check ``layers``, and keep several as a tuple: one that came through JSON is then equal to the one that went."""
    layers = config.layers
    if isinstance(layers, str) and layers.startswith("<function "):
        raise ConfigError(
            "layers",
            layers,
            "was a function, which settings in a checkpoint only name: pass the function itself "
            "(in transformers, without restore_callback_states_from_checkpoint)",
        )
    if not isinstance(layers, str) and not callable(layers):
        object.__setattr__(config, "layers", tuple(layers))


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """The `subspace` autoencoder: leading principal directions of the standardised snapshots."""

    kind: ClassVar[Literal["subspace"]] = "subspace"

    latent_dim: int = 64
    """Largest number of directions per trajectory; fewer are kept when fewer reach `explained_variance`. Of runs with
    conditions four times as many for all of them together."""
    explained_variance: float = 0.999
    """Share of the snapshots' movement within their trajectory that the kept directions must reach, if `latent_dim`
    allows."""
    basis_dtype: BasisDType = "auto"
    """How directions are stored; `bfloat16` halves the generator file and puts members off by 0.2 % of the distance to
    the snapshots' mean. `auto` is `bfloat16` for snapshots of more than a hundred million values, else `float32`."""
    min_fidelity: float = 0.9
    """Share of the held-out snapshots' variance that must survive encoding and decoding; below it the fit says so."""

    def __post_init__(self) -> None:
        _check("latent_dim", self.latent_dim, 1)
        _check_choice("basis_dtype", self.basis_dtype, BasisDType)
        _check("explained_variance", self.explained_variance, 0.0, 1.0)
        _check("min_fidelity", self.min_fidelity, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """The `conv` autoencoder of the p-diff paper: strided 1-D convolutions with noise on inputs and latents."""

    kind: ClassVar[Literal["conv"]] = "conv"

    latent_dim: int = 128
    """Latent width, of each chunk if there are several."""
    channels: tuple[int, ...] = (64, 128, 256, 256, 32)
    """Channels of the encoder's layers, each of stride 2; the decoder mirrors them."""
    kernel_size: int = 7
    """Length of every convolution; odd."""
    input_noise: float = 0.001
    """Standard deviation of the noise added to standardised weights while training."""
    latent_noise: float = 0.1
    """Standard deviation of the noise added to latents while training."""
    kl_weight: float = 0.0
    """Weight of the Kullback-Leibler term; above 0 the autoencoder is variational and its own noise replaces
    `latent_noise`."""
    chunk_values: int = 0
    """Cut vectors into chunks of this many values that share the weights, for vectors too long to be taken whole (0).
    Memory then depends on `batch_size` times this, not on their length."""
    standardise: Standardise = "tensor"
    """Subtract one mean per tensor, as published, or one per coordinate."""
    max_steps: int = 500
    """Training steps."""
    batch_size: int = 50
    """Snapshots in a training batch; of each, one chunk at random if there are several."""
    lr: float = 2e-5
    """Learning rate of AdamW, along a half cosine to zero."""
    min_fidelity: float = 0.9
    """Share of the held-out snapshots' variance that must survive encoding and decoding; below it the fit says so."""
    decode_in_train_mode: bool = False
    """Reproduce the published script, which decodes one sample at a time with BatchNorm in train mode."""

    def __post_init__(self) -> None:
        for name in ("latent_dim", "kernel_size", "max_steps"):
            _check(name, getattr(self, name), 1)
        _check("batch_size", self.batch_size, 2)
        _check_choice("standardise", self.standardise, Standardise)
        for name in ("input_noise", "latent_noise", "kl_weight", "chunk_values", "lr"):
            _check(name, getattr(self, name), 0)
        _check("min_fidelity", self.min_fidelity, 0.0, 1.0)
        if self.kernel_size % 2 == 0:
            raise ConfigError("kernel_size", self.kernel_size, "must be odd")
        if not self.channels or min(self.channels) < 1:
            raise ConfigError("channels", self.channels, "must be one or more positive numbers")


AutoencoderConfig = SubspaceConfig | ConvConfig
AutoencoderName = Literal["subspace", "conv"]
AUTOENCODER_CONFIGS: dict[AutoencoderName, type[AutoencoderConfig]] = {"subspace": SubspaceConfig, "conv": ConvConfig}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The latent diffusion: what the denoiser predicts, its size, and how it is trained."""

    prediction_type: PredictionType = "flow"
    """What the denoiser predicts: the noise, the velocity v, or the velocity of a rectified flow."""
    precondition: bool = True
    """Start from the exact denoiser of a normal distribution per trajectory, and let the network add to it."""
    num_timesteps: int = 1000
    """Length T of the noise schedule (`epsilon` and `v_prediction`)."""
    beta_start: float = 1e-4
    """First variance of the linear noise schedule; above 0."""
    beta_end: float = 0.02
    """Last variance of the linear noise schedule."""
    network: Network = "residual"
    """Shape of the denoiser: a residual network, or the p-diff paper's 1-D convolutions over the latent."""
    conv_channels: tuple[int, ...] = (64, 128, 256, 512, 256, 128, 64)
    """Channels of the `conv` network's hidden layers."""
    conv_kernel_size: int = 7
    """Length of the `conv` network's convolutions; odd."""
    scale_latents: bool = True
    """Centre latents and give them unit variance, which the published script does not; `precondition` always does."""
    width: int = 128
    """Width of the denoiser's hidden layers; even."""
    num_blocks: int = 3
    """Residual blocks of the denoiser."""
    max_steps: int = 3000
    """Training steps at most; training stops earlier, see `patience` and `min_novelty`."""
    batch_size: int = 64
    """Latents in a training batch."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    lr_schedule: LrSchedule = "constant"
    """Keep the learning rate, or let it fall along a half cosine to zero at `max_steps`."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    ema_decay: float = 0.995
    """Decay per step of the averaged denoiser, which is the one that samples."""
    eval_every_n_steps: int = 50
    """Steps between two measurements of held-out loss, novelty and spread."""
    patience: int = 6
    """Measurements without improvement of the held-out loss after which training stops; the best weights are kept."""
    min_novelty: float = 0.8
    """Share that must remain of the distance of samples to their nearest snapshot, against that of snapshots to their
    nearest one at another time. Training longer than that copies; 0 lets the held-out loss alone decide."""
    sampler: Sampler | None = None
    """Sampler used unless another is asked for; by default the one that fits the prediction type."""
    num_sampling_steps: int | None = None
    """Sampling steps unless others are asked for; by default the sampler's usual number. For what a step costs, see
    `SamplingConfig`."""
    distill_steps: int = 0
    """Training steps of the `one-step` map from noise to latents, after the diffusion; 0 trains none."""

    def __post_init__(self) -> None:
        _check_choice("prediction_type", self.prediction_type, PredictionType)
        _check_choice("network", self.network, Network)
        _check_choice("lr_schedule", self.lr_schedule, LrSchedule)
        _check("num_timesteps", self.num_timesteps, 2, _MAX_TIMESTEPS)
        if not 0.0 < self.beta_start <= self.beta_end:
            raise ConfigError("beta_start", self.beta_start, f"must be above 0 and at most beta_end={self.beta_end}")
        _check("beta_end", self.beta_end, self.beta_start, 0.999)
        for name in ("width", "num_blocks", "max_steps", "batch_size", "eval_every_n_steps", "patience"):
            _check(name, getattr(self, name), 1)
        _check("min_novelty", self.min_novelty, 0.0)
        if self.width % 2:
            raise ConfigError("width", self.width, "must be even")
        if self.precondition and self.network == "conv":
            raise ConfigError("network", self.network, "goes with precondition = False")
        if self.conv_kernel_size % 2 == 0 or len(self.conv_channels) % 2 == 0:
            raise ConfigError("conv_channels", self.conv_channels, "must be an odd number, and conv_kernel_size too")
        _check("distill_steps", self.distill_steps, 0)
        _check("lr", self.lr, 0.0)
        _check("weight_decay", self.weight_decay, 0.0)
        _check("ema_decay", self.ema_decay, 0.0, 1.0)
        self._check_sampling()

    def _check_sampling(self) -> None:
        is_flow = self.prediction_type == "flow"
        if self.sampler is not None:
            _check_choice("sampler", self.sampler, Sampler)
            check_sampler(self.sampler, self.prediction_type)
        if self.sampler == "one-step" and not self.distill_steps:
            raise ConfigError("sampler", self.sampler, "goes with distill_steps above 0")
        if self.num_sampling_steps is not None:
            _check("num_sampling_steps", self.num_sampling_steps, 1, _MAX_TIMESTEPS if is_flow else self.num_timesteps)


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """What a fit makes of the conditions that runs were recorded at. Without conditions in the store it has no say."""

    use: bool = True
    """Learn weights as a function of the condition. Without it runs are only numbered."""
    kinds: tuple[str, ...] = ()
    """What the values of a name are, where the values do not tell: `NAME:log`, `NAME:cyclic=PERIOD` for those that come
    round, `NAME:category` for numbers that are names. Else numbers are `number`, lists `vector`, and all else
    `category`. Short: `--condition angle:cyclic=360`."""
    centre: Centre = "auto"
    """What is expected at a condition, about which the diffusion then works: one of the regressions, `mean` for a
    diffusion that learns all of it, or `auto` for the best at conditions held out."""
    hold_out: tuple[str, ...] = ()
    """Runs that the fit never sees: their names, or `NAME=VALUE,VALUE` for all at one of these values. Short:
    `--hold-out angle=45,135`."""
    heldout_fraction: float = 0.2
    """Share of the conditions that the centre is chosen and the training is stopped on. The generator is then trained
    once more on all of them."""

    def __post_init__(self) -> None:
        _check_choice("centre", self.centre, Centre)
        _check("heldout_fraction", self.heldout_fraction, 0.0, 0.5)
        for text in self.kinds:
            if not all(text.partition(":")):
                raise ConfigError("kinds", text, "must be NAME:KIND, as in angle:cyclic=360 or lr:log")

    @property
    def kind_of(self) -> dict[str, str]:
        """Name -> kind, of the names whose kind was given."""
        return {name: kind for name, _, kind in (text.rpartition(":") for text in self.kinds)}


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a generator is fitted to a snapshot store."""

    autoencoder: AutoencoderConfig = field(default_factory=SubspaceConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    align: Align = "none"
    """`rebasin` reads later trajectories with their hidden units in the order of the first (weight matching). For plain
    stacks of linear layers and convolutions, recorded whole; `pdiff_plugin.check_alignment` tells whether a model is
    one."""
    heldout_fraction: float = 0.1
    """Share of each trajectory held out, in contiguous blocks, to measure fidelity and to stop on."""
    memory_gb: float = 0.5
    """Bound on the memory for the passes over the snapshots, in GB. Reads are kept small where that is as fast, so a
    higher bound changes little, and never the result."""
    seed: int = 0
    """Seed of every draw made while fitting."""
    device: str = "auto"
    """`auto` takes CUDA, else MPS, else the CPU; or name one, as in `cuda:1`."""
    precision: DType = "float32"
    """Arithmetic of the networks while they train; weights and all else stay float32. `bfloat16` (autocast) halves the
    time of the `paper` preset on a CPU that has it (AVX-512, AMX); the default's small network gains nothing there."""
    compile: bool = False
    """Train with `torch.compile`: up to a minute first, then steps that are about a tenth faster on a CPU."""

    def __post_init__(self) -> None:
        _check_choice("align", self.align, Align)
        _check_choice("precision", self.precision, DType)
        _check("heldout_fraction", self.heldout_fraction, 0.0, 0.5)
        _check("memory_gb", self.memory_gb, 0.001)

    def settled(self, num_values: int, begun: FitConfig | None = None) -> FitConfig:
        """With what `auto` of ``basis_dtype`` stands for, as it is written into files.

        Args:
            num_values: in a snapshot.
            begun: settings of the fit that goes on, which keeps to its own.
        """
        own = self.autoencoder
        if not isinstance(own, SubspaceConfig) or own.basis_dtype != "auto":
            return self
        dtype: BasisDType = "bfloat16" if num_values > _MAX_FLOAT32_VALUES else "float32"
        if begun is not None and isinstance(begun.autoencoder, SubspaceConfig):
            dtype = begun.autoencoder.basis_dtype
        return replace(self, autoencoder=replace(own, basis_dtype=dtype))

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        return {**document, "autoencoder": {"kind": self.autoencoder.kind, **document["autoencoder"]}}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> FitConfig:
        """What :meth:`to_json` gave, or an earlier release did.

        Raises:
            KeyError, TypeError, AttributeError: a part that is missing or none, or a setting that is not known.
            ConfigError: a value of another type, or out of range.
        """

        def plain(part: dict[str, Any]) -> dict[str, Any]:
            # JSON has no tuples.
            return {key: tuple(value) if isinstance(value, list) else value for key, value in part.items()}

        autoencoder = plain(document["autoencoder"])
        # Files from before there was a `kind`.
        kind = autoencoder.pop("kind", "conv" if "channels" in autoencoder else "subspace")
        if kind not in AUTOENCODER_CONFIGS:
            raise ConfigError("autoencoder.kind", kind, f"must be one of {', '.join(AUTOENCODER_CONFIGS)}")
        if kind == "subspace":
            autoencoder = {"basis_dtype": "float32", **autoencoder}  # files from before there was a choice
        parts = {
            "autoencoder": _typed(AUTOENCODER_CONFIGS[kind], autoencoder),
            "diffusion": _typed(DiffusionConfig, plain(document["diffusion"])),
            "condition": _typed(ConditionConfig, plain(document.get("condition", {}))),
        }
        return _typed(cls, {**document, **parts})

    @classmethod
    def paper(cls, *, seed: int = 0, device: str = "auto") -> FitConfig:
        """The published configuration of p-diff (arXiv 2402.13144): nothing held out, no average, no stopping rule.

        Two slips of the published script are not reproduced unless asked for: ``ConvConfig.decode_in_train_mode`` and
        ``DiffusionConfig.scale_latents = False``.
        """
        diffusion = DiffusionConfig(
            prediction_type="epsilon",
            precondition=False,
            network="conv",
            max_steps=1000,
            batch_size=50,
            lr=1e-4,
            lr_schedule="cosine",
            ema_decay=0.0,
            eval_every_n_steps=100,
            min_novelty=0.0,
            sampler="ddpm",
            num_sampling_steps=1000,
        )
        return cls(autoencoder=ConvConfig(), diffusion=diffusion, heldout_fraction=0.0, seed=seed, device=device)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How members are drawn from a fitted generator."""

    sampler: Sampler | None = None
    """By default the one that the generator was configured with, else the natural one of its prediction type."""
    num_sampling_steps: int | None = None
    """Steps from noise to latents; the sampler's usual number unless given. A step evaluates the denoiser once, but
    twice with `heun`, and with `flow` where the generator's denoiser is preconditioned, which is the default."""
    eta: float = 0.0
    """Share of the noise of `ddpm` that `ddim` adds at each step, from 0 (none) to 1 (as much)."""
    temperature: float = 1.0
    """Factor on the noise that sampling starts from, and on what `ddpm` and `ddim` add. Below 1 members move toward the
    centre of the snapshots: a higher mean accuracy, less diversity."""
    diversity: float = 1.0
    """Spread of the members over that of the snapshots, up to 2; it sets the temperature by what the fit measured, on
    top of `temperature`. With a sampler that was not measured it is a temperature itself."""
    trajectory: str | None = None
    """Make members of this run only; all runs in equal numbers unless given."""
    extrapolate: bool = False
    """Make members for a condition outside the recorded range too, where nothing was learned."""

    def __post_init__(self) -> None:
        if self.sampler is not None:
            _check_choice("sampler", self.sampler, Sampler)
        if self.num_sampling_steps is not None:
            _check("num_sampling_steps", self.num_sampling_steps, 1)
        _check("eta", self.eta, 0, 1)
        _check("temperature", self.temperature, 0)
        if not 0 < self.diversity <= 2:
            raise ConfigError("diversity", self.diversity, "must be above 0 and at most 2")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is judged, and how carefully."""

    num_members: int = 32
    """Members of every set (`last` and `swa` have one per run)."""
    num_draws: int = 1
    """Times that random sets are drawn, for errors that know the spread between draws."""
    sets: Literal["all", "core"] | tuple[str, ...] = "all"
    """Names of the sets wanted; `core` judges fewer baselines."""
    seed: int = 0
    """Seed of every draw."""
    recalibrate: bool = False
    """Score every member, snapshots included, with BatchNorm statistics recomputed on the task's training data."""
    num_retrained: int = 5
    """Members of the deep ensemble, where a training function is given."""
    memory_gb: float = 2.0
    """Bound on the memory for snapshots and members, in GB, beside the model and a batch's outputs. What is larger is
    kept in mapped files meanwhile: 2 GiB of members, or one set, in the folder for temporary files."""
    quick: bool = False
    """An answer for about a tenth of the forward passes, with wider errors: at most 8 members, one draw, the `core`
    sets in place of `all`, and 15 snapshots to compare errors with instead of 100."""

    def __post_init__(self) -> None:
        for name in ("num_members", "num_draws", "num_retrained"):
            _check(name, getattr(self, name), 1)
        _check("memory_gb", self.memory_gb, 0.001)

    @property
    def num_references(self) -> int:
        """Snapshots whose errors are compared with everybody's; more would cost as many forward passes of the tail."""
        # Every other one of twice as many, less one, is a member of the set of snapshots.
        return 2 * self.num_members - 1 if self.quick else max(100, self.num_members)

    def in_effect(self) -> EvaluateConfig:
        """With what ``quick`` changes."""
        if not self.quick:
            return self
        sets = "core" if self.sets == "all" else self.sets
        return replace(self, num_members=min(self.num_members, 8), num_draws=1, sets=sets)


@dataclass(frozen=True, kw_only=True)
class EvaluateConditionsConfig:
    """What is judged over conditions, and what training may take."""

    num_members: int = EvaluateConfig.num_members
    """Members of the generated ensembles, and snapshots at most of those that were recorded there."""
    seed: int = 0
    """Seed of every draw."""
    joint_steps: int = 1000
    """Steps of one joint model, trained on all fitted conditions mixed, where a training function is given; 0 makes
    none."""
    fine_tune_steps: tuple[int, ...] = (10, 50)
    """Steps of training at the condition itself, from the average, the nearest and the generated weights, where a
    training function is given."""
    train_seconds: float | None = None
    """What training at one condition costs, in seconds, for the sentence. Unless given, it is taken from the training
    function's pace and the steps that were recorded."""

    def __post_init__(self) -> None:
        _check("num_members", self.num_members, 1)
        _check("joint_steps", self.joint_steps, 0)
        for steps in self.fine_tune_steps:
            _check("fine_tune_steps", steps, 1)
        if self.train_seconds is not None:
            _check("train_seconds", self.train_seconds, 0)


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """How long and how freely a generator learns from the loss of a task."""

    num_steps: int = 1000
    """Steps of the optimizer."""
    conditions_per_step: int = 8
    """Conditions in each step, one batch at each of them."""
    num_directions: int = 16
    """Directions among the weights that are added to those in which recorded runs differ."""
    lr: float = 1e-3
    """Learning rate at the start; it falls to zero along a cosine."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        _check("num_steps", self.num_steps, 1)
        _check("conditions_per_step", self.conditions_per_step, 1)
        _check("num_directions", self.num_directions, 1)
        _check("lr", self.lr, 0)
        _check("seed", self.seed, 0)


# Bound on what each worker of a fit keeps on disk of a store in a bucket, in GB.
CACHE_GB = 10.0


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Where work is done: in this process, on several workers of this machine, or on a Ray cluster."""

    num_workers: int = 1
    """Processes that share the work. With more than one, or an address, it runs on Ray."""
    address: str | None = None
    """host:port of a running Ray cluster; RAY_ADDRESS unless given. Without both, Ray starts on this machine."""
    gpus_per_worker: float = 0.0
    """GPUs that each worker gets; 0 works on the CPU."""
    cpus_per_worker: float = 1.0
    """CPUs that each worker gets."""
    elastic: bool = False
    """Start, and go on after a loss, with as many workers as there is room for, up to `num_workers`."""
    max_failures: int = 3
    """Times that lost or failed workers are replaced before the work is given up; -1 is without end."""
    start_timeout_s: float = 60.0
    """Seconds to wait until the cluster has room for the workers, at the start and after a loss."""

    def __post_init__(self) -> None:
        _check("num_workers", self.num_workers, 1)
        _check("gpus_per_worker", self.gpus_per_worker, 0.0)
        _check("cpus_per_worker", self.cpus_per_worker, 0.01)
        _check("max_failures", self.max_failures, -1)
        _check("start_timeout_s", self.start_timeout_s, 0.0)


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What a search tries, and where it runs."""

    num_trials: int = 16
    """Settings tried; the first is the one given."""
    num_concurrent: int = 0
    """Trials at a time; 0 is as many as there is room for."""
    seed: int = 0
    """Seed of the settings drawn."""
    address: str | None = None
    """host:port of a running Ray cluster; RAY_ADDRESS unless given. Without both, Ray starts on this machine."""
    cpus_per_trial: float = 1.0
    """CPUs that each trial gets."""
    gpus_per_trial: float = 0.0
    """GPUs that each trial gets."""
    max_failures: int = 3
    """Times that a trial is started again after its worker was lost."""

    def __post_init__(self) -> None:
        _check("num_trials", self.num_trials, 1)
        _check("num_concurrent", self.num_concurrent, 0)
        _check("cpus_per_trial", self.cpus_per_trial, 0.01)
        _check("gpus_per_trial", self.gpus_per_trial, 0.0)
        _check("max_failures", self.max_failures, 0)
