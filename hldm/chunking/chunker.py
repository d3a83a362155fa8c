r"""Where chunks begin. Every strategy returns one boolean mask over bytes: True at the first byte of each chunk.

All strategies are causal: whether a chunk starts at byte t depends on bytes <= t, so text chunked as it is
written gets the chunks it had in training. A strategy names its borders, the places where a chunk would like
to start; `Chunker.chunk_start` takes the first one at which the open chunk holds `min_bytes`, and where none
comes in time starts a new chunk with the first character that would make it longer than `max_bytes`. A
character is never split, unless it alone is longer than `max_bytes`.

A strategy that looks at the text alone is a class here with `borders(text)`. One that asks a model is a
segmenter (hldm.chunking.segmenter): a small byte model, trained first and frozen, so that its chunks, too, are known
before any other model runs and the data can be laid out by them. One of the user's own is named as module:Class
(hldm.chunking.own).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hldm.config import ChunkingConfig, ConfigError
from hldm.settings import is_own

_IS_SPACE = np.zeros(256, bool)
_IS_SPACE[list(b" \t\n\v\f\r")] = True

_CHARACTER_BYTES = bytearray(b"\x01" * 256)  # length of a UTF-8 character by its first byte (RFC 3629)
_CHARACTER_BYTES[0xC2:0xE0] = b"\x02" * 30
_CHARACTER_BYTES[0xE0:0xF0] = b"\x03" * 16
_CHARACTER_BYTES[0xF0:0xF5] = b"\x04" * 5


class Cutter:
    """The limits of one document's chunks, a stretch of text at a time."""

    def __init__(self, min_bytes: int, max_bytes: int) -> None:
        self.min_bytes = min_bytes
        self.max_bytes = max_bytes
        self.held = 0  # bytes of the open chunk so far

    def push(self, text: bytes, find: Callable[[int, int, int], int]) -> np.ndarray:
        """(t,) bool: where chunks start in the stretch that follows those before.

        find(start, first, stop): the first border in first..stop - 1, or -1; the open chunk starts at `start`,
        below 0 when in a stretch before
        """
        is_start = bytearray(len(text))
        if not text:
            return np.frombuffer(is_start, bool)
        if not self.held:
            is_start[0] = True
        is_ascii = text.isascii()
        start, end = -self.held, len(text)
        while True:
            limit = start + self.max_bytes
            cut = find(start, max(start + self.min_bytes, 0), min(limit + 1, end))
            if cut < 0:
                cut = limit
            if not is_ascii:  # the first character that would not fit whole
                for position in range(max(start + 1, limit - 3, 0), min(cut, end)):
                    if position + _CHARACTER_BYTES[text[position]] > limit:
                        cut = position
                        break
            if cut >= end:
                break
            is_start[cut] = True
            start = cut
        self.held = end - start
        return np.frombuffer(is_start, bool)

    def push_borders(self, text: bytes, is_border: np.ndarray) -> np.ndarray:
        """The same, from where borders are (t,) bool."""
        border = is_border.tobytes()  # bytes, for their fast find
        return self.push(text, lambda start, first, stop: border.find(1, first, stop))


