from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hldm.chunking.chunker import _SENTENCE_END, TEXT_STRATEGIES, Cutter, make_chunker
from hldm.config import ChunkingConfig, ConfigError

STRATEGIES = sorted(TEXT_STRATEGIES)

PIECES = ["a", "word", " ", "  ", "\n", "\n\n", "\r\n", ". ", "! ", '." ', "Mr. ", "...", "… ", "\t"]
PIECES += ["é", "😀", "。", "」", "। ", "؟ ", "።", "世界", "！", "x" * 30, "\u0301", "👩\u200d👧"]
valid_text = st.lists(st.sampled_from(PIECES), max_size=40).map(lambda pieces: "".join(pieces).encode())
any_bytes = valid_text | st.binary(max_size=80) | st.binary(min_size=1, max_size=2).map(lambda b: b * 60)
limits = st.tuples(st.integers(1, 12), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def chunker(strategy: str, min_bytes: int = 4, max_bytes: int = 12):
    return make_chunker(ChunkingConfig(strategy=strategy, min_bytes=min_bytes, max_bytes=max_bytes))


def chunks(strategy: str, text: str | bytes, min_bytes: int = 1, max_bytes: int = 1000) -> list:
    """The chunks of a text, of the text's own type."""
    data = text.encode() if isinstance(text, str) else text
    is_start = chunker(strategy, min_bytes, max_bytes).chunk_start(data)
    assert is_start.shape == (len(data),) and is_start.dtype == bool
    parts = np.split(np.frombuffer(data, np.uint8), np.flatnonzero(is_start)[1:])
    return [part.tobytes().decode() if isinstance(text, str) else part.tobytes() for part in parts]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(text=any_bytes, limit=limits)
def test_chunks_join_to_the_text_within_their_limits(strategy, text, limit):
    min_bytes, max_bytes = limit
    parts = chunks(strategy, text, min_bytes, max_bytes)
    assert b"".join(parts) == text
    if text:
        assert all(1 <= len(part) <= max_bytes for part in parts)
        # a character that does not fit ends a chunk up to 3 bytes early
        assert all(len(part) >= min(min_bytes, max_bytes - 3) for part in parts[:-1])
        if text.isascii():
            assert all(len(part) >= min_bytes for part in parts[:-1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(text=any_bytes, limit=limits)
def test_where_a_chunk_starts_depends_on_no_later_byte(strategy, text, limit):
    whole = chunker(strategy, *limit).chunk_start(text)
    streamed = [chunker(strategy, *limit).chunk_start(text[: t + 1])[t] for t in range(len(text))]
    assert whole.tolist() == streamed


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(text=valid_text, limit=limits)
def test_no_character_is_split(strategy, text, limit):
    min_bytes, max_bytes = limit
    if max_bytes >= 4:
        for part in chunks(strategy, text, min_bytes, max_bytes):
            part.decode()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_array_of_bytes_is_chunked_as_the_bytes(strategy):
    text = "One. Two! 世界。\n\nThree".encode() * 5
    array = np.frombuffer(text, np.uint8)
    assert (chunker(strategy).chunk_start(array) == chunker(strategy).chunk_start(text)).all()


def test_a_word_carries_the_space_before_it():
    assert chunks("words", "In the  beginning, was") == ["In", " the", "  beginning,", " was"]
    assert chunks("words", "In the beginning", min_bytes=4, max_bytes=8) == ["In the", " beginni", "ng"]
    assert chunks("words", "a" * 20, min_bytes=4, max_bytes=8) == ["a" * 8, "a" * 8, "a" * 4]
    assert chunks("words", " " * 9, min_bytes=1, max_bytes=4) == [" " * 4, " " * 4, " "]


def test_a_run_of_marks_opens_a_chunk_of_space():
    assert chunks("space", 'He said: "go on", (so)') == ["He", " said", ': "go', " on", '", (so', ")"]
    assert chunks("space", "世界 it") == ["世", "界", " it"]


@given(text=any_bytes, limit=limits, cuts=st.lists(st.integers(0, 80), max_size=5))
def test_the_limits_hold_across_stretches_of_text(text, limit, cuts):
    border = chunker("words", *limit).borders(text)
    cutter, found = Cutter(*limit), []
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for begin, end in zip(places, places[1:], strict=False):
        stretch = border[begin:end].tobytes()
        found += cutter.push(
            text[begin:end], lambda _, first, stop, stretch=stretch: stretch.find(1, first, stop)
        ).tolist()
    assert found == chunker("words", *limit).chunk_start(text).tolist()


def test_a_strategy_that_asks_a_model_says_so():
    with pytest.raises(ConfigError, match="entropy needs a segmenter"):
        chunker("entropy")


def test_a_character_that_does_not_fit_opens_the_next_chunk():
    assert chunks("fixed", "世界和平", max_bytes=8) == ["世界", "和平"]
    assert chunks("words", "ab😀cd", min_bytes=1, max_bytes=5) == ["ab", "😀c", "d"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It was. Was it? Yes!", ["It was.", " Was it?", " Yes!"]),
        ('He said "Go." (So she went.) Then', ['He said "Go."', " (So she went.)", " Then"]),
        ("“Go.” She went.\nThen", ["“Go.”", " She went.", "\nThen"]),
        ("Mr. J. Smith, i.e. Dr. Smith. He", ["Mr. J. Smith, i.e. Dr. Smith.", " He"]),
        ("Well... he left… slowly?! So", ["Well... he left… slowly?!", " So"]),
        ("It cost 3.50 in total. Ok", ["It cost 3.50 in total.", " Ok"]),
        ("天气很好。我们走吧！好", ["天气很好。", "我们走吧！", "好"]),
        ("no end at all", ["no end at all"]),
    ],
)
def test_a_sentence_ends_where_a_reader_ends_it(text, expected):
    assert chunks("sentence", text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One\ntwo\n\nthree\n\n\n four", ["One\ntwo\n\n", "three\n\n\n", " four"]),
        ("One\r\n\r\ntwo\n \t\nthree\n\n", ["One\r\n\r\n", "two\n \t\n", "three\n\n"]),
    ],
)
def test_a_paragraph_starts_after_a_blank_line(text, expected):
    assert chunks("paragraph", text) == expected


UNITS = [
    b"a",
    b" ",
    b".",
    b"\n",
    b"\x80",
    b"word ",
    b"Mr. ",
    b'."',
    b"\n \n",
    "。".encode(),
    "👩\u200d👧".encode(),
]
UNITS += [b"if x:\n    return f(x)\n", np.random.default_rng(0).bytes(1000)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("unit", UNITS, ids=[repr(unit[:8]) for unit in UNITS])
def test_time_grows_with_the_text_only(strategy, unit):
    text = unit * (300_000 // len(unit))
    start = time.process_time()
    chunker(strategy, 32, 256).chunk_start(text)
    assert time.process_time() - start < 3  # measured: below 0.3 s; a quadratic one takes minutes


def test_four_megabytes_of_words_take_two_seconds_at_most():
    words = np.random.default_rng(0).choice([b"a", b"word", b"longer", b"and then some"], 700_000)
    text = b" ".join(words.tolist())[:4_000_000]
    start = time.process_time()
    chunker("words").chunk_start(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text",
    [
        "यह पहला है। क्या यह दूसरा है? हाँ॥ अब तीसरा",  # Hindi
        "هل هذا سؤال؟ نعم. وهذا جواب! انتهى",  # Arabic
        "یہ پہلا جملہ ہے۔ یہ دوسرا ہے۔ تیسرا",  # Urdu
        "ይህ ነው። ሌላ ነው፧ አዎ። መጨረሻ",  # Amharic
        "Սա առաջինն է։ Սա երկրորդն է։ Վերջ",  # Armenian
        "នេះជាប្រយោគ។ នេះទៀត៕ ចប់",  # Khmer
        "ဒါကပထမ။ ဒါကဒုတိယ။ ပြီး",  # Burmese
        "בראשית׃ והארץ׃ סוף",  # Hebrew, verses
        "Τι είναι; τίποτα. τέλος".replace(";", "\u037e"),  # Greek, its own question mark
    ],
)
def test_sentences_of_other_scripts_end_at_their_marks(text):
    marks = "।॥؟?.!۔።፧։។៕။׃\u037e"
    expected = [part for part in re.split(f"(?<=[{marks}])(?= )", text) if part]
    assert [piece.decode() for piece in chunks("sentence", text.encode())] == expected
    # a closing quote belongs to the sentence; a mark inside a word ends none
    assert len(chunks("sentence", f"«{text[:3]}{expected[0][-1]}» more".encode())) == 2
    assert len(chunks("sentence", f"{text[:3]}{expected[0][-1]}{text[:3]}".encode())) == 1


@pytest.mark.parametrize("text", ["A. B! C? D… e", "一。二！三？四", "x; y: z ‽ w ⁉ v", "a․ b｡c．d"])
def test_marks_of_other_scripts_change_nothing_of_latin_and_cjk_text(text):
    data = text.encode()
    before = re.compile(
        rb"((?:[.!?]|\xe2\x80\xa6|\xe3\x80\x82|\xef\xbc[\x81\x9f])+)"
        rb"(?:[\"')\]}]|\xe2\x80[\x9d\x99]|\xc2\xbb|\xe3\x80[\x8d\x8f\x91]|\xef\xbc\x89)*"
    )
    assert [m.span() for m in before.finditer(data)] == [m.span() for m in _SENTENCE_END.finditer(data)]
