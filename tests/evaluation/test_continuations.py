"""What is written, held against the strategy that cuts it."""

from __future__ import annotations

import pytest

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig
from hldm.evaluation.continuations import rechunked
from hldm.generation.writer import Continuation


def test_written_chunks_are_compared_with_those_the_strategy_would_make():
    chunker = make_chunker(ChunkingConfig(min_bytes=1))

    def agreement(*chunks: bytes) -> float | None:
        return rechunked([Continuation(b"In", list(chunks))], chunker)

    assert agreement(b" the", b" end", b" of") == 1.0
    assert agreement(b" the", b" e", b"nd") == pytest.approx(2 * 1 / (2 + 1))  # one start too many
    assert agreement(b" the end", b" of") == pytest.approx(2 * 1 / (1 + 2))  # one too few
    assert agreement(b"side", b" the") == 1.0  # where the prompt ends, the prompt says
    assert agreement(b" the") is None and agreement() is None