class Chunker:
    """Cuts documents into chunks of min_bytes..max_bytes at the borders of a strategy.

    Only the last chunk of a document may be shorter than min_bytes, and one that ends early because
    the next character would not fit (by at most 3 bytes).
    """

    def __init__(self, min_bytes: int, max_bytes: int) -> None:
        self.min_bytes = min_bytes
        self.max_bytes = max_bytes

    def borders(self, text: bytes) -> np.ndarray:
        """(t,) bool: where a chunk would like to start; entry t depends on text[: t + 1] only."""
        raise NotImplementedError

    def chunk_start(self, text: bytes | np.ndarray) -> np.ndarray:
        """(t,) bool: the first byte of every chunk of one document."""
        assert isinstance(text, bytes) or text.dtype == np.uint8
        text = bytes(text)
        return Cutter(self.min_bytes, self.max_bytes).push_borders(text, self.borders(text))

    def chunk_starts(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """The same of many documents in a row."""
        return np.concatenate([self.chunk_start(document) for document in documents])


class FixedChunker(Chunker):
    """Chunks of max_bytes, whatever they hold."""

    def borders(self, text: bytes) -> np.ndarray:
        return np.zeros(len(text), bool)


class WordsChunker(Chunker):
    """Borders at the first byte of white space: a word carries the space before it, as in GPT-2."""

    def borders(self, text: bytes) -> np.ndarray:
        return _run_starts(_IS_SPACE[np.frombuffer(text, np.uint8)])


def _run_starts(is_in: np.ndarray) -> np.ndarray:
    """(t,) bool: the first of each run of true ones."""
    is_first = is_in.copy()
    is_first[1:] &= ~is_in[:-1]
    return is_first


# What SpaceByte (arXiv 2404.14408) takes for a space: all but letters, digits and the later bytes of characters.
_IS_SPACE_LIKE = np.ones(256, bool)
_IS_SPACE_LIKE[:128] = [not chr(byte).isalnum() for byte in range(128)]
_IS_SPACE_LIKE[0x80:0xC0] = False


class SpaceChunker(Chunker):
    """Borders at the first of each run of space-like bytes (SpaceByte, arXiv 2404.14408, section 3)."""

    def borders(self, text: bytes) -> np.ndarray:
        return _run_starts(_IS_SPACE_LIKE[np.frombuffer(text, np.uint8)])


_CJK_MARK = re.compile(rb"\xe3\x80\x82|\xef\xbc[\x81\x9f]")  # 。 ！ ？
# of other scripts, all of which have white space after them: Sentence_Terminal of Unicode 15 without marks that Latin
# or CJK text may hold, as their chunks are to stay
_OTHER_ENDS = (
    "\u037e\u0589\u05c3\u061d\u061e\u061f\u06d4"  # Greek's own ;, Armenian ։, Hebrew ׃ of verses, Arabic ؟ ۔ and kin
    "\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e"  # Syriac, N'Ko, Samaritan
    "\u0964\u0965\u0df4\u0e5a\u0e5b\u0f0d\u0f0e\u0f0f\u0f10\u0f11"  # Devanagari । ॥ and kin, Sinhala, Thai, Tibetan
    "\u104a\u104b\u1362\u1367\u1368\u166e\u1735\u1736"  # Burmese, Ethiopic ። ፧, Canadian, Philippine
    "\u17d4\u17d5\u1803\u1809\u1944\u1945"  # Khmer, Mongolian, Limbu
    "\u1aa8\u1aa9\u1aaa\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1c3b\u1c3c\u1c7e\u1c7f"  # Tai Tham, Balinese, Lepcha, Ol Chiki
    "\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9"  # Lisu, Vai, Bamum, Phags-pa, Javanese
    "\uaa5d\uaa5e\uaa5f\uaaf0\uaaf1\uabeb"  # Cham, Meetei
    "\U000110be\U000110bf\U000110c0\U000110c1\U00011141\U00011142\U00011143\U0001144b\U0001144c"  # Kaithi, Chakma, Newa
)


def _any_of(letters: str) -> bytes:
    """A pattern of bytes for any of these characters: those that share all bytes but the last, together."""
    last: dict[bytes, bytes] = {}
    for letter in map(str.encode, letters):
        last[letter[:-1]] = last.get(letter[:-1], b"") + letter[-1:]
    return b"|".join(re.escape(start) + b"[" + re.escape(ends) + b"]" for start, ends in last.items())


# marks . ! ? … 。 ！ ？ and those, then closing quotes and brackets " ' ) ] } ” ’ » 」 』 】 ）
_SENTENCE_END = re.compile(
    rb"((?:[.!?]|\xe2\x80\xa6|\xe3\x80\x82|\xef\xbc[\x81\x9f]|" + _any_of(_OTHER_ENDS) + rb")+)"
    rb"(?:[\"')\]}]|\xe2\x80[\x9d\x99]|\xc2\xbb|\xe3\x80[\x8d\x8f\x91]|\xef\xbc\x89)*"
)
_ASCII_END = re.compile(rb"([.!?]+)[\"')\]}]*")  # the same of text in ASCII, six times as fast
_ELLIPSIS = b".\xe2\x80\xa6"  # the bytes of . and …
_LAST_WORD = re.compile(rb"[A-Za-z.]+$")
_ABBREVIATIONS = frozenset(
    b"mr mrs ms dr prof st mt jr sr rev gen col capt lt sgt vs etc cf e.g i.e a.m p.m u.s vol fig pp".split()
)


class SentenceChunker(Chunker):
    """Borders at the white space after . ! ? and closing quotes, and right after the same marks of CJK.

    Likewise after the marks of other scripts, such as । ؟ ۔ ። ։. Where a script sets a space before its marks, the
    space and the mark belong to the sentence.

    Not after a known abbreviation or an initial ("Mr. J. Smith"), and not after an ellipsis, which a sentence
    may go on from. A quote that closes after a CJK mark opens the next chunk: by its first byte alone it
    could be any character.
    """

    def borders(self, text: bytes) -> np.ndarray:
        is_border = np.zeros(len(text) + 1, bool)
        is_border[[mark.end() for mark in _CJK_MARK.finditer(text)]] = True
        for end in (_ASCII_END if text.isascii() else _SENTENCE_END).finditer(text):
            at = end.end()
            if at < len(text) and _IS_SPACE[text[at]] and not self._goes_on(text, end):
                is_border[at] = True
        return is_border[:-1]

    @staticmethod
    def _goes_on(text: bytes, end: re.Match[bytes]) -> bool:
        """Whether the sentence may go on after this mark."""
        if end[1] != b".":
            return not end[1].strip(_ELLIPSIS)
        word = _LAST_WORD.search(text, max(0, end.start() - 12), end.start())  # 12: no abbreviation is longer
        return word is not None and (
            word[0].lower() in _ABBREVIATIONS or (len(word[0]) == 1 and word[0].isupper())
        )


class ParagraphChunker(Chunker):
    """Borders at the first byte after a blank line, and the newlines that follow it."""

    _BLANK_LINE = re.compile(rb"\n[ \t\r]*\n[\r\n]*")

    def borders(self, text: bytes) -> np.ndarray:
        is_border = np.zeros(len(text) + 1, bool)
        is_border[[gap.end() for gap in self._BLANK_LINE.finditer(text)]] = True
        return is_border[:-1]


TEXT_STRATEGIES: dict[str, type[Chunker]] = {
    "fixed": FixedChunker,
    "words": WordsChunker,
    "space": SpaceChunker,
    "sentence": SentenceChunker,
    "paragraph": ParagraphChunker,
}


def make_chunker(config: ChunkingConfig, segmenter: Any = None) -> Chunker:
    """The strategy that `chunking.strategy` names. Raises ConfigError when it takes a segmenter and none is given.

    segmenter: what a strategy asks that looks at more than the text (hldm.chunking.segmenter)
    """
    if config.strategy in TEXT_STRATEGIES:
        return TEXT_STRATEGIES[config.strategy](config.min_bytes, config.max_bytes)
    if is_own(config.strategy):
        from hldm.chunking.own import own_chunker

        return own_chunker(config)
    if segmenter is None:
        raise ConfigError(
            f"chunking.strategy={config.strategy} needs a segmenter: pass a run that was trained with it"
        )
    return segmenter.chunker(config.min_bytes, config.max_bytes)
