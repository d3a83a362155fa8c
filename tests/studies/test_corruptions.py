"""Corrupted text: a little different, always alike."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hldm.studies.corruptions import CORRUPTIONS, corrupt
from hldm.text.corpus import make_corpus


def test_corrupted_text_differs_a_little_and_always_alike():
    text = b"And the king said to all his servants, Go now. " * 50
    corpus = make_corpus("x", [text, text])
    for kind in CORRUPTIONS:
        bad = corrupt(corpus, kind)
        assert (bad.text.tobytes() == corrupt(corpus, kind).text.tobytes()) and len(bad) == 2
        assert bad.text.tobytes() != corpus.text.tobytes()
        assert len(bad.text) == pytest.approx(len(corpus.text), rel=0.06)
    assert corrupt(corpus, "case").text.tobytes().lower() == corpus.text.tobytes().lower()
    assert corrupt(corpus, "spaces").text.tobytes().replace(b" ", b"") == corpus.text.tobytes().replace(
        b" ", b""
    )


def test_typing_errors_touch_letters_alone_and_none_twice():
    text = np.frombuffer(b"ab 12\n;cd. " * 300, np.uint8)
    bad = CORRUPTIONS["typos"](text, np.random.default_rng(0))
    assert bytes(byte for byte in bad if not chr(byte).isalpha()) == b" 12\n;. " * 300
    slips = b"ab aab abb a b ba cd ccd cdd c d dc".split()
    assert set(re.findall(rb"[a-z]+", bad.tobytes())) == set(slips)
