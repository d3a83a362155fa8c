"""Settings of the JEPA family: a tree of its own, read like hldm.config's, whose shared sections it keeps.

`objective.option` names a row of the family's table (docs/jepa.md); the other settings are switches that every row
shares. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import Field

from hldm.config import (
    CheckpointConfig,
    ChunkingConfig,
    Count,
    DataConfig,
    LoggingConfig,
    NotNegative,
    Positive,
    Share,
    SharedTraining,
    StackConfig,
    StageConfig,
    TrainingConfig,
    Width,
    build,
)
from hldm.settings import Section, changed, read_settings


class Terms(NamedTuple):
    """Which terms of the loss an option has."""

    latent: bool  # distance of predicted vectors and targets
    predicted: bool  # nats of hidden chunks' bytes, from predicted vectors
    own: bool  # nats of visible chunks' bytes, from the encoder's own vectors


OPTIONS: dict[str, Terms] = {
    "latents": Terms(latent=True, predicted=False, own=False),  # option 1: a decoder is trained afterwards
    "predicted": Terms(latent=True, predicted=True, own=False),  # option 2
    "encoder_decoder": Terms(latent=True, predicted=False, own=True),  # option 3
    "masked": Terms(
        latent=False, predicted=True, own=False
    ),  # control of option 2: a masked-chunk language model
    "autoencoder": Terms(latent=False, predicted=False, own=True),  # control of option 3
}


class PredictorConfig(Section):
    """From the context's vectors to those of the hidden chunks."""

    kind: Literal["transformer", "griffin"] = "transformer"  # both sides of the window, or its past alone
    width: Width = 64
    layers: int = Field(default=2, gt=0, le=512)
    heads: Count = 4

    def check(self) -> None:
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width must be divisible by 4 times the heads, got {self.width} and {self.heads} heads"
            )


class ObjectiveConfig(Section):
    """Terms of the loss, their weights, and where targets come from."""

    option: Literal["latents", "predicted", "encoder_decoder", "masked", "autoencoder"] = "encoder_decoder"
    distance: Literal["smooth_l1", "l1", "l2", "cosine"] = "smooth_l1"
    # Weights of the target encoder: a moving average; the encoder's own, without a gradient; or with one.
    target: Literal["ema", "own", "gradient"] = "ema"
    momentum: Share = 0.99  # of the moving average at the start; a cosine takes it to 1
    normalise: Literal["none", "layer_norm", "standardise"] = "standardise"  # targets
    reset_targets: bool = True  # the target encoder knows nothing of the text before the hidden span
    latent_weight: NotNegative = 1.0
    decoder_weight: NotNegative = 1.0  # against 1 of a nat per byte
    next_byte_weight: NotNegative = 0.0  # of predicting the next byte from the context's features
    weight_decay_growth: Positive = 1.0  # weight decay at the end over that at the start; a cosine between
    variance: NotNegative = 0.0  # weight of VICReg's hinge on the deviation of each dimension
    covariance: NotNegative = 0.0  # of its squared covariances
    sigreg: NotNegative = 0.0  # of SIGReg's distance to a standard normal, over random directions

    @property
    def terms(self) -> Terms:
        """Which terms the option has."""
        return OPTIONS[self.option]

    @property
    def has_predictor(self) -> bool:
        """Whether anything is predicted."""
        return self.terms.latent or self.terms.predicted

    @property
    def compares_chunks(self) -> bool:
        """Whether a term of the loss is a statistic of the whole batch."""
        return bool(self.variance or self.covariance or self.sigreg)


# Views that leave every chunk in its place, and those that make another text of it.
PlacedView = Literal["null-spans", "null-chunks", "null-bytes", "random-chars", "case", "none"]
TextView = Literal["word-drop", "order", "sentence-order", "typos", "crop", "back-off", "translation"]


class ViewsConfig(Section):
    """What is done to the text before the context encoder reads it."""

    kind: Literal[PlacedView, TextView] = "null-spans"
    share: float = Field(
        default=0.4, ge=0, le=0.7
    )  # r: of the chunks, bytes, letters or words that it changes
    span: float = Field(default=4.0, ge=1, le=64)  # mean chunks of a hidden span
    hole_bytes: int = Field(
        default=6, ge=0, le=64
    )  # NULLs in place of a hidden chunk; 0: as many as it has bytes
    translations: tuple[Literal["asv", "kjv", "web", "ylt"], ...] = ("asv", "web")  # of kind=translation

    def check(self) -> None:
        if self.kind == "translation" and not self.translations:
            raise ValueError("translations must name one at least, got none")

    @property
    def hides_chunks(self) -> bool:
        """Whether some chunks cannot be read at all, and those alone are predicted."""
        return self.kind in ("null-spans", "null-chunks")


class SentencesConfig(Section):
    """Sentences, where one vector stands for each."""

    context: int = Field(default=4, gt=0, le=64)  # k, sentences before the one that is predicted
    min_bytes: Count = 16  # a sentence ends only once it holds so many bytes
    max_bytes: int = Field(default=400, gt=0, le=65_536)  # a longer one is cut
    # hf:FOLDER: a transformer of Hugging Face's library, with its tokenizer, in place of the encoder
    encoder: str = ""

    def check(self) -> None:
        if self.encoder and not self.encoder.removeprefix("hf:"):
            raise ValueError("encoder names no folder: hf:FOLDER does")
        if self.encoder and not self.encoder.startswith("hf:"):
            raise ValueError(f"encoder must be empty or hf:FOLDER, got {self.encoder!r:.80}")
        if self.min_bytes > self.max_bytes:
            raise ValueError(
                f"min_bytes must not exceed max_bytes, got {self.min_bytes} and {self.max_bytes}"
            )


