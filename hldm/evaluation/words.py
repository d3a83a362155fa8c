"""What a word is, in any script.

Between white space, or letters in a row; in scripts that write no space between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese and their kin) a character with its marks, as finding words there takes a dictionary. Tibetan parts
syllables by a mark of its own. For text in ASCII all of it is what `str.split` and `[a-z0-9]+` give.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

# blocks of Unicode 15 whose scripts have no spaces between words; letters alone count
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # CJK radicals
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3031, 0x3035),
    (0x3038, 0x303C),
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3105, 0x312F),  # Bopomofo
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # ideographs
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9DF),  # Javanese
    (0xA9E0, 0xA9FF),  # Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width Katakana
    (0x1AFF0, 0x1B2FF),  # Kana, Nushu
    (0x20000, 0x3FFFD),
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


_LAST_MARK = 0x1F000  # beyond it there are variation selectors alone
_SPACED = re.compile(r"\S+")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_ASCII_LETTERS = re.compile(r"[A-Za-z]+")


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """(split, normal, letters, one unspaced word); re has no class of marks, without which words fall to pieces."""
    marks = [code for code in range(_LAST_MARK) if unicodedata.category(chr(code))[0] == "M"]
    mark = f"[{_ranges([(code, code) for code in marks])}\ufe00-\ufe0f\U000e0100-\U000e01ef\u200c\u200d]"  # and joiners
    blocks = f"[{_ranges(_UNSPACED)}]"
    one = f"(?:(?={blocks})[^\\W\\d_]{mark}*)"
    other = f"(?!(?={blocks})[^\\W\\d_])"
    return (
        re.compile(f"{one}|(?:{other}\\S)+"),
        re.compile(f"{one}|{other}[^\\W_](?:{other}[^\\W_]|{mark})*"),
        re.compile(f"{one}|{other}[^\\W\\d_](?:{other}[^\\W\\d_]|{mark})*"),
        re.compile(one),
    )


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """The inside of a character class."""
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
