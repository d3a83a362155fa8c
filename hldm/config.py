"""Every setting of hldm: frozen models, YAML files, `a.b=c` overrides.

One section a module, named like the module. Defaults, then the YAML files in order, then the
command line; an unknown key is an error that offers the nearest one. Knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field

from hldm.retired import is_retired
from hldm.settings import ConfigError as ConfigError  # imported from here by all rooms below
from hldm.settings import Dumpable, S, Section, Setting, build_section, changed, dotted, is_own, read_settings

Count = Annotated[int, Field(gt=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, lt=2**63)]
NotNegative = Annotated[float, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(gt=0, le=65_536)]
Depth = Annotated[int, Field(gt=0, le=512)]
Documents = Literal["chapters", "books"]


class DataConfig(Section):
    """Where the text comes from and how it is laid out in lanes."""

    path: str = ""  # file, folder or glob of .txt, .jsonl, .parquet, plain or .gz
    dataset: str = ""  # Hugging Face dataset name; with neither, the built-in Bible in Basic English
    subset: str = ""  # configuration name of the dataset
    split: str = "train"  # which split of the dataset to read
    field: str = "text"  # column of .jsonl, .parquet and datasets that holds the text
    question: str = ""  # column of what is asked before each text; then the loss counts the text, its answer
    question_weight: float = Field(default=0.0, ge=0, le=1)  # what a nat of a question counts in the loss
    separator: str = ""  # splits a plain text file into documents; empty: a file is one document
    documents: Documents = "chapters"  # what a document of the built-in text is
    stream: bool = False  # read files or dataset while training, again and again, instead of all of it first
    readers: Count = 1  # of a stream, side by side, each its own share of it; a multiple of the processes
    shuffle_bytes: Count = 16_777_216  # of a stream's documents, that each reader shuffles at a time
    max_bytes: Count = 1_000_000_000  # stop reading after so much text; a stream has no end
    held_out: float = Field(default=0.03, gt=0, lt=0.5)  # share of documents for validation, also for test
    lanes: Count = 16  # texts read side by side: the global batch
    window_bytes: Count = 256  # bytes of each lane in one optimizer step

    def check(self) -> None:
        if self.path and self.dataset:
            raise ValueError("path and data.dataset exclude each other: set one")
        if self.stream and not (self.path or self.dataset):
            raise ValueError("stream reads data.path or data.dataset: set one, or stream=false")
        if self.question and (self.stream or not (self.path or self.dataset)):
            raise ValueError("question is a column of data.path or data.dataset: set one, and stream=false")
        if self.question and self.question == self.field:
            raise ValueError(f"question and data.field must be two columns, got {self.field!r} for both")
        if self.stream and self.lanes % self.readers:
            got = f"{self.lanes} and {self.readers} readers"
            raise ValueError(f"lanes must be divisible by data.readers, got {got}")


class SegmenterConfig(Section):
    """The small byte model that some chunking strategies ask, trained before stage one."""

    width: int = Field(default=64, gt=0, le=4096, multiple_of=16)  # d, residual stream
    layers: int = Field(default=2, gt=0, le=64)  # recurrent blocks
    lanes: Count = 16  # texts read side by side in its training
    window_bytes: int = Field(default=256, ge=16, lt=2**63)  # bytes of each lane in one optimizer step
    steps: Count = 2000
    minutes: NotNegative = 1.0  # wall clock; at most a fifth of stage one's, which pay for it; 0: no limit
    learning_rate: Positive = 4e-3  # peak
    sample_bytes: Count = 65_536  # training text on which the threshold is set

    @property
    def trunk(self) -> GriffinConfig:
        """The stack over bytes."""
        return changed(GriffinConfig(), width=self.width, blocks=("recurrent",) * self.layers)


# Strategies that read the text alone, and those that ask a segmenter.
TextStrategy = Literal["fixed", "words", "space", "sentence", "paragraph"]
ModelStrategy = Literal[
    "entropy", "state_change", "gate", "learned", "reinforce", "select", "queries", "phrase"
]
Strategy = Literal[TextStrategy, ModelStrategy]


class ChunkingConfig(Section):
    """Which stretches of text share one latent."""

    strategy: str = "words"  # a Strategy, or a class of one's own as module:Class (docs/own_part.md)
    min_bytes: Count = 4  # a chunk ends at a border only once it holds so many bytes
    max_bytes: int = Field(default=10, gt=0, le=65_536)  # no chunk is longer
    target_bytes: Positive = 6.0  # mean length that strategies with a segmenter are set to, on training text
    segmenter: SegmenterConfig = SegmenterConfig()  # of strategies that ask one

    def check(self) -> None:
        if not (self.strategy in (known := get_args(Strategy)) or is_own(self.strategy)):
            expected = f"one of {', '.join(known)}, or your own module:Class"
            raise ValueError(f"strategy must be {expected}, got {self.strategy!r:.80}")
        if self.min_bytes > self.max_bytes:
            got = f"{self.min_bytes} and {self.max_bytes}"
            raise ValueError(f"min_bytes must not exceed max_bytes, got {got}")
        if self.needs_segmenter and not self.min_bytes < self.target_bytes < self.max_bytes:
            got = f"{self.target_bytes:g}"
            raise ValueError(f"target_bytes must lie between min_bytes and max_bytes, got {got}")

    @property
    def has_constant_length(self) -> bool:
        """Whether chunks hold max_bytes, but for a document's last and a character that would be split."""
        return self.strategy == "fixed" and self.min_bytes == self.max_bytes

    @property
    def needs_segmenter(self) -> bool:
        """Whether the strategy asks a model, which is then trained first."""
        return self.strategy in get_args(ModelStrategy)


