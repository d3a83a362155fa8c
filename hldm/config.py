"""Every setting of hldm: frozen dataclasses, YAML files, `a.b=c` overrides.

One section a module, named like the module. Defaults, then the YAML files in order, then the
command line; an unknown key is an error that offers the nearest one. Knows no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from hldm.settings import (
    ConfigError,
    Setting,
    build_dataclass,
    flatten_settings,
    parse_override,
    read_settings,
)

T = TypeVar("T")


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise ConfigError(message)


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value) and value > 0, f"{section}.{name} must be positive, got {value}")


def _require_share(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value < 1, f"{section}.{name} must lie in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is laid out in lanes."""

    path: str = ""  # file, folder or glob of .txt, .jsonl, .parquet, plain or .gz
    dataset: str = ""  # Hugging Face dataset name; with neither, the built-in Bible in Basic English
    subset: str = ""  # configuration name of the dataset
    split: str = "train"  # which split of the dataset to read
    field: str = "text"  # column of .jsonl, .parquet and datasets that holds the text
    separator: str = ""  # splits a plain text file into documents; empty: a file is one document
    stream: bool = False  # read the dataset over the network instead of downloading it first
    max_bytes: int = 1_000_000_000  # stop reading after so much text
    held_out: float = 0.03  # share of documents kept for validation, and again for test
    lanes: int = 16  # texts read side by side: the global batch
    window_bytes: int = 256  # bytes of each lane in one optimizer step

    def __post_init__(self) -> None:
        _require_positive("data", self, "max_bytes", "lanes", "window_bytes")
        _require(0 < self.held_out < 0.5, f"data.held_out must lie in (0, 0.5), got {self.held_out}")
        _require(not (self.path and self.dataset), "data.path and data.dataset exclude each other: set one")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """The small byte model that some chunking strategies ask, trained before stage one."""

    width: int = 64  # d, residual stream
    layers: int = 2  # recurrent blocks
    lanes: int = 16  # texts read side by side in its training
    window_bytes: int = 256  # bytes of each lane in one optimizer step
    steps: int = 2000
    minutes: float = (
        1.0  # wall clock limit; besides, a fifth of stage one's minutes, which pay for it; 0: none
    )
    learning_rate: float = 4e-3  # peak
    sample_bytes: int = 65_536  # training text on which the threshold is set

    def __post_init__(self) -> None:
        _require_positive(
            "segmenter",
            self,
            "width",
            "layers",
            "lanes",
            "window_bytes",
            "steps",
            "learning_rate",
            "sample_bytes",
        )
        _require(
            self.width % 16 == 0 and self.width <= 4096,
            f"segmenter.width must be a multiple of 16 up to 4096, got {self.width}",
        )
        _require(self.layers <= 64, f"segmenter.layers: at most 64, got {self.layers}")
        _require(
            self.window_bytes >= 16, f"segmenter.window_bytes must be at least 16, got {self.window_bytes}"
        )
        _require(self.minutes >= 0, f"segmenter.minutes must not be negative, got {self.minutes}")


TextStrategy = Literal["fixed", "words", "space", "sentence", "paragraph"]  # read the text alone
ModelStrategy = Literal[
    "entropy", "state_change", "gate", "learned", "reinforce", "select"
]  # ask a segmenter
Strategy = Literal[TextStrategy, ModelStrategy]


@dataclass(frozen=True, kw_only=True)
class ChunkingConfig:
    """Which stretches of text share one latent."""

    strategy: Strategy = "words"
    min_bytes: int = 4  # a chunk ends at a border only once it holds so many bytes
    max_bytes: int = 10  # no chunk is longer
    target_bytes: float = 6.0  # mean length that strategies with a segmenter are set to, on training text
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)  # of strategies that ask one

    def __post_init__(self) -> None:
        _require_positive("chunking", self, "min_bytes", "max_bytes", "target_bytes")
        _require(
            self.min_bytes <= self.max_bytes,
            "chunking.min_bytes must not exceed chunking.max_bytes, "
            f"got {self.min_bytes} and {self.max_bytes}",
        )
        _require(self.max_bytes <= 65_536, f"chunking.max_bytes must be at most 65536, got {self.max_bytes}")
        _require(
            not self.needs_segmenter or self.min_bytes < self.target_bytes < self.max_bytes,
            f"chunking.target_bytes must lie between min_bytes and max_bytes, got {self.target_bytes:g} "
            f"with {self.min_bytes} and {self.max_bytes}",
        )

    @property
    def has_constant_length(self) -> bool:
        """Whether chunks hold max_bytes, but for a document's last and a character that would be split."""
        return self.strategy == "fixed" and self.min_bytes == self.max_bytes

    @property
    def needs_segmenter(self) -> bool:
        """Whether the strategy asks a model, which is then trained first."""
        return self.strategy in get_args(ModelStrategy)


