"""Small settings of the JEPA family, and batches of the built-in text."""

from __future__ import annotations

from functools import lru_cache

import torch
from conftest import ROOT

from hldm.chunking.chunker import make_chunker
from hldm.config import DataConfig
from hldm.jepa.config import JepaConfig, load_jepa_config
from hldm.jepa.objective import JepaObjective, letters_of
from hldm.sources.corpora import load_corpus
from hldm.text.corpus import Corpus
from hldm.text.windows import Windows

SMALL = [
    "data.lanes=4",
    "data.window_bytes=64",
    "data.held_out=0.2",
    "vector=16",
    "encoder.width=16",
    "encoder.blocks=[recurrent,attention]",
    "predictor.width=16",
    "predictor.layers=1",
    "decoder.width=16",
    "training.jepa.minutes=0",
    "training.jepa.steps=12",
    "training.decoder.minutes=0",
    "training.decoder.steps=6",
    "checkpoint.every=3",
    "logging.every=6",
]


def small(*overrides: str) -> JepaConfig:
    """configs/jepa-tiny.yaml, much smaller."""
    return load_jepa_config([ROOT / "configs/jepa-tiny.yaml"], [*SMALL, *overrides])


@lru_cache(maxsize=1)
def validation_text() -> Corpus:
    """Of the built-in corpus."""
    return load_corpus(DataConfig(), "validation")


def windows_of(config: JepaConfig) -> Windows:
    """Windows of the built-in validation text."""
    return Windows(
        validation_text(), make_chunker(config.chunking), lanes=4, window_bytes=config.data.window_bytes
    )


def objective_of(config: JepaConfig) -> JepaObjective:
    torch.manual_seed(0)
    windows = windows_of(config)
    return JepaObjective(config, letters_of(windows.corpus.text), len(windows.corpus.text) / windows.chunks)
