"""What a reading of text wants to say without ending: one line on standard error, from the first process alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from hldm.text.bytes import printable


class TextNote(UserWarning):
    """The text can be used, but something about it should be known."""


warnings.simplefilter("always", TextNote)  # a line, and no error, whatever PYTHONWARNINGS says of warnings


_said: set[str] | None = None  # within `each_once`


@contextmanager
def each_once() -> Iterator[None]:
    """Within, no note is given twice: a command may read its text for every stage."""
    global _said
    before, _said = _said, set()
    try:
        yield
    finally:
        _said = before


def is_new(message: str) -> bool:
    """Whether a message has not been given within `each_once`; outside, always."""
    if _said is None:
        return True
    found = message not in _said
    _said.add(message)
    return found


def note(message: str) -> None:
    """Warn in one line. Other ranks read the same text and say nothing."""
    is_first = (
        os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    )  # a RANK that a shell exports
    if is_first and is_new(message):
        # no file name, which would bring a line of source code along; an own registry, so that nothing is held back
        warnings.warn_explicit(one_line(message), TextNote, "hldm", 1, registry={})


def one_line(message: str) -> str:
    """The same without line ends or anything else that could steer a terminal."""
    return printable(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """What an error says, as one short line."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0][:300])


def some(names: Iterable[str]) -> str:
    """The first few names, shortened, as one line."""
    shown = [one_line(name)[:40] for name in islice(names, 10)]
    return ", ".join(shown) or "none"
