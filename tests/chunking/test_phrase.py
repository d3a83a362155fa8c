"""`phrase`: what is heard, where it is asked, and that it foretells pauses in text that has none written."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from conftest import segmenters_of

from hldm.chunking.phrase import BLANK, PhraseSegmenter
from hldm.config import ChunkingConfig
from hldm.text.bytes import to_ids
from hldm.text.corpus import make_corpus
from hldm.training.segmenters import train_segmenter
from tests.chunking.test_segmenter import small_segmenter


def phrase() -> PhraseSegmenter:
    segmenter = small_segmenter("phrase")
    assert isinstance(segmenter, PhraseSegmenter)
    return segmenter


def ids(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.from_numpy(to_ids(text.encode()))[None]
    return found, torch.arange(found.shape[1])[None] == 0


def test_marks_are_read_as_blanks_and_everything_else_as_it_is():
    text, _ = ids('He said, "No!" (it\'s so).\n')
    heard = bytes(phrase().heard(text)[0].tolist())
    assert heard.replace(bytes([BLANK]), b"_") == b"He said_ _No__ _it's so___"


def test_the_answer_stands_at_the_first_white_space_of_a_gap_and_is_above_all_others():
    segmenter = phrase()
    text, doc_start = ids("ab, cd  ef.\n\n gh")
    with torch.no_grad():
        signal, _ = segmenter.signal(text, doc_start, segmenter.initial_state(1))
        features, _ = segmenter.read(segmenter.heard(text), doc_start, segmenter.initial_state(1))
        p = segmenter.pause(features.before).sigmoid()[0, :, 0]
    expected = p - 1
    for turn, start in ((3, 2), (6, 6), (11, 10)):  # asked at the comma, the first space, the full stop
        expected[turn] = p[start]
    torch.testing.assert_close(signal[0, :, 0], expected)


def test_gaps_with_a_mark_are_what_is_to_be_foretold_and_one_cut_off_is_left_out():
    segmenter = phrase()
    text, doc_start = ids("ab, cd ef. gh ")
    opens, pauses = segmenter.pauses(text, segmenter.gaps(text, doc_start, segmenter.initial_state(1)))
    assert opens[0].nonzero()[:, 0].tolist() == [2, 6, 9]
    assert (opens & pauses)[0].nonzero()[:, 0].tolist() == [2, 9]


def test_pauses_are_found_where_none_are_written():
    draw = random.Random(0)
    words = [draw.choice(["ka", "lo", "min", "tuf", "sere"]) for _ in range(3000)]
    spoken = "".join(word + (", " if word == "ka" else " ") for word in words)  # who says ka draws breath
    chunking = ChunkingConfig(
        strategy="phrase",
        min_bytes=1,
        max_bytes=64,
        target_bytes=len(spoken) / words.count("ka"),
    )
    with segmenters_of(width=32, layers=1, window_bytes=64, steps=150, minutes=math.inf):
        segmenter = train_segmenter(chunking, make_corpus("spoken", [spoken.encode()]))
    segmenter.threshold.fill_(0.5)  # the calibrated one lies among the pauses, all of them near 1
    plain = " ".join(words[:400])
    starts = np.flatnonzero(segmenter.chunker(1, 64).chunk_start(plain.encode()))
    after_ka = [at for at in range(len(plain)) if plain[:at].endswith("ka") and plain[at] == " "]
    forced = [at for at in starts if at not in after_ka]  # the text's first byte, and what max_bytes ends
    assert set(after_ka) <= set(starts.tolist()) and len(forced) < 0.1 * len(after_ka)
