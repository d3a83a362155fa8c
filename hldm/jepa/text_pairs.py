"""Pairs of texts to learn from: a sentence and a view of it, or those before it; a verse in two translations.

`TextPairs` lays them out as `hldm.text.windows.Windows` lays out a corpus: a batch is a pure function of (seed, step),
so a resumed run and any split of the batch see the same pairs. Next-sentence prediction follows LANG-JEPA.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from hldm.chunking.chunker import Chunker, SentenceChunker
from hldm.config import ConfigError
from hldm.jepa.config import JepaConfig, SentencesConfig
from hldm.jepa.formal import regexes, sums
from hldm.jepa.texts import make_change
from hldm.jepa.translations import verses_of
from hldm.sources.corpora import load_corpora, split_of_book
from hldm.text.corpus import Corpus, make_corpus
from hldm.text.windows import Batch, ByStep, window_of

NUL = b"\0"  # between the two views of a document
MakePair = Callable[[int, np.random.Generator], tuple[bytes, bytes]]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Two texts a row: what is read, and what is predicted from it."""

    context: Batch
    target: Batch

    def to(self, device: torch.device | str) -> PairBatch:
        """The same on another device."""
        return PairBatch(self.context.to(device), self.target.to(device))


class TextPairs(ByStep):
    """Batches of pairs, `lanes` a step; every epoch takes each pair once, in another order."""

    def __init__(
        self, corpus: Corpus, make: MakePair, count: int, chunker: Chunker, *, lanes: int, seed: int = 0
    ):
        """corpus: what the pairs are of;  make: the pair of a number below count, changed by chance."""
        self.corpus, self.make, self.count, self.chunker = corpus, make, count, chunker
        self.lanes, self.seed = lanes, seed
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)
        )

    def places(self, step: int) -> list[tuple[int, int] | None]:
        """Which pairs a step has: (number, 0)."""
        return [(number, 0) for number in self._numbers(step)]

    def batch(self, step: int, first_row: int = 0, rows: int | None = None) -> PairBatch:
        """The batch of a step, or some of its rows, padded to the same size whatever the rows."""
        last_row = self.lanes if rows is None else first_row + rows
        pairs = [
            self.make(number, np.random.default_rng([self.seed, step, row]))
            for row, number in enumerate(self._numbers(step))
        ]
        context, target = zip(*pairs, strict=True)
        return PairBatch(*(self._window(texts, first_row, last_row) for texts in (context, target)))

    def _numbers(self, step: int) -> list[int]:
        at = step * self.lanes + np.arange(self.lanes)
        epochs, places = np.divmod(at, self.count)
        return [int(self._order(int(e))[p]) for e, p in zip(epochs, places, strict=True)]

    def _window(self, texts: Sequence[bytes], first_row: int, last_row: int) -> Batch:
        starts = [self.chunker.chunk_start(text) for text in texts]
        own = slice(first_row, last_row)
        window = window_of(
            texts[own],
            starts[own],
            [True] * len(texts[own]),
            width=max(map(len, texts)),
            chunks=max(int(start.sum()) for start in starts),
        )
        fields = {
            name: getattr(window, name) for name in ("bytes", "length", "doc_start", "doc_end", "chunk_start")
        }
        return Batch(
            **fields,
            chunks=window.chunks,
            chunk_index=torch.zeros(len(texts[own]), window.chunks, dtype=torch.long),
            first_row=first_row,
            total_rows=len(texts),
            total_bytes=sum(map(len, texts)),
        )


def sentences_of(document: bytes, settings: SentencesConfig) -> list[bytes]:
    """The sentences of a document, without white space around them."""
    starts = SentenceChunker(settings.min_bytes, settings.max_bytes).chunk_start(document)
    borders = [*np.flatnonzero(starts).tolist(), len(document)]
    pieces = (document[begin:end].strip() for begin, end in zip(borders, borders[1:], strict=False))
    return [piece for piece in pieces if piece]


def pairs_of(config: JepaConfig, corpus: Corpus, training: Corpus, chunker: Chunker, lanes: int) -> TextPairs:
    """The pairs of a split of the text.

    training: the split that learns how common words are
    Raises ConfigError where there are none: no document of two sentences, or no translation of the text.
    """
    if config.task == "pairs":
        make, count = _two_views(config, corpus)
    elif config.task == "sentences":
        make, count = _next_sentences(config, corpus)
    elif config.views.kind == "translation":
        make, count = _translated(config, corpus)
    else:
        make, count = _changed_sentences(config, corpus, training)
    return TextPairs(corpus, make, count, chunker, lanes=lanes, seed=config.seed)


