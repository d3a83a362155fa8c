"""Every setting of hldm: frozen models, YAML files, `a.b=c` overrides.

One section a module, named like the module. Defaults, then the YAML files in order, then the
command line; an unknown key is an error that offers the nearest one. Knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import Field

from hldm.retired import without_retired
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


class StackConfig(Section):
    """A stack of residual blocks (Griffin, arXiv 2402.19427); the pattern is data."""

    width: Width = 128  # d, residual stream
    blocks: tuple[Literal["recurrent", "attention"], ...] = Field(
        default=("recurrent", "attention", "recurrent"), min_length=1, max_length=512
    )
    heads: Count = 4  # attention heads, and diagonal blocks of the RG-LRU gates

    def check(self) -> None:
        _check_heads("width", self.width, self.heads)

    @property
    def hidden(self) -> int:
        """m, hidden width of the gated MLP."""
        return 2 * self.width


class GriffinConfig(StackConfig):
    """A stack whose MLP may have another width, by which a twin gets as many parameters as its model."""

    mlp_ratio: float = Field(default=2.0, ge=0.25, le=64)  # hidden width of the gated MLP over d

    @property
    def hidden(self) -> int:
        """m, hidden width of the gated MLP."""
        return round(self.width * self.mlp_ratio)


class AutoencoderConfig(Section):
    """Bytes to one latent a chunk and back."""

    latent_dim: int = Field(default=4, ge=0, le=4096)  # z; 0: the twin, a plain autoregressive Griffin
    # Of a chunk's features, each with its place: their mean; or, where chunks have a constant length, a convolution.
    pooling: Literal["mean", "strided"] = "mean"
    encoder: StackConfig = StackConfig()
    decoder: GriffinConfig = GriffinConfig(blocks=("recurrent",))
    trunk_layers: int = Field(default=2, ge=0, le=512)  # recurrent blocks that take a step a chunk
    trunk_width: Width = 192
    carry_state: bool = False  # decoder: keep the recurrent state from chunk to chunk, or start fresh
    reads_text: bool = True  # decoder: sees the encoder's feature at the byte before each, too
    # Of the mixture whose rate latents pay in stage one, and whose denoiser the prior then corrects; 0: they pay none,
    # and the prior starts from nothing.
    components: int = Field(default=384, ge=0, le=65_536)
    rate_weight: NotNegative = 0.5  # weight of the rate against reconstruction at first; in the end 1

    def check(self) -> None:
        if self.trunk_layers:
            _check_heads("trunk_width", self.trunk_width, self.encoder.heads)

    @property
    def trunk(self) -> StackConfig:
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
    # Most noise, log SNR -5: the end term, 1/2 e^-5 mu^2, is 0.003 nats a dimension of latents at unit scale.
    gamma_1: ClassVar[float] = 5.0

    def check(self) -> None:
        if self.gamma_0 >= self.gamma_1:
            raise ValueError(f"gamma_0 must be below {self.gamma_1:g}, the most noise, got {self.gamma_0}")


class PriorConfig(Section):
    """Two towers: a causal contextualiser over latents, a denoiser of the next one."""

    reads_text: bool = True  # the contextualiser sees the encoder's feature after each chunk, too
    width: Width = 64  # d, of contextualiser and denoiser
    layers: Depth = 1
    heads: Count = 4
    denoiser_layers: Depth = 1
    denoiser: str = ""  # a class of one's own in place of the denoiser, as module:Class (docs/own_part.md)
    plugin: str = ""  # likewise a subclass of the whole prior

    def check(self) -> None:
        for name, own in (("denoiser", self.denoiser), ("plugin", self.plugin)):
            if own and not is_own(own):
                raise ValueError(f"{name} must be empty or your own module:Class, got {own!r:.80}")
        if self.width % self.heads:
            raise ValueError(f"width must be divisible by prior.heads, got {self.width} and {self.heads}")


class StageConfig(Section):
    """One stage's optimisation. Progress runs from 0 to 1 over `steps`, or `minutes` if sooner."""

    steps: Count = 1000
    minutes: NotNegative = 0.0  # limit, schedule included; 0: none
    learning_rate: Positive = 1e-2  # peak


