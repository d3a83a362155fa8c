"""Places in held-out text to write on from, each with what the text says next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hldm.chunking import make_chunker
from hldm.config import Config
from hldm.corpus import Split, load_corpus
from hldm.data import Windows

PROMPT_CHARACTERS = 200  # some 35 words: enough to say who speaks and about what


class Prompt(NamedTuple):
    """A stretch of one document and its continuation."""

    text: bytes  # whole chunks
    continuation: str


def held_out_prompts(
    config: Config, split: Split, count: int, *, prompt_characters: int = PROMPT_CHARACTERS
) -> list[Prompt]:
    """Prompts from a split of the data that a config names."""
    windows = Windows(
        load_corpus(config.data, split),
        make_chunker(config.chunking),
        lanes=1,
        window_bytes=2 * config.chunking.max_bytes,
        shuffle=False,
    )
    return choose_prompts(windows, count, prompt_characters=prompt_characters)


def choose_prompts(
    windows: Windows, count: int, *, prompt_characters: int = PROMPT_CHARACTERS, max_characters: int = 200
) -> list[Prompt]:
    """At most `count` places spread evenly over a corpus, at chunk borders with room on both sides.

    prompt_characters: length of a prompt, rounded up to whole chunks;  max_characters: of a continuation
    Where no document has that room, a third of the longest one must do for either; [] where it has not
    even that.
    """
    corpus = windows.corpus
    at = np.flatnonzero(windows.chunk_start)  # (chunks,)
    document = np.searchsorted(corpus.offsets, at, side="right") - 1
    begin, end = corpus.offsets[document], corpus.offsets[document + 1]
    characters = np.append(0, np.cumsum(corpus.text & 0xC0 != 0x80))  # before each byte, and in all
    behind, ahead = characters[at] - characters[begin], characters[end] - characters[at]
    third = int((behind + ahead).max()) // 3
    has_room = (
        (behind >= min(prompt_characters, third)) & (ahead >= min(max_characters, third)) & (at > begin)
    )
    fitting = np.flatnonzero(has_room)
    if not len(fitting) or not count:
        return []
    prompts = []
    for chunk in fitting[np.unique((np.arange(count) + 0.5) * len(fitting) // count).astype(int)]:
        first = np.searchsorted(characters[at], characters[at[chunk]] - prompt_characters, side="right") - 1
        start = max(at[max(first, 0)], begin[chunk])
        rest = corpus.text[at[chunk] : min(at[chunk] + 4 * max_characters, end[chunk])].tobytes()
        continuation = rest.decode("utf-8", errors="replace")[:max_characters]
        prompts.append(Prompt(corpus.text[start : at[chunk]].tobytes(), continuation))
    return prompts
