"""Written text on its way out: where it stops, and what receives it as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from hldm.generation.writer import Continuation
from hldm.text.bytes import stream_decoder, to_bytes

Writing = tuple[list[Continuation], list[bytes], int]  # what `hldm.generation.writer.write_on` yields


# ---- where it stops


def stop_bytes(stop: str | bytes | Sequence[str | bytes] | None) -> list[bytes]:
    """Stop strings as bytes. Raises ValueError for an empty one, which stands everywhere."""
    given = [] if stop is None else [stop] if isinstance(stop, str | bytes) else list(stop)
    found = [to_bytes(text) if isinstance(text, str) else text for text in given]
    if not all(found):
        raise ValueError("an empty stop string stands everywhere: give one of a character or more")
    return found


def stop_at(writing: Iterable[Writing], stops: Sequence[bytes]) -> Iterator[Writing]:
    """The same writing, each row's text ended before the first of these strings, wherever chunks are cut.

    Bytes that may yet become one of them are handed on once that is known. A row that stops has nothing left to write,
    and has not ended its document.
    """
    held: list[bytes] = []
    for rows, news, calls in writing:
        held = held or [b""] * len(rows)
        shown = []
        for index, (row, new) in enumerate(zip(rows, news, strict=True)):
            waiting = held[index] + new
            at = min((place for stop in stops if (place := waiting.find(stop)) >= 0), default=None)
            if at is not None:
                _drop_last(row, len(waiting) - at)
                row.left, row.ended, waiting = 0, False, waiting[:at]
            goes_on = row.left > 0 and not row.ended
            kept = max((_begun(waiting, stop) for stop in stops), default=0) if goes_on else 0
            held[index] = waiting[len(waiting) - kept :]
            shown.append(waiting[: len(waiting) - kept])
        yield rows, shown, calls


def _begun(text: bytes, stop: bytes) -> int:
    """How many bytes at the end of a text are the beginning of a stop string, and not the whole of it."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)


def _drop_last(row: Continuation, count: int) -> None:
    """Take the last bytes off a row's chunks."""
    while count > 0:
        last = row.chunks.pop()
        if len(last) > count:
            row.chunks.append(last[:-count])
        count -= len(last)


# ---- what receives it


class Stream(Protocol):
    """Receives each row's bytes as they are written."""

    def add(self, row: int, new: bytes) -> None: ...

    def end(self) -> None: ...


def stream_to(streamer: Any, prompts: Sequence[bytes]) -> Stream:
    """What hands on to a streamer: a function of (row, text), one of transformers' with `put` and `end`, or None.

    Raises ValueError for anything else, and for several rows where a streamer has room for one.
    """
    if streamer is None:
        return _ToNobody()
    if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        if not callable(streamer):
            raise ValueError(
                f"streamer must be a function of (row, text) or have put and end, got {type(streamer).__name__}"
            )
        return _ToFunction(streamer, len(prompts))
    if len(prompts) != 1:
        raise ValueError(
            f"{type(streamer).__name__} has room for one text, got {len(prompts)}: pass a function of (row, text)"
        )
    if hasattr(streamer, "on_finalized_text"):
        return _ToText(streamer, prompts[0])
    return _ToTokens(streamer, prompts[0])


class _ToNobody:
    """Nothing to anybody."""

    def add(self, row: int, new: bytes) -> None:
        pass

    def end(self) -> None:
        pass


class _ToFunction:
    """Whole UTF-8 characters to a function of (row, text)."""

    def __init__(self, hand_on: Callable[[int, str], object], rows: int):
        self.hand_on = hand_on
        self.decoders = [stream_decoder() for _ in range(rows)]

    def add(self, row: int, new: bytes, is_last: bool = False) -> None:
        if text := self.decoders[row].decode(new, is_last):
            self.hand_on(row, text)

    def end(self) -> None:
        for row in range(len(self.decoders)):
            self.add(row, b"", is_last=True)


class _ToText:
    """Text to transformers' TextStreamer and those made of it, past the tokenizer: there are no tokens here."""

    def __init__(self, streamer: Any, prompt: bytes):
        self.streamer = streamer
        self.decoder = stream_decoder()
        if not getattr(streamer, "skip_prompt", False):
            streamer.on_finalized_text(prompt.decode("utf-8", "replace"))

    def add(self, row: int, new: bytes) -> None:
        if text := self.decoder.decode(new):
            self.streamer.on_finalized_text(text)

    def end(self) -> None:
        self.streamer.on_finalized_text(self.decoder.decode(b"", True), stream_end=True)


class _ToTokens:
    """Byte values (t) int64 to any other streamer: the prompt's first, as transformers' generate does."""

    def __init__(self, streamer: Any, prompt: bytes):
        self.streamer = streamer
        streamer.put(_values(prompt))

    def add(self, row: int, new: bytes) -> None:
        if new:
            self.streamer.put(_values(new))

    def end(self) -> None:
        self.streamer.end()


def _values(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.int64)
