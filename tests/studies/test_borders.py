"""Where chunks start, beside where words, sentences and verses do."""

from __future__ import annotations

import numpy as np
import pytest

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig
from hldm.studies.borders import agree, describe_chunks


def test_borders_agree_before_and_after_white_space_alike():
    text = np.frombuffer(b"In the  end. It was", np.uint8)

    def places(*at: int) -> np.ndarray:
        return np.isin(np.arange(len(text)), at)

    words = places(2, 6, 12, 15)
    assert agree(text, places(3, 7, 13, 16), words) == {"precision": 1.0, "recall": 1.0}
    assert agree(text, places(3, 4), words) == {"precision": 0.5, "recall": 0.25}
    assert agree(text, places(), words) == {"precision": None, "recall": 0.0}


def test_chunks_are_described_by_length_and_borders():
    documents = [np.frombuffer(text.encode(), np.uint8) for text in ("Él va. No va.", "Así")]
    starts = np.concatenate([make_chunker(ChunkingConfig(min_bytes=1)).chunk_start(d) for d in documents])
    found = describe_chunks(documents, starts, [np.array([0, 8]), np.array([0])])
    assert found["characters_per_chunk"] == pytest.approx(16 / 5)  # Él| va.| No| va.|Así
    assert found["borders"]["word"] == {"precision": 1.0, "recall": 1.0}
    assert found["borders"]["sentence"] == found["borders"]["verse"] == {"precision": 1 / 3, "recall": 1.0}


def test_kinds_are_different_chunks_a_chunk():
    text = np.frombuffer(b"In the the end", np.uint8)
    is_start = make_chunker(ChunkingConfig(min_bytes=1)).chunk_start(text)
    assert describe_chunks([text], is_start)["kinds"] == 3 / 4


def test_verses_beyond_a_text_that_was_cut_do_not_count():
    document = np.frombuffer(b"one two three", np.uint8)
    is_start = np.zeros(len(document), bool)
    is_start[[0, 4, 8]] = True
    found = describe_chunks([document], is_start, [np.array([0, 4, 900])])
    assert found["borders"]["verse"]["recall"] == 1