def _check_heads(name: str, width: int, heads: int) -> None:
    """Half of a head's width is rotated in pairs."""
    if width % (4 * heads):
        raise ValueError(f"{name} must be divisible by 4 times the heads, got {width} and {heads} heads")


class GriffinConfig(Section):
    """A stack of residual blocks (Griffin, arXiv 2402.19427); the pattern is data."""

    width: Width = 128  # d, residual stream
    blocks: tuple[Literal["recurrent", "attention"], ...] = Field(
        default=("recurrent", "attention", "recurrent"), min_length=1, max_length=512
    )
    heads: Count = 4  # attention heads, and diagonal blocks of the RG-LRU gates
    mlp_ratio: float = Field(default=2.0, gt=0, le=64)  # hidden width of the gated MLP over d
    conv_width: int = Field(default=4, gt=0, le=256)  # taps of the causal convolution
    dropout: Share = 0.0

    def check(self) -> None:
        _check_heads("width", self.width, self.heads)
        if round(self.width * self.mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio leaves no hidden unit of {self.width} x {self.mlp_ratio:g}; raise it"
            )


class AutoencoderConfig(Section):
    """Bytes to one latent a chunk and back."""

    latent_dim: int = Field(default=4, ge=0, le=4096)  # z; 0: the twin, a plain autoregressive Griffin
    # Of a chunk's features, each with its place: their mean; or, where chunks have a constant length, a convolution.
    pooling: Literal["mean", "strided"] = "mean"
    encoder: GriffinConfig = GriffinConfig()
    decoder: GriffinConfig = GriffinConfig(blocks=("recurrent",))
    trunk_layers: int = Field(default=2, ge=0, le=512)  # recurrent blocks that take a step a chunk
    trunk_width: Width = 192
    carry_state: bool = False  # decoder: keep the recurrent state from chunk to chunk, or start fresh
    reads_text: bool = True  # decoder: sees the encoder's feature at the byte before each, too
    # Of the mixture whose rate latents pay in stage one, and whose denoiser the prior then corrects; 0: they pay none,
    # and the prior starts from nothing.
    components: int = Field(default=384, ge=0, le=65_536)
    rate_weight: NotNegative = 0.5  # weight of the rate against reconstruction
    rate_anneal: Share = 0.5  # last share of the progress over which the weight goes to 1, that of the bound

    def check(self) -> None:
        if self.trunk_layers:
            _check_heads("trunk_width", self.trunk_width, self.encoder.heads)

    @property
    def trunk(self) -> GriffinConfig:
        """The stack over chunks: recurrent blocks, built as the encoder's are."""
        return changed(self.encoder, width=self.trunk_width, blocks=("recurrent",) * self.trunk_layers)

    @property
    def known_width(self) -> int:
        """w, width of what is known after a chunk: the trunk's, or the encoder's without one."""
        return self.trunk_width if self.trunk_layers else self.encoder.width


class HierarchyConfig(Section):
    """The pyramid of mean-pooled latents a chunk sees as its context."""

    levels: int = Field(default=3, ge=0, le=12)  # summaries of r, r^2, ... chunks; 0: latents only
    ratio: int = Field(default=8, ge=2, le=64)  # r, entries of one level that a summary stands for
    window: int = Field(default=24, gt=0, le=4096)  # entries of each level seen in full, at least

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


