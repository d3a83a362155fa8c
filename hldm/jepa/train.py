"""Training of the family, by the loop, run folder, checkpoints and refusals of the two stages.

runs/<name>/jepa/     checkpoints/, model/ (the encoder), target/ (its average), predictor/, decoder/: those it has
runs/<name>/decoder/  a decoder trained afterwards on the frozen encoder: checkpoints/, model/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hldm.chunking.chunker import make_chunker
from hldm.chunking.strategies import read_segmenter
from hldm.config import Config, ConfigError, changed, to_dict
from hldm.jepa.collapse import complaints
from hldm.jepa.concepts import ConceptObjective, concept_decoder, concepts_of, score_concepts
from hldm.jepa.config import JepaConfig, load_jepa_config
from hldm.jepa.decoder import ChunkDecoder, chunk_bytes
from hldm.jepa.encoder import JepaEncoder
from hldm.jepa.formal import probe_texts, same_language
from hldm.jepa.objective import DecoderObjective, JepaObjective, letters_of
from hldm.jepa.pairs import PairObjective, write_views
from hldm.jepa.predictor import Predictor
from hldm.jepa.room import require_room_of
from hldm.jepa.sentences import SentenceObjective
from hldm.jepa.text_pairs import NUL, PairBatch, TextPairs, pairs_of, read_corpora
from hldm.jepa.transformer import HF, TextTransformer, folder_of, require_transformer
from hldm.model.autoencoder import Autoencoder
from hldm.plugins import allow
from hldm.runs.files import fingerprint
from hldm.runs.folder import check_settings, require_same_text
from hldm.runs.identity import TEXT_SETTINGS
from hldm.text.corpus import Corpus, Split
from hldm.text.windows import Batch, Window, Windows
from hldm.training.stage import Stage, open_stage
from hldm.training.stages import train_autoencoder
from hldm.training.stream import StreamedWindows

WATCHED_LANES, WATCHED_BYTES = 8, 512  # of validation text, for figures while it trains: about 700 chunks
WATCHED_PAIRS = 128
MATCHED_ROWS = 256  # pairs written side by side
SAMPLE_ROWS = 2  # of those streams, shown in samples.txt
# What a decoder trained afterwards must agree on with its encoder.
SHARED_SETTINGS = (
    "task",
    "vector",
    "chunking.",
    "encoder.",
    "predictor.",
    "sentences.",
    "objective.",
    "views.",
    *TEXT_SETTINGS,
)


def train_jepa(config: JepaConfig, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """The encoder, with what its option adds. Returns the run's folder."""
    allow([config.chunking.strategy])
    if folder := folder_of(config):
        require_transformer(folder, config.vector)
    corpora = read_corpora(config)  # before the folder is opened: a mistake leaves none
    require_room_of(config, "jepa", corpora, root)
    with open_stage(config, "jepa", resume, root) as stage:
        segmenter = stage.segmenter(corpora["train"])
        windows = laid_out(stage, config, corpora["train"], segmenter)
        objective = make_objective(config, windows).to(stage.accelerator.device)
        bound_to = {}
        if segmenter is not None:
            bound_to = {"segmenter": fingerprint(segmenter.state_dict())}
            objective.parts()["model"].register_to_config(**bound_to)
        held_out = watched(config, corpora, segmenter).to(stage.accelerator.device)
        objective.watch(held_out)
        totals = stage.fit(
            objective,
            windows,
            partial(_sample, batch=held_out),
            bound_to=bound_to,
            complaints=complaints,
            decay_growth=config.objective.weight_decay_growth,
        )
        for name, part in objective.parts().items():
            stage.export(part, stage.run.folder / name)
        stage.finish(totals, corpora["train"])
    return root / config.name


