from __future__ import annotations

import io
import os
import pty

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hldm.text.bytes import (
    count_characters,
    printable,
    shows_colour,
    stream_decoder,
    to_bytes,
    to_ids,
)


@given(st.binary())
def test_any_byte_string_round_trips(text):
    ids = to_ids(text)
    assert bytes(ids.tolist()) == text
    assert ids.dtype == np.int64 and (ids < 256).all()


@given(st.binary())
def test_bytes_that_the_shell_could_not_decode_come_back(text):
    assert to_bytes(text.decode("utf-8", "surrogateescape")) == text


def test_half_a_surrogate_pair_is_refused_in_one_line():
    with pytest.raises(ValueError, match="at character 2") as error:
        to_bytes("ab\ud800")
    assert "\n" not in str(error.value)


@given(st.text(alphabet=st.characters(codec="utf-8")), st.lists(st.sampled_from([0x80, 0xBF, 0xC0, 0xFF])))
def test_characters_count_one_each_and_invalid_bytes_too(text, invalid):
    assert count_characters(text.encode() + bytes(invalid)) == len(text) + len(invalid)


@given(st.binary(), st.lists(st.integers(0, 20)))
def test_a_stream_decodes_as_the_whole_however_it_is_cut(text, cuts):
    decoder, out, rest = stream_decoder(), "", text
    for cut in cuts:
        out += decoder.decode(rest[:cut])
        rest = rest[cut:]
    out += decoder.decode(rest, final=True)
    assert out == text.decode("utf-8", "replace")


def test_an_incomplete_character_is_held_back():
    decoder = stream_decoder()
    assert [decoder.decode(bytes([byte])) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert decoder.decode("é".encode()[:1]) == "" and decoder.decode(b"", final=True) == "\ufffd"
    assert decoder.decode(b"ready again") == "ready again"


@given(st.text())  # surrogates included
def test_printable_text_cannot_steer_a_terminal(text):
    shown = printable(text)
    shown.encode()
    unsafe = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert not set(map(ord, shown)) & (set(unsafe) - {0x0A, 0x09})


def test_printable_shows_escapes_and_leaves_the_rest():
    assert printable("a\tb\nç 世 😀") == "a\tb\nç 世 😀"
    assert printable("\x1b]52;c\x07\x9b\x7f\u202e\r") == r"\x1b]52;c\x07\x9b\x7f\u202e\r"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),  # no-color.org: when not empty
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": ""}, False),
        ({}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, environment, expected):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mine, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(mine):
        assert shows_colour(terminal) is expected
    assert not shows_colour(io.StringIO()) and not shows_colour(None)
