"""Views that make another text keep what they promise, and are the same for the same generator."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from hldm.jepa.config import TextView, ViewsConfig
from hldm.jepa.texts import (
    back_off,
    common_words,
    crop,
    drop_words,
    make_change,
    shuffle_words,
    typing_errors,
)

TEXT = (
    b"And the king said to his servants, Go through all the land to the fountains of water; it may be. " * 6
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def is_subsequence(some: list[bytes], whole: list[bytes]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in some)


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_words_are_left_out_at_their_rate_and_the_others_keep_their_order(share):
    kept = drop_words(TEXT, share, rng()).split(b" ")
    whole = TEXT.split(b" ")
    assert is_subsequence(kept, whole) and 1 - len(kept) / len(whole) == pytest.approx(share, abs=0.1)
    assert all(drop_words(b"one", 0.7, rng(seed)) == b"one" for seed in range(5))


def test_words_move_within_their_window_alone():
    words = TEXT.split(b" ")
    moved = shuffle_words(TEXT, 4, rng()).split(b" ")
    assert moved != words
    for begin in range(0, len(words), 4):
        assert sorted(moved[begin : begin + 4]) == sorted(words[begin : begin + 4])
    assert sorted(shuffle_words(TEXT, len(TEXT), rng()).split(b" ")) == sorted(words)


@pytest.mark.parametrize("share", [0.05, 0.15])
def test_typing_errors_touch_letters_at_their_rate(share):
    found = [typing_errors(TEXT, share, rng(seed)) for seed in range(10)]
    assert all(
        bytes(b for b in text if not chr(b).isalpha()) == bytes(b for b in TEXT if not chr(b).isalpha())
        for text in found
    )
    letters = sum(chr(b).isalpha() for b in TEXT)
    # a third are left out and a third struck twice, so that the length changes for two thirds
    changes = [abs(len(text) - len(TEXT)) for text in found]
    assert max(changes) < share * letters and len(set(found)) == 10
    assert typing_errors(TEXT, 0.0, rng()) == TEXT and typing_errors(b"a", 0.7, rng(3)) != b""


def test_a_crop_is_half_or_more_of_the_words_in_a_row():
    lengths = set()
    for seed in range(40):
        part = crop(TEXT, rng(seed))
        assert part in TEXT
        lengths.add(len(part.split(b" ")) / len(TEXT.split(b" ")))
    assert 0.5 <= min(lengths) < 0.6 and 0.9 < max(lengths) <= 1
    assert crop(b"one", rng()) == b"one"


def test_rare_words_are_cut_and_common_ones_stay():
    common = common_words([b"the king. The KING, the king, the king; the king said unto fountains"])
    assert common == {b"the", b"king"}
    assert back_off(b"The king, said fountains.", common) == b"The king, said foun"


@pytest.mark.parametrize("kind", get_args(TextView))
def test_every_change_is_seeded_and_never_empty(kind):
    change = make_change(ViewsConfig(kind=kind, share=0.15), [TEXT])
    assert change(TEXT, rng(1)) == change(TEXT, rng(1)) != b""
    assert all(change(b"a", rng(seed)) for seed in range(10))
    changes = kind not in (
        "translation",
        "back-off",
    )  # the one is no change of a text, the other of no common word
    assert (change(TEXT, rng(1)) != TEXT) == changes
