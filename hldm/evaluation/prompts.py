"""Places in held-out text to write on from, each with what the text says next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hldm.chunking.chunker import Chunker
from hldm.chunking.reading import prompt_chunker as prompt_chunker
from hldm.text.corpus import Corpus

PROMPT_CHARACTERS = 200  # some 35 words: enough to say who speaks and about what


class Prompt(NamedTuple):
    """A stretch of one document and its continuation."""

    text: bytes  # whole chunks
    continuation: str


def choose_prompts(
    corpus: Corpus,
    chunker: Chunker,
    count: int,
    *,
    prompt_characters: int = PROMPT_CHARACTERS,
    max_characters: int = 200,
) -> list[Prompt]:
    """At most `count` places spread evenly over a corpus, each moved back to where a chunk starts.

    prompt_characters, max_characters: room that a document must have before a place and after it; where none
    has so much, a third of the longest one will do. A prompt is that long, rounded up to whole chunks.
    The places do not depend on the chunking, so models that chunk differently go on from nearly the same ones.
    """
    is_first_byte = corpus.text & 0xC0 != 0x80  # of a UTF-8 character
    length = np.add.reduceat(is_first_byte, corpus.offsets[:-1], dtype=np.int64)  # (documents,) characters
    third = int(length.max()) // 3
    before, after = min(prompt_characters, third), min(max_characters, third)
    places_up_to = np.cumsum(np.maximum(length - before - after, 0))  # (documents,)
    count = min(count, int(places_up_to[-1]))  # a place for every character at most
    prompts = {}
    for place in (np.arange(count) + 0.5) * places_up_to[-1] // max(count, 1):
        document = int(np.searchsorted(places_up_to, place, side="right"))
        if document == len(corpus):  # there is no room anywhere
            continue
        text = corpus.document(document)
        borders = np.flatnonzero(chunker.chunk_start(text))
        border_at = np.append(0, np.cumsum(text & 0xC0 != 0x80))[borders]  # in characters
        from_end = places_up_to[document] - place + after
        chunk = np.searchsorted(border_at, length[document] - from_end, side="right") - 1
        first = np.searchsorted(border_at, border_at[chunk] - prompt_characters, side="right") - 1
        start, stop = borders[max(first, 0)], borders[chunk]
        if stop > 0:
            rest = text[stop : stop + 4 * max_characters].tobytes().decode("utf-8", errors="replace")
            prompts[document, stop] = Prompt(text[start:stop].tobytes(), rest[:max_characters])
    return list(prompts.values())
