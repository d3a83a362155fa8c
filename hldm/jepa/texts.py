"""Views that make another text of a sentence: words left out or moved, typing errors, a part of it, rare words cut.

Each takes bytes and a numpy generator and gives bytes, never empty. Knows no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable

import numpy as np

from hldm.jepa.config import ViewsConfig

ORDER_WINDOW = 4  # words that change places among themselves
RARE, KEPT_LETTERS = 5, 4  # a word seen less often than this in training is cut to so many letters

TextChange = Callable[[bytes, np.random.Generator], bytes]


def make_change(views: ViewsConfig, documents: Iterable[bytes]) -> TextChange:
    """The change that the settings name; for every other kind of view none.

    documents: the training text, read by back-off alone, which needs to know how often words are seen
    """
    share = views.share
    if views.kind == "back-off":
        common = common_words(documents)
        return lambda text, rng: back_off(text, common)
    changes: dict[str, TextChange] = {
        "word-drop": lambda text, rng: drop_words(text, share, rng),
        "order": lambda text, rng: shuffle_words(text, ORDER_WINDOW, rng),
        "sentence-order": lambda text, rng: shuffle_words(text, len(text), rng),
        "typos": lambda text, rng: typing_errors(text, share, rng),
        "crop": crop,
    }
    return changes.get(views.kind, lambda text, rng: text)


def drop_words(text: bytes, share: float, rng: np.random.Generator) -> bytes:
    """Each word left out with this probability, but one stays."""
    words = text.split(b" ")
    keep = rng.random(len(words)) >= share
    keep[rng.integers(len(words))] = True
    return b" ".join(word for word, kept in zip(words, keep, strict=True) if kept) or text


def shuffle_words(text: bytes, window: int, rng: np.random.Generator) -> bytes:
    """Words in another order, within windows of so many."""
    words = text.split(b" ")
    order = [
        begin + at
        for begin in range(0, len(words), window)
        for at in rng.permutation(min(window, len(words) - begin)).tolist()
    ]
    return b" ".join(words[index] for index in order)


def typing_errors(text: bytes, share: float, rng: np.random.Generator) -> bytes:
    """A share of the letters left out, struck twice, or changed with the next, as often each."""
    out = bytearray()
    hit, kind = rng.random(len(text)) < share, rng.integers(0, 3, len(text))
    at = 0
    while at < len(text):
        letter = text[at : at + 1]
        at += 1
        if not letter.isalpha() or not hit[at - 1]:
            out += letter
        elif kind[at - 1] == 1:
            out += 2 * letter
        elif kind[at - 1] == 2 and text[at : at + 1].isalpha():
            out += text[at : at + 1] + letter
            at += 1
    return bytes(out) or text


def crop(text: bytes, rng: np.random.Generator) -> bytes:
    """Half to all of its words in a row."""
    words = text.split(b" ")
    kept = int(rng.integers(-(-len(words) // 2), len(words) + 1))
    begin = int(rng.integers(len(words) - kept + 1))
    return b" ".join(words[begin : begin + kept]) or text


def back_off(text: bytes, common: Container[bytes]) -> bytes:
    """Every word that is not common cut to its first letters; what stands around letters stays."""
    return b" ".join(word if _core(word) in common else word[:KEPT_LETTERS] for word in text.split(b" "))


def common_words(documents: Iterable[bytes]) -> frozenset[bytes]:
    """Words seen often enough to be kept, in lower case, without punctuation around them."""
    seen = Counter(_core(word) for document in documents for word in document.split(b" "))
    return frozenset(word for word, count in seen.items() if count >= RARE)


def _core(word: bytes) -> bytes:
    return word.strip(b".,;:!?()\"'").lower()
