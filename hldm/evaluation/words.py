"""What a word is, in any script.

Between white space, or letters in a row; in scripts that write no space between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese and their kin) a character with its marks, as finding words there takes a dictionary. Tibetan parts
syllables by a mark of its own. For text in ASCII all of it is what `str.split` and `[a-z0-9]+` give.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

# scripts without spaces between words
_UNSPACED = (
    *(
        "Thai",
        "Lao",
        "Myanmar",
        "Khmer",
        "Tai_Le",
        "New_Tai_Lue",
        "Tai_Tham",
        "Tai_Viet",
        "Balinese",
        "Javanese",
    ),
    *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Nushu"),
)


def split_words(text: str) -> list[str]:
    """Words and what is written on to them, such as commas: parted by white space and unspaced characters."""
    return [match[0] for match in words_in(text)]


def words_in(text: str) -> list[re.Match[str]]:
    """The same, and where they stand."""
    return list((_SPACED if text.isascii() else _patterns()[0]).finditer(text))


def count_words(text: str) -> int:
    """How many there are."""
    return sum(1 for _ in (_SPACED if text.isascii() else _patterns()[0]).finditer(text))


def normal_words(text: str) -> list[str]:
    """Letters and digits in a row, lower case, marks included: what ROUGE compares."""
    return (_ASCII_WORD if text.isascii() else _patterns()[1]).findall(text.lower())


def letter_words(text: str) -> list[str]:
    """Letters in a row, as they are written."""
    return (_ASCII_LETTERS if text.isascii() else _patterns()[2]).findall(text)


def ends_unspaced(text: str) -> bool:
    """Whether no space follows the last word of a text."""
    words = [] if text.isascii() else words_in(text)
    return bool(words) and _patterns()[3].fullmatch(words[-1][0]) is not None


_SPACED = re.compile(r"\S+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_ASCII_LETTERS = re.compile(r"[A-Za-z]+")


@cache
def _patterns() -> tuple[Any, ...]:
    """(split, normal, letters, one unspaced word), of the package regex: re knows neither marks nor scripts."""
    import regex

    scripts = "".join(map(r"\p{{{}}}".format, _UNSPACED))
    # scx: marks of length and repetition, which kana share
    unspaced = rf"(?=[{scripts}\p{{scx=Hiragana}}])\p{{L}}"
    mark = r"[\p{M}\u200c\u200d]"  # and joiners
    one, other = f"(?:{unspaced}{mark}*)", f"(?!{unspaced})"
    return (
        regex.compile(rf"{one}|(?:{other}[^\s\x1c-\x1f])+"),  # as str.split, which parts at those four, too
        regex.compile(rf"{one}|{other}[\p{{L}}\p{{N}}](?:{other}[\p{{L}}\p{{N}}]|{mark})*"),
        regex.compile(rf"{one}|{other}\p{{L}}(?:{other}\p{{L}}|{mark})*"),
        regex.compile(one),
    )