@dataclass(frozen=True, kw_only=True)
class GriffinConfig:
    """A stack of residual blocks (Griffin, arXiv 2402.19427); the pattern is data."""

    width: int = 128  # d, residual stream
    blocks: tuple[str, ...] = ("recurrent", "attention", "recurrent")
    heads: int = 4  # attention heads, and diagonal blocks of the RG-LRU gates
    mlp_ratio: float = 2.0  # hidden width of the gated MLP over d
    conv_width: int = 4  # taps of the causal convolution
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("griffin", self, "width", "heads", "mlp_ratio", "conv_width")
        _require_share("griffin", self, "dropout")
        _require(len(self.blocks) > 0, "griffin.blocks must name at least one block")
        for block in self.blocks:
            _require(
                block in ("recurrent", "attention"),
                f"griffin.blocks holds 'recurrent' or 'attention', got {block[:80]!r}",
            )
        _require(
            self.width % self.heads == 0,
            f"griffin.width must be divisible by griffin.heads, got {self.width} and {self.heads}",
        )
        _require(
            (self.width // self.heads) % 4 == 0,
            f"griffin.width / griffin.heads must be a multiple of 4 (half of it is rotated in pairs), "
            f"got {self.width} / {self.heads}",
        )
        _require(self.width <= 65_536, f"griffin.width must be at most 65536, got {self.width}")
        _require(self.mlp_ratio <= 64, f"griffin.mlp_ratio must be at most 64, got {self.mlp_ratio}")
        _require(self.conv_width <= 256, f"griffin.conv_width must be at most 256, got {self.conv_width}")
        _require(len(self.blocks) <= 512, f"griffin.blocks: at most 512, got {len(self.blocks)}")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Bytes to one latent a chunk and back."""

    latent_dim: int = 4  # z; 0 is the twin: a plain autoregressive Griffin without latents
    # A latent from its chunk's features: their mean, each with its place; or, where chunks have a constant length, a
    # causal convolution with that kernel and stride.
    pooling: Literal["mean", "strided"] = "mean"
    encoder: GriffinConfig = field(default_factory=GriffinConfig)
    decoder: GriffinConfig = field(default_factory=lambda: GriffinConfig(blocks=("recurrent",)))
    trunk_layers: int = 2  # recurrent blocks that take a step a chunk: what is known before the next one
    trunk_width: int = 192
    carry_state: bool = False  # decoder: keep the recurrent state from chunk to chunk, or start fresh
    reads_text: bool = True  # decoder: sees the encoder's feature at the byte before each, too
    # Of the mixture whose rate latents pay in stage one, and whose denoiser the prior then corrects; 0: they pay none,
    # and the prior starts from nothing.
    components: int = 384
    rate_weight: float = 0.5  # weight of the rate against reconstruction
    rate_anneal: float = 0.5  # last share of the progress over which the weight goes to 1, that of the bound

    def __post_init__(self) -> None:
        _require(
            0 <= self.latent_dim <= 4096,
            f"autoencoder.latent_dim must lie in 0..4096, got {self.latent_dim}",
        )
        _require_share("autoencoder", self, "rate_anneal")
        _require(
            0 <= self.components <= 65_536,
            f"autoencoder.components must lie in 0..65536, got {self.components}",
        )
        _require(
            0 <= self.trunk_layers <= 512,
            f"autoencoder.trunk_layers must lie in 0..512, got {self.trunk_layers}",
        )
        if self.trunk_layers:
            _ = self.trunk  # its own checks
        _require(
            self.rate_weight >= 0, f"autoencoder.rate_weight must not be negative, got {self.rate_weight}"
        )

    @property
    def decoder_is_fresh(self) -> bool:
        """Whether the decoder knows nothing but the latent, so that a chunk can be written on its own."""
        return not self.carry_state and not self.reads_text and not self.trunk_layers

    @property
    def trunk(self) -> GriffinConfig:
        """The stack over chunks: recurrent blocks, built as the encoder's are."""
        return replace(self.encoder, width=self.trunk_width, blocks=("recurrent",) * self.trunk_layers)

    @property
    def known_width(self) -> int:
        """w, width of what is known after a chunk: the trunk's, or the encoder's without one."""
        return self.trunk_width if self.trunk_layers else self.encoder.width


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig:
    """The pyramid of mean-pooled latents a chunk sees as its context."""

    levels: int = 3  # summaries of r, r^2, ... chunks; 0: latents only
    ratio: int = 8  # r, how many entries of one level a summary of the next stands for
    window: int = 24  # entries of each level seen in full, at least

    def __post_init__(self) -> None:
        _require_positive("hierarchy", self, "window")
        _require(0 <= self.levels <= 12, f"hierarchy.levels must lie in 0..12, got {self.levels}")
        _require(2 <= self.ratio <= 64, f"hierarchy.ratio must lie in 2..64, got {self.ratio}")
        _require(self.window <= 4096, f"hierarchy.window must be at most 4096, got {self.window}")

    @property
    def capacity(self) -> int:
        """How many entries a state must be able to hold: those visible now or at any later time.

        A level keeps its blocks from s_l on, also those that finer entries still stand for, hence
        cap_l = ceil(cap_{l-1} / r) + w + r.
        """
        total = level_capacity = 0
        for _ in range(self.levels + 1):
            level_capacity = -(-level_capacity // self.ratio) + self.window + self.ratio
            total += level_capacity
        return total


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Forward process of the prior: VDM's gamma = -log SNR, from gamma_0 to gamma_1."""

    gamma_0: float = -2.2  # least noise: the latent the decoder reads (log SNR 2.2)
    gamma_1: float = 5.0  # most noise (log SNR -5)
    target: Literal["x0", "v"] = "v"  # what the denoiser regresses, where there is no mixture to correct

    def __post_init__(self) -> None:
        _require(
            -20 <= self.gamma_0 < self.gamma_1 <= 20,
            f"diffusion needs -20 <= gamma_0 < gamma_1 <= 20, got {self.gamma_0} and {self.gamma_1}",
        )


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Two towers: a causal contextualiser over latents, a denoiser of the next one."""

    reads_text: bool = True  # the contextualiser sees the encoder's feature after each chunk, too
    width: int = 64  # d of the contextualiser
    layers: int = 1
    heads: int = 4
    denoiser_width: int = 64
    denoiser_layers: int = 1
    draws: int = 4  # noise draws that share one context
    context_dropout: float = 0.1  # share of contexts hidden in training, for guidance
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require_positive(
            "prior", self, "width", "layers", "heads", "denoiser_width", "denoiser_layers", "draws"
        )
        _require_share("prior", self, "context_dropout", "dropout")
        for name in ("width", "denoiser_width"):
            value = getattr(self, name)
            _require(
                value % self.heads == 0,
                f"prior.{name} must be divisible by prior.heads, got {value} and {self.heads}",
            )
            _require(value <= 65_536, f"prior.{name} must be at most 65536, got {value}")
        for name in ("layers", "denoiser_layers", "draws"):
            _require(getattr(self, name) <= 512, f"prior.{name}: at most 512, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One stage's optimisation. Progress runs from 0 to 1 over `steps`, or `minutes` if sooner."""

    steps: int = 1000
    minutes: float = 0.0  # limit, schedule included; 0: none
    # What minutes count: time that passes, or, on CPUs, what a thread computed, so that runs on a machine that does
    # other work, too, can be compared.
    clock: Literal["wall", "cpu"] = "wall"
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float = 1e-2  # peak
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the progress spent warming up
    final_learning_rate: float = 0.05  # at the end, as a share of the peak
    clip_norm: float = 1.0
    accumulation: int = 1  # micro-batches a step; the global batch stays data.lanes
    ema_decay: float = 0.99  # 0: no averaged weights
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    joint: float = 0.0  # stage two: last share of the progress that trains both stages together
    # How long ranks wait for one that hangs. What rank 0 does alone, saving and sampling, must take less: seconds
    # for configs/*.yaml. accelerate's default is 30 minutes (10 on CUDA), which a cluster would be paid for.
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _require_positive(
            "training", self, "steps", "learning_rate", "clip_norm", "accumulation", "timeout_s"
        )
        _require_share("training", self, "warmup", "ema_decay", "joint")
        _require(self.minutes >= 0, f"training.minutes must not be negative, got {self.minutes}")
        _require(
            self.weight_decay >= 0, f"training.weight_decay must not be negative, got {self.weight_decay}"
        )
        _require(
            0 <= self.final_learning_rate <= 1,
            f"training.final_learning_rate is a share of the peak in [0, 1], got {self.final_learning_rate}",
        )


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Training of the two stages."""

    autoencoder: TrainingConfig = field(default_factory=TrainingConfig)
    prior: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=8e-3))

    def __post_init__(self) -> None:
        _require(
            self.autoencoder.joint == 0, "training.autoencoder.joint must be 0: stage two has a joint phase"
        )
        _require(
            not self.prior.gradient_checkpointing,
            "training.prior.gradient_checkpointing must be false: only stage one recomputes activations",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves itself, and how many saves it keeps."""

    every: int = 500  # optimizer steps
    keep: int = 2

    def __post_init__(self) -> None:
        _require_positive("checkpoint", self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run writes while it trains."""

    every: int = 50  # optimizer steps between metrics
    sample_every: int = 1000  # optimizer steps between samples; 0: only at the end
    trackers: tuple[str, ...] = ()  # accelerate's trackers, e.g. [tensorboard]

    def __post_init__(self) -> None:
        _require_positive("logging", self, "every")
        _require(
            self.sample_every >= 0, f"logging.sample_every must not be negative, got {self.sample_every}"
        )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Defaults of generate.py and of the pipeline."""

    steps: int = 4  # denoising steps a latent; 0: a draw from the mixture (docs/results.md compares them)
    scheduler: Literal["ancestral", "ddim", "dpm"] = "ancestral"
    guidance: float = 1.0  # 1: none
    temperature: float = 1.0  # scale of the latent's noise
    decoder_temperature: float = 0.7  # 0: the likeliest byte
    top_p: float = 1.0  # nucleus of the decoder's bytes

    def __post_init__(self) -> None:
        _require_positive("generation", self, "top_p")
        _require(0 <= self.steps <= 10_000, f"generation.steps must lie in 0..10000, got {self.steps}")
        _require(self.top_p <= 1, f"generation.top_p must be at most 1, got {self.top_p}")
        for name in ("temperature", "decoder_temperature", "guidance"):
            value = getattr(self, name)
            # beyond it there is noise alone, and soon no number that float32 holds
            _require(0 <= value <= 100, f"generation.{name} must lie in 0..100, got {value}")
        _require(
            not 0 < self.decoder_temperature < 1e-6,
            f"generation.decoder_temperature must be 0 or at least 1e-6, got {self.decoder_temperature}",
        )

    @property
    def reads_latents(self) -> bool:
        """Whether the latents of the text so far say anything about the next: a mixture alone asks the text."""
        return self.steps > 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One file for both stages, so they cannot disagree about the latent."""

    name: str = ""  # folder below runs/; empty: the config file's name
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    chunking: ChunkingConfig = field(default_factory=ChunkingConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    hierarchy: HierarchyConfig = field(default_factory=HierarchyConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    training: StagesConfig = field(default_factory=StagesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, f"seed must lie in 0..2^63-1, got {self.seed}")
        _require(
            re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})?", self.name) is not None,
            f"name must be a folder name of at most 64 letters, digits and ._- , got {self.name[:80]!r}",
        )
        chunking = self.chunking
        _require(
            self.autoencoder.pooling != "strided" or chunking.has_constant_length,
            "autoencoder.pooling=strided needs chunks of a constant length: set chunking.strategy=fixed and "
            f"chunking.min_bytes to chunking.max_bytes, got {chunking.strategy}, {chunking.min_bytes} and "
            f"{chunking.max_bytes}",
        )

    @property
    def is_twin(self) -> bool:
        """Whether this is the plain autoregressive model, without latents."""
        return self.autoencoder.latent_dim == 0


# Settings of earlier versions that are gone, each with the value that says what is left; None: any, since without the
# form it belonged to it says nothing. A saved model or a file that says this much loads as before.
RETIRED: Mapping[str, str | None] = {
    "autoencoder.writes": "bytes",
    "autoencoder.rate": "mixture",
    "autoencoder.byte_dropout": "0.0",
    "autoencoder.latent_dropout": "0.0",
    "autoencoder.clean_latents": "0.0",
    "chunking.entropy_form": "threshold",
    "data.cache_latents": "false",
    "chunking.gate_form": "first",
    "chunking.learned_form": "forget",
    "chunking.select_form": "last",
    "diffusion.schedule": "learned",
    "prior.contextualiser": "transformer",
    "prior.one_step": "none",
    "prior.energy": None,
    "prior.self_conditioning": "0.0",
}
# Values that are gone, of settings that are not.
RETIRED_VALUES: Mapping[str, tuple[str, ...]] = {
    "diffusion.target": ("eps",),
    "generation.scheduler": ("energy", "flow"),
}


def is_retired(key: str, value: object) -> bool:
    """Whether this is a setting of RETIRED. Raises ConfigError where it says another form than what is left.

    value: as it was written, or what was read of it
    """
    old = next((old for old in RETIRED if f"{key}.".startswith(f"{old}.")), None)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    left = RETIRED[old] if old else None
    if text in RETIRED_VALUES.get(key, ()) or (left is not None and not _alike(text, left)):
        raise ConfigError(
            f"{key}={text[:100]} is a form that was removed: choose another or, for what was trained with it, "
            "use the version of hldm that trained it or train again"
        )
    return old is not None


def _alike(one: str, other: str) -> bool:
    """0 and 0.0 are the same number."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _drop_retired(settings: Mapping[str, Setting], section: str = "") -> dict[str, Setting]:
    """The settings without those of RETIRED; section: `prior.`, where they are a section's alone."""
    kept = {}
    for key, setting in settings.items():
        try:
            if not is_retired(f"{section}{key}", setting.value):
                kept[key] = setting
        except ConfigError as error:
            raise ConfigError(f"{setting.where}: {error}") from None
    return kept


def stage_training(config: Config, stage: str, **changes: Any) -> Config:
    """The config with some fields of one stage's training replaced, e.g. by --steps and --minutes."""
    current: TrainingConfig = getattr(config.training, stage)
    training = replace(config.training, **{stage: replace(current, **changes)})
    return replace(config, training=training)


def load_config(paths: Sequence[str | Path] | str | Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML files in order, then the command line's `a.b=c`; later wins.

    A file may open with `base: other.yaml` (relative to it) and say only what differs. A config without
    a name takes the last file's. ConfigError, one line, for anything that is not a known key with a value of
    its type and range.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    settings: dict[str, Setting] = {}
    for path in files:
        settings |= read_settings(Path(path))
    for override in overrides:
        settings |= parse_override(override)
    config = build_dataclass(Config, _drop_retired(settings))
    return replace(config, name=Path(files[-1]).stem) if files and not config.name else config


def config_from_dict(settings: Mapping[str, Any]) -> Config:
    """The config of a nested dict, as strict as a file; the inverse of `to_dict`."""
    return build_dataclass(Config, _drop_retired(flatten_settings(settings)))


def section_from_dict(cls: type[T], settings: Mapping[str, Any]) -> T:
    """One section of a nested dict, as strict as a file: what a saved model's config.json holds."""
    section = next(f"{f.name}." for f in fields(Config) if f.default_factory is cls)
    return build_dataclass(cls, _drop_retired(flatten_settings(settings), section))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, lists for tuples: fit for JSON and YAML."""
    return asdict(
        config, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}
    )


def to_yaml(config: Config) -> str:
    """YAML text that `load_config` reads back to the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