def _two_views(config: JepaConfig, corpus: Corpus) -> tuple[MakePair, int]:
    """Documents that hold two views with a NUL between; or the halves of every window of the text."""
    if config.pairs.source != "halves":
        views = [tuple(document.tobytes().split(NUL)) for document in corpus]
        return lambda number, rng: (views[number][0], views[number][1]), len(views)
    size = config.data.window_bytes
    count = len(corpus.text) // size
    if not count:
        raise ConfigError(
            f"{corpus.name} is shorter than data.window_bytes={size}: there is no window to halve"
        )

    def make(number: int, rng: np.random.Generator) -> tuple[bytes, bytes]:
        window = corpus.text[number * size : (number + 1) * size].tobytes()
        return window[: size // 2], window[size // 2 :]

    return make, count


def read_corpora(config: JepaConfig) -> dict[str, Corpus]:
    """The text of a run by split: `hldm.sources.corpora`'s, or pairs of views, a document each.

    Pairs have train, validation and test, those of a grammar `combinations` and `longer` besides.
    Raises ConfigError, FileNotFoundError, or ValueError for a row that is no pair.
    """
    if config.task != "pairs" or config.pairs.source == "halves":
        return {str(split): corpus for split, corpus in load_corpora(config.data).items()}
    pairs = config.pairs
    if pairs.source == "jsonl":
        rows = read_views(Path(pairs.train))
        held_out = [row for index, row in enumerate(rows) if index % 10 == 9]
        kept = [row for index, row in enumerate(rows) if index % 10 != 9]
        if not held_out:
            raise ConfigError(
                f"{pairs.train} holds {len(rows)} pairs: ten are needed, one of which is held out"
            )
        splits = {"train": kept, "validation": held_out, "test": read_views(Path(pairs.test))}
    else:
        splits = (sums if pairs.source == "sums" else regexes)(pairs.count, config.seed)._asdict()
    return {
        name: make_corpus(f"{pairs.source}/{name}", (NUL.join(map(str.encode, row)) for row in found))
        for name, found in splits.items()
    }


def read_views(path: Path) -> list[tuple[str, str]]:
    """The pairs of a .jsonl file, objects with `text` and `code`. Raises ValueError, one line, for any other row."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            views = row["text"], row["code"]
            is_pair = all(isinstance(view, str) and view.strip() and "\0" not in view for view in views)
            for view in views if is_pair else ():
                view.encode()
        except (ValueError, LookupError, TypeError, RecursionError):
            is_pair = False
        if not is_pair:
            expected = '{"text": ..., "code": ...}, both text that is not empty'
            raise ValueError(f"{path}:{number}: expected {expected}: mend or remove it")
        found.append(views)
    if not found:
        raise ValueError(f"{path} holds no pairs")
    return found


def _documents(corpus: Corpus, settings: SentencesConfig) -> list[list[bytes]]:
    return [sentences_of(document.tobytes(), settings) for document in corpus]


def _next_sentences(config: JepaConfig, corpus: Corpus) -> tuple[MakePair, int]:
    """The sentences before, k at most, and the next one; a document of one sentence has no pair."""
    documents = _documents(corpus, config.sentences)
    places = [(index, at) for index, found in enumerate(documents) for at in range(1, len(found))]
    if not places:
        raise ConfigError(
            f"{corpus.name}: no document has two sentences of sentences.min_bytes={config.sentences.min_bytes}: there "
            "is no next one to predict; join documents, or choose task=chunks"
        )

    def make(number: int, rng: np.random.Generator) -> tuple[bytes, bytes]:
        index, at = places[number]
        before = documents[index][max(0, at - config.sentences.context) : at]
        return b" ".join(before), documents[index][at]

    return make, len(places)


def _changed_sentences(config: JepaConfig, corpus: Corpus, training: Corpus) -> tuple[MakePair, int]:
    """A sentence as the view changes it, and as it is."""
    sentences = [sentence for found in _documents(corpus, config.sentences) for sentence in found]
    if not sentences:
        raise ConfigError(f"{corpus.name} holds no sentence but white space; choose another text")
    change = make_change(config.views, (document.tobytes() for document in training))

    def make(number: int, rng: np.random.Generator) -> tuple[bytes, bytes]:
        return change(sentences[number], rng), sentences[number]

    return make, len(sentences)


def _translated(config: JepaConfig, corpus: Corpus) -> tuple[MakePair, int]:
    """A verse in two of the translations, drawn by chance."""
    if config.data.path or config.data.dataset:
        raise ConfigError(
            "views.kind=translation is of the built-in text: leave data.path and data.dataset out"
        )
    names = ("bbe", *config.views.translations)
    texts = [verses_of(name) for name in names]
    own = (n for n in sorted(texts[0]) if split_of_book(n // 1_000_000) == corpus.split)
    numbers = [n for n in own if all(n in found for found in texts)]

    def make(number: int, rng: np.random.Generator) -> tuple[bytes, bytes]:
        first, second = rng.choice(len(texts), 2, replace=False)
        return texts[first][numbers[number]].encode(), texts[second][numbers[number]].encode()

    return make, len(numbers)