class SharedTraining(Section):
    """What the optimisation of all stages of a run shares."""

    # Minutes of time that passes, or, on CPUs, that a thread computed: comparable where a machine does other work, too.
    clock: Literal["wall", "cpu"] = "wall"
    accumulation: Count = 1  # micro-batches a step; the global batch stays data.lanes
    ema_decay: Share = 0.99  # 0: no averaged weights
    mixed_precision: Literal["no", "bf16"] = "no"
    # Validations in a row without a better one, until training stops and keeps the best weights; 0: it runs to the end.
    patience: int = Field(default=0, ge=0, lt=2**63)


class TrainingConfig(StageConfig, SharedTraining):
    """All that the training of one stage goes by: its own settings, the shared ones, and what no file sets."""

    optimizer: Literal["adamw", "muon"] = "muon"  # at equal steps AdamW is far behind (docs/journal.md)
    weight_decay: NotNegative = 0.01
    gradient_checkpointing: bool = False


class StagesConfig(SharedTraining):
    """Training of the two stages."""

    gradient_checkpointing: bool = False  # stage one recomputes activations, in place of keeping them
    autoencoder: StageConfig = StageConfig()
    prior: StageConfig = StageConfig(learning_rate=8e-3)

    def of(self, stage: str) -> TrainingConfig:
        """All of one stage, "autoencoder" or "prior"."""
        shared = {name: getattr(self, name) for name in SharedTraining.model_fields}
        recomputes = self.gradient_checkpointing and stage == "autoencoder"
        return TrainingConfig(**shared, **vars(getattr(self, stage)), gradient_checkpointing=recomputes)


class CheckpointConfig(Section):
    """When a run saves itself, and how many saves it keeps."""

    every: Count = 500  # optimizer steps
    keep: Count = 2


class LoggingConfig(Section):
    """What a run writes while it trains."""

    every: Count = 50  # optimizer steps between metrics
    sample_every: int = Field(default=1000, ge=0, lt=2**63)  # steps between samples; 0: only at the end
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


def build(cls: type[S], settings: Mapping[str, Setting], section: str = "", is_saved: bool = False) -> S:
    """As build_section, where settings of earlier versions are understood (`hldm.retired.without_retired`)."""
    known = dotted(cls().model_dump())
    return build_section(cls, without_retired(settings, known, section, is_saved), section)


def stage_training(config: Config, stage: str, **changes: Any) -> Config:
    """The config with some settings of one stage's training replaced, or some that its stages share."""
    own = {name: changes.pop(name) for name in StageConfig.model_fields if name in changes}
    own = vars(getattr(config.training, stage)) | own  # a refusal names the whole key
    return changed(config, training=vars(config.training) | changes | {stage: own})


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
    known = dotted(Config().model_dump())
    settings = without_retired(read_settings(inherited), known, is_saved=True)
    settings.pop("name", None)
    config = build(Config, settings | read_settings(files, overrides))
    return changed(config, name=Path(files[-1]).stem) if files and not config.name else config


def config_of_run(folder: Path) -> Config:
    """The settings that stage one of a run, or a twin, was trained with, by this version or an earlier one."""
    return build(Config, read_settings([folder / "autoencoder" / "config.yaml"]), is_saved=True)


def section_from_dict(cls: type[S], settings: Mapping[str, Any]) -> S:
    """One section of a nested dict, as strict as a file: what a saved model's config.json holds."""
    names = (f"{name}." for name, field in Config.model_fields.items() if field.annotation is cls)
    found = {key: Setting(value) for key, value in dotted(settings).items()}
    return build(cls, found, next(names, ""), is_saved=True)


def to_dict(section: Dumpable) -> dict[str, Any]:
    """Plain nested dict, lists for tuples: fit for JSON and YAML."""
    return section.model_dump(mode="json")


def to_yaml(config: Section) -> str:
    """YAML text that `load_config` reads back to the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