class PairsConfig(Section):
    """Two views of one meaning, for task=pairs."""

    source: Literal["jsonl", "sums", "regex", "halves"] = (
        "jsonl"  # rows of text and code; a grammar; halves of windows
    )
    train: str = ""  # of source=jsonl: a file of {"text": ..., "code": ...}, a tenth of which is held out
    test: str = ""  # ... and one to test on
    count: int = Field(default=8000, gt=0, le=10_000_000)  # training pairs of a grammar
    predictions: int = Field(default=1, ge=0, le=64)  # k, prediction symbols after the first view
    loss_dropout: Share = 0.0  # share of the steps without the distance, and without its cost
    window: int = Field(default=64, ge=4, le=65_536)  # bytes that attention sees back

    def check(self) -> None:
        if self.source == "jsonl" and bool(self.train) != bool(self.test):
            raise ValueError("train and pairs.test belong together: set both")


class JepaStages(SharedTraining):
    """Training of the encoder, and of a decoder afterwards on the frozen encoder."""

    weight_decay: NotNegative = 0.01
    jepa: StageConfig = StageConfig(learning_rate=2e-3)
    decoder: StageConfig = StageConfig(learning_rate=2e-3)

    def of(self, stage: str) -> TrainingConfig:
        """All of the training of "jepa" or "decoder"."""
        shared = {name: getattr(self, name) for name in (*SharedTraining.model_fields, "weight_decay")}
        return TrainingConfig(optimizer="adamw", **shared, **vars(getattr(self, stage)))


class JepaConfig(Section):
    """One file for a run of the family."""

    name: str = ""  # folder below runs/; empty: the config file's name
    seed: int = Field(default=0, ge=0, lt=2**31)
    # What is predicted: hidden chunks of a window; a sentence from a view of it; the next sentence from those before;
    # the second of two views of one meaning from the first.
    task: Literal["chunks", "views", "sentences", "pairs"] = "chunks"
    vector: Width = 64  # z, numbers in the vector of a chunk
    data: DataConfig = DataConfig()
    chunking: ChunkingConfig = ChunkingConfig()
    encoder: StackConfig = StackConfig()
    predictor: PredictorConfig = PredictorConfig()
    decoder: StackConfig = StackConfig(blocks=("recurrent",))
    objective: ObjectiveConfig = ObjectiveConfig()
    views: ViewsConfig = ViewsConfig()
    sentences: SentencesConfig = SentencesConfig()
    pairs: PairsConfig = PairsConfig()
    training: JepaStages = JepaStages()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def check(self) -> None:
        if self.data.question:
            raise ValueError("data.question must be empty: these objectives have no question and no answer")
        if self.views.hole_bytes > self.chunking.max_bytes:
            raise ValueError(
                f"views.hole_bytes must not exceed chunking.max_bytes, got {self.views.hole_bytes} and "
                f"{self.chunking.max_bytes}"
            )
        if self.task == "chunks" and self.views.kind in get_args(TextView):
            raise ValueError(
                f"views.kind={self.views.kind} moves the chunks, so that none can be predicted in its place: set "
                "task=views, which predicts whole sentences"
            )
        if self.task != "chunks" and self.objective.terms.predicted:
            raise ValueError(
                f"objective.option={self.objective.option} writes bytes from a predicted chunk: it needs task=chunks"
            )
        if self.task == "pairs":
            if self.objective.option != "latents":
                raise ValueError(
                    "objective.option must be latents with task=pairs: its decoder is the language model"
                )
            if self.pairs.source == "jsonl" and not self.pairs.train:
                raise ValueError("pairs.train and pairs.test must name files with pairs.source=jsonl")
        if self.task == "chunks" and self.objective.has_predictor and not self.views.share:
            raise ValueError(
                f"views.share must be above 0, or nothing is hidden to be predicted: objective.option="
                f"{self.objective.option} predicts"
            )
        if self.training.accumulation > 1 and self.objective.compares_chunks:
            raise ValueError(
                "training.accumulation must be 1 with objective.variance, covariance or sigreg: they are "
                "statistics of the whole batch"
            )
        if self.sentences.encoder:
            self._check_transformer()

    def _check_transformer(self) -> None:
        """A transformer makes one vector a token: there are no chunks to decode, and no symbol for a hidden byte."""
        for key, value, allowed in (
            ("task", self.task, ("sentences", "views")),
            ("objective.option", self.objective.option, ("latents",)),
            ("views.kind", self.views.kind, ("none", "random-chars", "case", *get_args(TextView))),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{key} must be one of {', '.join(allowed)} with sentences.encoder={self.sentences.encoder}, got "
                    f"{value}"
                )
        if self.chunking.needs_segmenter:
            raise ValueError(
                f"chunking.strategy={self.chunking.strategy} asks a model where chunks start, and with "
                "sentences.encoder there are none: leave it out"
            )


def load_jepa_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> JepaConfig:
    """Defaults, then the YAML files in order, then `a.b=c`; see `hldm.config.load_config`."""
    config = build(JepaConfig, read_settings(paths, overrides))
    return changed(config, name=Path(paths[-1]).stem) if paths and not config.name else config