def train_decoder(config: JepaConfig, *, resume: bool = False, root: Path = Path("runs")) -> Path:
    """A decoder of chunks, or of sentences, for the frozen encoder of the same run. Returns the run's folder."""
    allow([config.chunking.strategy])
    folder = root / config.name
    jepa = read_objective(folder, config)
    binding = fingerprint(jepa.state_dict())
    corpora = read_corpora(config)
    require_same_text(folder / "jepa", corpora["train"])
    require_room_of(_with_own_transformer(config, folder / "jepa"), "decoder", corpora, root)
    with open_stage(config, "decoder", resume, root) as stage:
        segmenter = stage.segmenter(corpora["train"])
        windows = laid_out(stage, config, corpora["train"], segmenter)
        objective: DecoderObjective
        if isinstance(jepa, SentenceObjective):
            objective = ConceptObjective(jepa, concept_decoder(config))
        else:
            decoder = ChunkDecoder.from_settings(config.decoder, config.chunking, config.vector)
            objective = DecoderObjective(jepa, decoder)
        held_out = watched(config, corpora, segmenter).to(stage.accelerator.device)
        on_sample = partial(_sample, batch=held_out)
        totals = stage.fit(objective, windows, on_sample, bound_to={"jepa": binding})
        stage.export(objective.decoder, stage.run.folder / "model")
        stage.finish(totals, corpora["train"])
    return folder


def train_stage_one(
    config: Config, jepa: Path, *, which: str = "model", resume: bool = False, root: Path = Path("runs")
) -> Path:
    """Stage one, whose encoder starts as that of a run of the family ("model"), or its average ("target").

    Raises ConfigError where the two encoders differ in shape.
    """
    start, settings, _ = read_encoder(jepa, which)
    if config.is_twin or (config.autoencoder.encoder, config.chunking) != (
        settings.encoder,
        settings.chunking,
    ):
        raise ConfigError(
            f"{jepa} has another encoder or chunking than the config: autoencoder.encoder and chunking must be "
            "those of its encoder and chunking"
        )

    def begin(autoencoder: Autoencoder) -> None:
        autoencoder.read.load_state_dict(start.read.state_dict())
        autoencoder.encoder.load_state_dict(start.encoder.state_dict())

    return train_autoencoder(config, resume=resume, root=root, begin=begin)


def match_run(run: Path, split: str = "test", most: int = 0) -> dict[str, Any]:
    """How often the second view that a run writes is the right one, in every byte; for expressions, in what it matches.

    most: pairs of the split; 0: all
    right: of each pair, in order;  text: fingerprint of the pairs
    """
    stage = run / "jepa"
    if not (stage / "totals.json").is_file():
        raise FileNotFoundError(f"{run} has no trained jepa/model: hldm jepa train makes a run")
    config = load_jepa_config([stage / "config.yaml"])
    if config.task != "pairs" or config.pairs.source == "halves":
        raise ConfigError(f"{run} was not trained on pairs of text and code: task=pairs is")
    corpora = read_corpora(config)
    require_same_text(stage, corpora["train"])
    if split not in corpora:
        raise ConfigError(f"--split is one of {', '.join(corpora)}, got {split[:80]!r}")
    twin = Autoencoder.from_pretrained(stage / "model").eval()
    pairs = [document.tobytes().split(NUL) for document in corpora[split]][: most or None]
    longest = 2 * max(len(code) for _, code in pairs)
    written: list[bytes] = []
    for begin in range(0, len(pairs), MATCHED_ROWS):
        some = pairs[begin : begin + MATCHED_ROWS]
        written += write_views(twin, [text for text, _ in some], longest)
    exact = [line == code for line, (_, code) in zip(written, pairs, strict=True)]
    found: dict[str, Any] = {"split": split, "pairs": len(pairs), "exact": sum(exact) / len(pairs)}
    found |= {"right": exact, "text": corpora[split].fingerprint}
    if config.pairs.source != "sums":
        probes = probe_texts()
        same = [
            is_exact or same_language(line.decode(errors="replace"), code.decode(), probes)
            for line, (_, code), is_exact in zip(written, pairs, exact, strict=True)
        ]
        found["functional"] = sum(same) / len(pairs)
    return found


def score_run(run: Path, sentences: int, split: Split = "test") -> list[dict[str, Any]]:
    """What a run's decoder writes of held-out sentences, from true, predicted and shuffled concepts."""
    config = settings_of(run)
    if config.task == "chunks":
        raise ConfigError(
            f"{run} predicts chunks: concepts are those of runs with task=sentences or task=views"
        )
    if not (run / "decoder" / "model").is_dir():
        raise FileNotFoundError(
            f"{run} has no decoder: hldm jepa decoder trains one, with the same --config and --name"
        )
    jepa = read_objective(run, config).eval()
    assert isinstance(jepa, SentenceObjective)
    corpora = read_corpora(config)
    require_same_text(run / "jepa", corpora["train"])
    chunker = make_chunker(config.chunking, read_segmenter(run / "segmenter" / "model", config.chunking))
    pairs = pairs_of(config, corpora[split], corpora["train"], chunker, sentences)
    pairs.lanes = min(sentences, pairs.count)
    decoder = ChunkDecoder.from_pretrained(run / "decoder" / "model").eval()
    return score_concepts(jepa, decoder, pairs.batch(0))


