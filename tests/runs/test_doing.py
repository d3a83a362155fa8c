"""What takes long says so on standard error, what is quick says nothing, and both end when the work does."""

from __future__ import annotations

import threading
import time

import pytest

from hldm.runs.doing import doing


def test_what_takes_long_is_said_again_and_again_and_what_is_quick_is_not(capsys):
    with doing("waiting", first=0.01, every=0.02):
        time.sleep(0.5)
    out, error = capsys.readouterr()
    lines = error.splitlines()
    assert not out and len(lines) >= 2 and set(lines) == {"hldm: waiting, 0:00 so far"}
    with doing("a moment"):
        pass
    assert capsys.readouterr().err == ""


def test_an_error_ends_it(capsys):
    before = threading.active_count()
    with pytest.raises(ValueError, match="no"), doing("failing"):
        raise ValueError("no")
    assert threading.active_count() == before
