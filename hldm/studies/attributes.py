"""Attributes that text can be steered to: a label for every passage of a corpus, from its book or from its words.

Knows no model. A passage is some 200 characters of one document, whole chunks; one that an attribute says nothing of
has the label -1 and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from hldm.sources.corpora import bible_books
from hldm.text.corpus import Corpus, Split

PASSAGE = 200  # characters: two or three verses

# of the built-in text, by the number of its first book
_GENRES = {1: "history", 18: "poetry", 23: "prophets", 40: "gospels", 45: "letters"}
_LEXICON = {
    "praise": "praise glory joy glad blessing blessed love loved peace grace mercy good salvation songs song holy "
    "beautiful thanks happy comfort",
    "curse": "curse cursed evil wrath death dead destruction sword fear pain shame sin sins sinners angry anger "
    "punishment hate hated trouble sorrow wasted fire war blood",
}  # fmt: skip
_SPEECH = {"me", "my", "i", "you", "your", "we", "us", "our"}


class Passages(NamedTuple):
    """A corpus in passages."""

    of_chunk: (
        np.ndarray
    )  # (chunks,) the passage each chunk belongs to; -1: to none, as the short rest of a document
    texts: list[bytes]
    document: np.ndarray  # (passages,) the document each is of


class Attribute(NamedTuple):
    """A property by which passages are classified."""

    name: str
    values: tuple[str, ...]
    # (passages, documents of the whole split, split) -> (passages,) index of the value, or -1
    label: Callable[[Passages, int, Split], np.ndarray]


def passages_of(corpus: Corpus, chunk_start: np.ndarray, characters: int = PASSAGE) -> Passages:
    """Passages of a corpus, each from where a chunk starts. chunk_start: (t,) bool"""
    first = np.flatnonzero(chunk_start)  # (chunks,)
    at = np.append(0, np.cumsum(corpus.text & 0xC0 != 0x80))  # characters before each byte
    document = np.searchsorted(corpus.offsets, first, side="right") - 1
    offset = at[first] - at[corpus.offsets[document]]
    length = np.diff(at[corpus.offsets])[document]
    number = offset // characters
    is_whole = (number + 1) * characters <= length
    key = np.where(is_whole, document * (int(length.max(initial=0)) // characters + 2) + number, -1)
    names, of_chunk = np.unique(key, return_inverse=True)
    shift = int(len(names) > 0 and names[0] == -1)
    of_chunk = of_chunk - shift
    ends = np.append(first[1:], len(corpus.text))
    count = len(names) - shift
    begin = np.full(count, len(corpus.text))
    end = np.zeros(count, dtype=int)
    inside = of_chunk >= 0
    np.minimum.at(begin, of_chunk[inside], first[inside])
    np.maximum.at(end, of_chunk[inside], ends[inside])
    texts = [corpus.text[a:b].tobytes() for a, b in zip(begin, end, strict=True)]
    return Passages(of_chunk, texts, np.searchsorted(corpus.offsets, begin, side="right") - 1)


# ---- the attributes


def _genre(passages: Passages, documents: int, split: Split) -> np.ndarray:
    books = np.array(bible_books(split))
    if len(books) != documents:
        raise ValueError("genre is known of the built-in text alone: take speech, feeling or sentences")
    return np.searchsorted(list(_GENRES), books[passages.document], side="right") - 1


def _words(text: bytes) -> list[str]:
    return re.findall(r"[a-z']+", text.decode("utf-8", "replace").lower())


def _by_text(label: Callable[[bytes], int]) -> Callable[[Passages, int, Split], np.ndarray]:
    return lambda passages, documents, split: np.array([label(text) for text in passages.texts], dtype=int)


def speech(text: bytes) -> int:
    """1 where one word in ten or more is I, you or we, 0 where none is, else -1."""
    words = _words(text)
    share = sum(word in _SPEECH for word in words) / max(len(words), 1)
    return 1 if share >= 0.1 else 0 if share == 0 else -1


def feeling(text: bytes) -> int:
    """0 where words of praise are more by two or more, 1 where words of curse are, else -1."""
    words = _words(text)
    praise, curse = (sum(word in lexicon for word in words) for lexicon in _LEXICONS)
    return -1 if abs(praise - curse) < 2 else int(curse > praise)


def sentences(text: bytes) -> int:
    """0 where sentences, or parts between colons, have 12 words or fewer on average, 1 where 22 or more, else -1."""
    words = len(_words(text))
    parts = len(re.findall(rb"[.?!;:]", text))
    mean = words / max(parts, 1)
    return 0 if mean <= 12 else 1 if mean >= 22 else -1


_LEXICONS = [frozenset(words.split()) for words in _LEXICON.values()]
ATTRIBUTES: Mapping[str, Attribute] = {
    each.name: each
    for each in (
        Attribute("genre", tuple(_GENRES.values()), _genre),
        Attribute("speech", ("none", "speech"), _by_text(speech)),
        Attribute("feeling", tuple(_LEXICON), _by_text(feeling)),
        Attribute("sentences", ("short", "long"), _by_text(sentences)),
    )
}


def attribute_of(name: str) -> Attribute:
    """The attribute of a name. Raises ValueError for an unknown one."""
    if name not in ATTRIBUTES:
        raise ValueError(f"--attribute is one of {', '.join(ATTRIBUTES)}, got {name!r:.40}")
    return ATTRIBUTES[name]
