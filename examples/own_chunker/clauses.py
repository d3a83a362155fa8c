"""Chunks that end where a clause does: after , ; : . ! ? and whatever closes behind the mark.

hldm chunk --text FILE --strategy clauses:ClauseChunker --max-bytes 32
hldm train-autoencoder --config CONFIG chunking.strategy=clauses:ClauseChunker chunking.max_bytes=32
"""

from __future__ import annotations

import re

import numpy as np

# A mark, closing quotes and brackets, then the white space at which the next clause starts. What is found ends at that
# space, so the border there depends on no byte after it.
CLAUSE_END = re.compile(rb"[,;:.!?][\"')\]]*(?=\s)")


class ClauseChunker:
    """Borders at the white space after a clause."""

    def __init__(self, min_bytes: int, max_bytes: int) -> None:
        """The limits, which hldm keeps by itself: a chunk is cut at max_bytes where no border comes in time."""

    def borders(self, text: bytes) -> np.ndarray:
        """(t,) bool: where a chunk would like to start; entry t is a function of text[: t + 1] alone."""
        is_border = np.zeros(len(text), bool)
        is_border[[match.end() for match in CLAUSE_END.finditer(text)]] = True
        return is_border
