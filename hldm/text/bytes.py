"""Text as bytes: 256 values plus a few symbols of the decoder's own.

There is nothing to train and nothing to look up: id = byte. Any byte string round-trips, valid UTF-8
or not. Also here: counting characters, decoding a stream, and making text safe for a terminal.
Knows numpy and the standard library only.
"""

from __future__ import annotations

import codecs
import os
import re
from typing import TextIO

import numpy as np

END_OF_CHUNK = 256  # emitted by the decoder after the last byte of a chunk
END_OF_DOCUMENT = 257  # emitted in its place after the last chunk of a document
OUTPUTS = 258  # what the decoder may emit: 256 bytes and the two ends
START = 258  # the decoder's first input in every chunk
END_MARK = "∎"  # stands in what is shown where a document ends
VOCABULARY = 260  # one symbol is spare: saved models have a row for it
PROMPT_WINDOW = 1024  # bytes of prompts read at once, all together: bounds memory, however many and long
MAX_PROMPT_BYTES = 2**20  # 300 pages; more takes minutes to read, and a device such as /dev/zero never ends


def to_bytes(text: str) -> bytes:
    """UTF-8 bytes of a string; bytes the shell could not decode (PEP 383) come back as they were.

    Raises ValueError for half of a surrogate pair, which no byte string stands for.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds half a surrogate pair, {text[error.start]!a} at character {error.start}, "
            "which UTF-8 cannot encode: remove it"
        ) from None


def to_ids(text: bytes) -> np.ndarray:
    """Ids (t,) int64 of a byte string, one a byte."""
    return np.frombuffer(text, np.uint8).astype(np.int64)


def count_characters(text: bytes) -> int:
    """UTF-8 characters in text, the denominator of bits per character; an invalid byte counts as one."""
    return len(text.decode("utf-8", "surrogateescape"))


def stream_decoder(errors: str = "replace") -> codecs.IncrementalDecoder:
    """Bytes in, text out as soon as its characters are complete; invalid bytes become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")(errors)


def shows_colour(stream: TextIO | None) -> bool:
    """Whether colours may be written: to a terminal that has them, unless the user asks for none (no-color.org)."""
    return (
        stream is not None
        and stream.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") not in ("dumb", "")
    )


TINTS = (153, 223)  # of the 256 colours of terminals: light blue and light orange, both read below black


def tinted(text: str, index: int) -> str:
    r"""Text on a ground whose colour turns with `index`, for a terminal; line by line, so that none is coloured on."""
    ground = f"\x1b[30;48;5;{TINTS[index % 2]}m"
    return "\n".join(f"{ground}{line}\x1b[0m" if line else "" for line in text.split("\n"))


# C0 but for newline and tab, DEL, C1; marks, embeddings, overrides and isolates of the bidirectional
# algorithm (Unicode UAX 9), which make a line read as what it is not; surrogates, which cannot be printed.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with everything that could steer a terminal shown as an escape (`\x1b`, `\u202e`)."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
