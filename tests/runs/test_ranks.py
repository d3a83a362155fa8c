"""Whose fault an error is, when several processes train together; the rest is in test_hangs.py."""

from __future__ import annotations

import pytest

from hldm.runs.ranks import is_rank_failure


@pytest.mark.parametrize(
    ("said", "is_lost"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms",
            True,
        ),
        ("Application timeout caused pair closure", True),
        ("[enforce fail] Connection closed by peer [127.0.0.1]:9231", True),
        ("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)", False),
    ],
)
def test_a_lost_rank_is_told_from_a_slip_of_ours(said, is_lost):
    assert is_rank_failure(RuntimeError(said)) == is_lost