class DiffusionConfig(Section):
    """Forward process of the prior: VDM's gamma = -log SNR, from gamma_0 to gamma_1."""

    gamma_0: float = Field(default=-2.2, ge=-20)  # least noise: the latent the decoder reads (log SNR 2.2)
    gamma_1: float = Field(default=5.0, le=20)  # most noise (log SNR -5)
    target: Literal["x0", "v"] = "v"  # what the denoiser regresses, where there is no mixture to correct

    def check(self) -> None:
        if self.gamma_0 >= self.gamma_1:
            raise ValueError(f"gamma_0 must be below gamma_1, got {self.gamma_0} and {self.gamma_1}")


class PriorConfig(Section):
    """Two towers: a causal contextualiser over latents, a denoiser of the next one."""

    reads_text: bool = True  # the contextualiser sees the encoder's feature after each chunk, too
    width: Width = 64  # d of the contextualiser
    layers: Depth = 1
    heads: Count = 4
    denoiser_width: Width = 64
    denoiser_layers: Depth = 1
    draws: int = Field(default=4, gt=0, le=512)  # noise draws that share one context
    context_dropout: Share = 0.1  # share of contexts hidden in training, for guidance
    dropout: Share = 0.0
    denoiser: str = ""  # a class of one's own in place of the denoiser, as module:Class (docs/own_part.md)
    plugin: str = ""  # likewise a subclass of the whole prior

    def check(self) -> None:
        for name, own in (("denoiser", self.denoiser), ("plugin", self.plugin)):
            if own and not is_own(own):
                raise ValueError(f"{name} must be empty or your own module:Class, got {own!r:.80}")
        for name, width in (("width", self.width), ("denoiser_width", self.denoiser_width)):
            if width % self.heads:
                raise ValueError(f"{name} must be divisible by prior.heads, got {width} and {self.heads}")


class TrainingConfig(Section):
    """One stage's optimisation. Progress runs from 0 to 1 over `steps`, or `minutes` if sooner."""

    steps: Count = 1000
    minutes: NotNegative = 0.0  # limit, schedule included; 0: none
    # Minutes of time that passes, or, on CPUs, that a thread computed: comparable where a machine does other work, too.
    clock: Literal["wall", "cpu"] = "wall"
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: Positive = 1e-2  # peak
    weight_decay: NotNegative = 0.01
    warmup: Share = 0.05  # share of the progress spent warming up
    final_learning_rate: float = Field(default=0.05, ge=0, le=1)  # at the end, as a share of the peak
    clip_norm: Positive = 1.0
    accumulation: Count = 1  # micro-batches a step; the global batch stays data.lanes
    ema_decay: Share = 0.99  # 0: no averaged weights
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    # Validations in a row without a better one, until training stops and keeps the best weights; 0: it runs to the end.
    patience: int = Field(default=0, ge=0, lt=2**63)
    # How long ranks wait for one that hangs, or saves and samples alone (seconds); accelerate's default: 30 minutes.
    timeout_s: Positive = 300.0


class StagesConfig(Section):
    """Training of the two stages."""

    autoencoder: TrainingConfig = TrainingConfig()
    prior: TrainingConfig = TrainingConfig(learning_rate=8e-3)

    def check(self) -> None:
        if self.prior.gradient_checkpointing:
            raise ValueError("prior.gradient_checkpointing must be false: only stage one recomputes")


class CheckpointConfig(Section):
    """When a run saves itself, and how many saves it keeps."""

    every: Count = 500  # optimizer steps
    keep: Count = 2


class LoggingConfig(Section):
    """What a run writes while it trains."""

    every: Count = 50  # optimizer steps between metrics
    sample_every: int = Field(default=1000, ge=0, lt=2**63)  # steps between samples; 0: only at the end
    validate_every: int = Field(default=250, ge=0, lt=2**63)  # steps between validations; 0: none
    validation_bytes: Count = 8192  # of held-out text, of which a validation takes the bound
    trackers: tuple[str, ...] = Field(default=(), max_length=64)  # accelerate's trackers, e.g. [tensorboard]


