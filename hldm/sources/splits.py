"""What a text comes to and which of it is held out, in one line: said before a model is trained on it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hldm.config import DataConfig
from hldm.sources.corpora import is_split_by_document
from hldm.text.corpus import SPLITS, Corpus, Split

USES: dict[Split, str] = {"train": "to train on", "validation": "for validation", "test": "for the test"}
AT_ONCE = 2**24  # bytes of text counted at a time


def describe_splits(source: str, config: DataConfig, corpora: Mapping[Split, Corpus]) -> str:
    """Documents and characters of a text, those of each split, and how it was split. source: what it is called."""
    counts = {split: _characters(corpora[split]) for split in SPLITS}
    total, kept = sum(counts.values()), [len(corpora[split]) for split in SPLITS[1:]]
    shares = ", ".join(f"{counts[split]:,} ({counts[split] / total:.1%}) {USES[split]}" for split in SPLITS)
    documents = len(corpora["train"])
    if config.stream:
        how, documents = "counted in the beginning, the rest is read as it trains", documents + sum(kept)
    elif not (config.path or config.dataset):
        how, documents = "whole books are held out", documents + sum(kept)
    elif is_split_by_document(corpora, config.held_out):
        how, documents = f"{kept[0]:,} and {kept[1]:,} whole documents are held out", documents + sum(kept)
    else:
        whose = "each document, for there are few" if documents > 1 else "the text"
        how = f"validation and test text are the end of {whose}"
    counted = f"{documents:,} document{'s' * (documents != 1)}, {total:,} characters"
    return f"text: {source}, {counted}: {shares}; {how}"


def _characters(corpus: Corpus) -> int:
    """UTF-8 characters: bytes that do not continue one."""
    pieces = range(0, len(corpus.text), AT_ONCE)
    return sum(int(np.count_nonzero(corpus.text[at : at + AT_ONCE] & 0xC0 != 0x80)) for at in pieces)
