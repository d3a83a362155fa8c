"""A text ends before its first stop string however it is cut into chunks, and whoever listens hears the text."""

from __future__ import annotations

import asyncio
import queue
import threading

import pytest
import torch

from hldm.generation.streams import stop_at, stop_bytes, stream_to
from hldm.generation.writer import Continuation


def pieces(text: bytes, size: int) -> list[bytes]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def write(texts: list[list[bytes]], left: int = 1000):
    """What `write_on` yields for rows that write these pieces, one a round; a row closes its document after them."""
    rows = [Continuation(b"", left=left) for _ in texts]
    for turn in range(max(map(len, texts))):
        if not any(row.left and not row.ended for row in rows):
            return
        news = []
        for row, text in zip(rows, texts, strict=True):
            news.append(b"" if row.ended or turn >= len(text) else row.add(text[turn]))
            row.ended |= turn >= len(text) - 1 and row.left > 0
        yield rows, news, turn


def stopped(
    texts: list[list[bytes]], *stops: str, left: int = 1000
) -> tuple[list[Continuation], list[bytes]]:
    rows: list[Continuation] = []
    heard = [b""] * len(texts)
    for rows, news, _ in stop_at(write(texts, left), stop_bytes(stops)):
        heard = [before + new for before, new in zip(heard, news, strict=True)]
        for row, so_far in zip(rows, heard, strict=True):
            assert row.text.startswith(so_far)  # nothing is handed on that is taken back
    return rows, heard


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("And the king said", ["king"], "And the "),
        ("And the king said", ["said", "the"], "And "),
        ("And the king said", ["nowhere", "kingdom"], "And the king said"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("end\n\nmore", ["\n\n"], "end"),
        ("naïve 👑 crown", ["👑"], "naïve "),
        ("stop", ["stop"], ""),
        ("almost sto", ["stop"], "almost sto"),
    ],
)
def test_a_text_ends_before_the_first_stop_string(text, stops, expected, size):
    [row], [heard] = stopped([pieces(text.encode(), size)], *stops)
    assert heard == row.text == expected.encode()
    assert all(row.chunks) and (row.ended, row.left > 0) == (expected == text, expected == text)
    assert row.chunk_spans[-1:] == [] or row.chunk_spans[-1][1] == len(row.text)


def test_each_row_of_a_batch_stops_by_itself():
    texts = ["one two three", "two one", "three"]
    rows, heard = stopped([pieces(text.encode(), 2) for text in texts], "two")
    assert [row.text for row in rows] == heard == [b"one ", b"", b"three"]


def test_a_text_that_is_cut_short_is_heard_whole_though_a_stop_string_has_begun():
    [row], [heard] = stopped([pieces(b"one two", 2)], "two!", left=6)
    assert heard == row.text == b"one tw"


def test_nothing_that_could_be_anything_else_is_held_back():
    news = [new for _, [new], _ in stop_at(write([[b"ab", b"c", b"dx", b"y"]]), [b"cde", b"xyz"])]
    assert news == [b"ab", b"", b"cd", b"xy"]


@pytest.mark.parametrize("wrong", ["", ["a", ""], [b""]])
def test_an_empty_stop_string_is_refused(wrong):
    with pytest.raises(ValueError, match="stands everywhere"):
        stop_bytes(wrong)


# ---- streamers


CROWN = pieces("king 👑!".encode(), 3)


def test_a_function_hears_whole_characters_of_every_row():
    heard: list[tuple[int, str]] = []
    stream = stream_to(lambda row, text: heard.append((row, text)), [b"", b"And"])
    for piece in CROWN:
        stream.add(0, piece)
    stream.add(1, b"\xf0\x9f")
    stream.end()
    assert "".join(text for row, text in heard if not row) == "king 👑!"
    assert heard[-1] == (1, "\ufffd")


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_streamers_of_transformers_hear_text_without_a_tokenizer(skip_prompt, capsys):
    from transformers import TextIteratorStreamer, TextStreamer

    iterating = TextIteratorStreamer(None, skip_prompt=skip_prompt, timeout=5)
    for streamer in (iterating, TextStreamer(None, skip_prompt=skip_prompt)):
        stream = stream_to(streamer, [b"The "])
        for piece in CROWN:
            stream.add(0, piece)
        stream.end()
    expected = "king 👑!" if skip_prompt else "The king 👑!"
    assert "".join(iterating) == expected
    assert capsys.readouterr().out == expected + "\n"


def test_an_asynchronous_streamer_hears_it_from_another_thread():
    from transformers import AsyncTextIteratorStreamer

    async def listen() -> str:
        streamer = AsyncTextIteratorStreamer(None, skip_prompt=True, timeout=5)

        def write() -> None:
            stream = stream_to(streamer, [b""])
            for piece in CROWN:
                stream.add(0, piece)
            stream.end()

        thread = threading.Thread(target=write)
        thread.start()
        heard = [text async for text in streamer]
        thread.join()
        return "".join(heard)

    assert asyncio.run(listen()) == "king 👑!"


def test_any_other_streamer_is_put_the_values_of_bytes():
    values: queue.Queue[torch.Tensor | None] = queue.Queue()

    class Streamer:
        def put(self, value):
            values.put(value)

        def end(self):
            values.put(None)

    stream = stream_to(Streamer(), ["é".encode()])
    stream.add(0, b"a")
    stream.add(0, b"")
    stream.end()
    assert [value.tolist() if value is not None else None for value in values.queue] == [
        [195, 169],
        [97],
        None,
    ]


def test_what_cannot_listen_is_refused():
    class Streamer:
        put = end = None

    with pytest.raises(ValueError, match="room for one text, got 2"):
        stream_to(Streamer(), [b"", b""])
    with pytest.raises(ValueError, match=r"must be a function of \(row, text\).* got str"):
        stream_to("loud", [b""])