def laid_out(
    stage: Stage, config: JepaConfig, corpus: Corpus, segmenter: Any
) -> Windows | StreamedWindows | TextPairs:
    """The training text as the task reads it: windows of many streams, or pairs of texts."""
    if config.task == "chunks":
        return stage.windows(corpus, segmenter)
    return pairs_of(config, corpus, corpus, make_chunker(config.chunking, segmenter), config.data.lanes)


def make_objective(
    config: JepaConfig, windows: Windows | StreamedWindows | TextPairs
) -> JepaObjective | PairObjective:
    """The objective that a config describes, for a text that is laid out."""
    if config.task == "pairs":
        return PairObjective(config)
    letters = letters_of(windows.corpus.text)
    if isinstance(windows, TextPairs):
        return SentenceObjective(config, letters, 1.0)
    return JepaObjective(config, letters, len(windows.corpus.text) / windows.chunks)


def watched(config: JepaConfig, corpora: Mapping[str, Corpus], segmenter: Any = None) -> Batch | PairBatch:
    """The held-out text whose figures are followed, the same in every run of this chunking and task."""
    chunker, corpus = make_chunker(config.chunking, segmenter), corpora["validation"]
    if config.task != "chunks":
        return pairs_of(config, corpus, corpora["train"], chunker, WATCHED_PAIRS).batch(0)
    size = max(WATCHED_BYTES, 2 * config.chunking.max_bytes)
    return Windows(corpus, chunker, lanes=WATCHED_LANES, window_bytes=size).batch(0)


def _with_own_transformer(config: JepaConfig, stage: Path) -> JepaConfig:
    """The config with the trained transformer, if it has one: the one that it started as may be gone."""
    if not config.sentences.encoder:
        return config
    return changed(config, sentences=changed(config.sentences, encoder=f"{HF}{stage / 'model'}"))


def read_objective(folder: Path, config: JepaConfig) -> JepaObjective:
    """The trained encoder of a run and its predictor, as its objective has them.

    Raises FileNotFoundError with the command that makes it, ValueError where the settings disagree.
    """
    stage = folder / "jepa"
    if not (stage / "totals.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no trained encoder: hldm jepa train makes it, with this --config"
        )
    check_settings(stage, to_dict(config), only=SHARED_SETTINGS)
    if config.task == "pairs":
        raise ConfigError(f"{folder} is a run of task=pairs, whose decoder is the language model itself")
    kind = JepaObjective if config.task == "chunks" else SentenceObjective
    read: Callable[[Path], Any] = JepaEncoder.from_pretrained
    if config.sentences.encoder:
        config, read = _with_own_transformer(config, stage), TextTransformer.from_pretrained
    objective = kind(config, torch.ones(256, dtype=torch.long), 1.0)
    objective.encoder.load_state_dict(read(stage / "model").state_dict())
    if objective.predictor is not None:
        objective.predictor.load_state_dict(Predictor.from_pretrained(stage / "predictor").state_dict())
    if objective.target is not None:
        objective.target.load_state_dict(read(stage / "target").state_dict())
    return objective


def settings_of(run: Path, which: str = "model") -> JepaConfig:
    """What a run was trained with. Raises FileNotFoundError for a folder without its encoder."""
    stage = run / "jepa"
    if not (stage / which).is_dir() or not (stage / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} has no trained jepa/{which}: hldm jepa train makes a run")
    return load_jepa_config([stage / "config.yaml"])


def read_encoder(run: Path, which: str = "model") -> tuple[JepaEncoder, JepaConfig, Any]:
    """A run's encoder ("model") or its moving average ("target"), its settings, and what cuts its text.

    Raises FileNotFoundError for a folder without it, ConfigError for a transformer.
    """
    stage, config = run / "jepa", settings_of(run, which)
    if config.sentences.encoder:
        raise ConfigError(
            f"{run} has a transformer for its encoder: hldm similarity --transformer {stage / which} measures it"
        )
    segmenter = read_segmenter(run / "segmenter" / "model", config.chunking)
    encoder = JepaEncoder.from_pretrained(stage / which).eval()
    return encoder, config, make_chunker(config.chunking, segmenter)