class GenerationConfig(Section):
    """Defaults of generate.py and of the pipeline."""

    steps: int = Field(default=4, ge=0, le=10_000)  # a latent; 0: a draw from the mixture (docs/results.md)
    scheduler: Literal["ancestral", "ddim", "dpm"] = "ancestral"
    # Beyond 100 there is noise alone, and soon no number that float32 holds.
    guidance: float = Field(default=1.0, ge=0, le=100)  # 1: none
    temperature: float = Field(default=1.0, ge=0, le=100)  # scale of the latent's noise
    decoder_temperature: float = Field(default=0.7, ge=0, le=100)  # 0: the likeliest byte
    top_p: float = Field(default=1.0, gt=0, le=1)  # nucleus of the decoder's bytes

    def check(self) -> None:
        if 0 < self.decoder_temperature < 1e-6:
            raise ValueError(
                f"decoder_temperature must be 0 or at least 1e-6, got {self.decoder_temperature}"
            )


class Config(Section):
    """One file for both stages, so they cannot disagree about the latent."""

    name: str = ""  # folder below runs/; empty: the config file's name
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataConfig = DataConfig()
    chunking: ChunkingConfig = ChunkingConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    hierarchy: HierarchyConfig = HierarchyConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    prior: PriorConfig = PriorConfig()
    training: StagesConfig = StagesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    generation: GenerationConfig = GenerationConfig()

    def check(self) -> None:
        if not re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})?", self.name):
            raise ValueError(
                f"name must be a folder name of at most 64 letters, digits and ._- , got {self.name[:80]!r}"
            )
        if self.autoencoder.pooling == "strided" and not self.chunking.has_constant_length:
            raise ValueError(
                "autoencoder.pooling=strided needs chunks of a constant length: set chunking.strategy=fixed and "
                "chunking.min_bytes to chunking.max_bytes"
            )

    @property
    def is_twin(self) -> bool:
        """Whether this is the plain autoregressive model, without latents."""
        return self.autoencoder.latent_dim == 0


def _build(cls: type[S], settings: Mapping[str, Setting], section: str = "") -> S:
    """As build_section, without the settings of RETIRED."""
    kept = {k: s for k, s in settings.items() if not is_retired(f"{section}{k}", s.value, f"{s.where}: ")}
    return build_section(cls, kept, section)


def stage_training(config: Config, stage: str, **changes: Any) -> Config:
    """The config with some fields of one stage's training replaced, e.g. by --steps and --minutes."""
    training = changed(getattr(config.training, stage), **changes)
    return changed(config, training=changed(config.training, **{stage: training}))


def find_config(path: str | Path) -> Path:
    """A config file as it is given, or one that comes with hldm by its name: tiny, tiny.yaml or configs/tiny.yaml.

    Raises ConfigError for a name that is neither.
    """
    path = Path(path)
    if path.parent not in (Path(), Path("configs")) or (path.exists() and not path.is_dir()):
        return path
    inside = Path(__file__).parent / "configs"  # of an installed wheel; a clone has them beside the package
    shipped = inside if inside.is_dir() else inside.parents[1] / "configs"
    found = shipped / f"{path.name.removesuffix('.yaml')}.yaml"
    if found.is_file():
        return found
    names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
    raise ConfigError(f"{path}: cannot be read as a config: no such file, nor one of those of hldm: {names}")


def load_config(
    paths: Sequence[str | Path] | str | Path,
    overrides: Sequence[str] = (),
    inherited: Sequence[str | Path] = (),
) -> Config:
    """Defaults, then the YAML files in order, then the command line's `a.b=c`; later wins.

    A file may be named as `find_config` takes it. It may open with `base: other.yaml` (relative to it) and say only
    what differs. A config without a name takes the last file's. ConfigError, one line, for anything that is not a
    known key with a value of its type and range.
    inherited: files whose settings, but for the name, lie below all of these: the config.yaml of a run
    """
    files = [find_config(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    settings = read_settings(inherited)
    settings.pop("name", None)
    config = _build(Config, settings | read_settings(files, overrides))
    return changed(config, name=Path(files[-1]).stem) if files and not config.name else config


def section_from_dict(cls: type[S], settings: Mapping[str, Any]) -> S:
    """One section of a nested dict, as strict as a file: what a saved model's config.json holds."""
    names = (f"{name}." for name, field in Config.model_fields.items() if field.annotation is cls)
    return _build(cls, {key: Setting(value) for key, value in dotted(settings).items()}, next(names, ""))


def to_dict(section: Dumpable) -> dict[str, Any]:
    """Plain nested dict, lists for tuples: fit for JSON and YAML."""
    return section.model_dump(mode="json")


def to_yaml(config: Section) -> str:
    """YAML text that `load_config` reads back to the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