@torch.no_grad()
def _sample(objective: Any, batch: Batch | PairBatch) -> str:
    """Held-out text with its holes: [hidden>written from the prediction], or without a decoder the nearest chunk."""
    if isinstance(objective, PairObjective):
        return _sample_of_views(objective, batch)
    if isinstance(batch, PairBatch):
        return _sample_of_pairs(objective, batch)
    jepa: JepaObjective = getattr(objective, "jepa", objective)
    view, decoder = jepa.held_out_view(batch), objective.decoder
    state = jepa.encoder.initial_state(len(batch.bytes), batch.bytes.device)
    vectors = jepa.encoder(view.window, state).vectors
    wanted = view.wanted
    if jepa.predictor is None:
        wanted = batch.is_chunk  # an autoencoder writes what it has read
        found = vectors[wanted]
    else:
        found = jepa.predict(view, vectors)[wanted]
    text, length = chunk_bytes(batch, wanted)
    right = [bytes(row[:size]) for row, size in zip(text.tolist(), length.tolist(), strict=True)]
    if decoder is None:
        target = jepa.normalised(jepa.targets(batch, wanted, None).vectors[wanted])
        nearest = torch.cdist(found[None], target[None])[0].argmin(dim=1).tolist()
        written = [right[index] for index in nearest]
    else:
        if objective is not jepa and jepa.predictor is not None:
            found = jepa.predictor.at_encoder_scale(found)
        written = decoder.write_chunks(found)
    return _shown(batch, wanted, written)


def _sample_of_views(objective: PairObjective, batch: Any) -> str:
    """The first pairs, and what is written after their first views."""
    some = range(min(SAMPLE_ROWS, len(batch.context.bytes)))
    texts = [text_of_row(batch.context, row) for row in some]
    written = write_views(objective.twin, texts, 2 * int(batch.target.length.max()))
    lines = zip(texts, written, some, strict=True)
    found = (b"%s [%s>%s]" % (text, text_of_row(batch.target, row), line) for text, line, row in lines)
    return b"\n".join(found).decode(errors="replace")


def text_of_row(window: Window, row: int) -> bytes:
    """The bytes of one row."""
    return bytes(window.bytes[row, : int(window.length[row])].tolist())


def _sample_of_pairs(objective: Any, batch: PairBatch) -> str:
    """The first contexts, each with the sentence written from its predicted concept; without a decoder, the nearest."""
    jepa: SentenceObjective = getattr(objective, "jepa", objective)
    if jepa.predictor is None:
        return "nothing is predicted"
    rows = range(min(SAMPLE_ROWS, len(batch.target.bytes)))

    def text(window: Window, row: int) -> str:
        return text_of_row(window, row).decode(errors="replace")

    if objective is not jepa:
        _, concepts = concepts_of(jepa, batch, torch.Generator().manual_seed(0))
        assert concepts is not None
        lines = objective.decoder.write_chunks(concepts[: len(rows)])
        written = [line.decode(errors="replace") for line in lines]
    else:
        predicted, target, _ = jepa.predictions(batch)
        nearest = torch.cdist(predicted[None], target[None])[0].argmin(dim=1).tolist()
        written = [text(batch.target, nearest[row]) for row in rows]
    return "\n".join(f"{text(batch.context, row)} [{text(batch.target, row)}>{written[row]}]" for row in rows)


def _shown(batch: Batch, wanted: Tensor, written: list[bytes]) -> str:
    """The first rows of a batch, what is wanted as [right>written]."""
    pieces = iter(written)
    lines = []
    for row in range(min(SAMPLE_ROWS, len(wanted))):
        line = b""
        for chunk in range(int(batch.count[row])):
            first, last = int(batch.first_byte[row, chunk]), int(batch.last_byte[row, chunk])
            right = bytes(batch.bytes[row, first : last + 1].tolist())
            line += b"[%s>%s]" % (right, next(pieces)) if wanted[row, chunk] else right
        lines.append(line.decode(errors="replace"))
    return "\n".join(lines)
