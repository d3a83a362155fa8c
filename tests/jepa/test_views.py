"""Views keep what they promise: their share, their places, the rest of the text."""

from __future__ import annotations

import pytest
import torch
from jepa_small import small, windows_of

from hldm.jepa.config import ViewsConfig
from hldm.jepa.encoder import NULL
from hldm.jepa.views import View, hidden_spans, make_view, reset_before, with_holes
from hldm.text.windows import Batch

CONFIG = small("data.window_bytes=512")
LETTERS = torch.bincount(torch.tensor(list(b"aaab")), minlength=256)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return windows_of(CONFIG).batch(0)


def view_of(batch: Batch, seed: int = 0, **settings) -> View:
    return make_view(batch, ViewsConfig(**settings), torch.Generator().manual_seed(seed), LETTERS)


def chunks_of(window) -> list[list[bytes]]:
    """The bytes of every chunk, NULLs as *."""
    rows = []
    for row in range(len(window.bytes)):
        found = []
        for chunk in range(int(window.count[row])):
            first, last = int(window.first_byte[row, chunk]), int(window.last_byte[row, chunk])
            symbols = window.bytes[row, first : last + 1].tolist()
            found.append(bytes(ord("*") if symbol == NULL else symbol for symbol in symbols))
        rows.append(found)
    return rows


@pytest.mark.parametrize("share", [0.15, 0.4, 0.6])
@pytest.mark.parametrize("kind", ["null-spans", "null-chunks"])
@pytest.mark.parametrize("hole_bytes", [0, 6])
def test_holes_hide_their_share_and_leave_the_rest_as_it_was(batch, kind, share, hole_bytes):
    view = view_of(batch, kind=kind, share=share, hole_bytes=hole_bytes)
    rate = view.hidden.sum(dim=1) / batch.count
    assert (rate >= min(share, 0.5)).all() and (rate <= 0.7).all()
    assert torch.equal(view.window.count, batch.count) and torch.equal(view.wanted, view.hidden)
    for row, (before, after) in enumerate(zip(chunks_of(batch), chunks_of(view.window), strict=True)):
        for chunk, (old, new) in enumerate(zip(before, after, strict=True)):
            hidden = bool(view.hidden[row, chunk])
            assert new == (b"*" * (hole_bytes or len(old)) if hidden else old)


def test_spans_are_contiguous_and_of_the_mean_length(batch):
    lengths = []
    for seed in range(40):
        settings = ViewsConfig(share=0.15, span=4.0)
        hidden = hidden_spans(batch, settings, torch.Generator().manual_seed(seed))
        for row in hidden.int():
            edges = torch.nn.functional.pad(row, (1, 1)).diff()
            lengths += ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()
    assert 3 < sum(lengths) / len(lengths) < 5 and max(lengths) > 6


def test_holes_keep_documents_apart(batch):
    view = view_of(batch, share=0.6)
    assert torch.equal(view.window.opens_document, batch.opens_document)
    assert torch.equal(view.window.doc_end.sum(dim=1), batch.doc_end.sum(dim=1))


def test_all_holes_have_one_length_only_when_asked(batch):
    hidden = view_of(batch).hidden
    kept, same = with_holes(batch, hidden, 0), with_holes(batch, hidden, 6)
    sizes = [(w.last_byte - w.first_byte + 1)[hidden] for w in (kept, same)]
    assert sizes[0].unique().numel() > 1 and sizes[1].unique().tolist() == [6]


def test_a_reset_is_at_the_first_chunk_of_each_span(batch):
    hidden = torch.zeros_like(batch.is_chunk)
    hidden[:, 2:5] = hidden[:, 8] = True
    fresh = reset_before(batch, hidden).doc_start & ~batch.doc_start
    first = batch.first_byte[:, [2, 8]]
    assert fresh.sum() == 2 * len(first) and fresh.gather(1, first).all()


def test_bytes_are_hidden_one_by_one(batch):
    view = view_of(batch, kind="null-bytes", share=0.4)
    is_null = (view.window.bytes == NULL) & batch.is_real
    assert 0.35 < is_null.sum() / batch.is_real.sum() < 0.45 and not view.hidden.any()
    same = (view.window.bytes == batch.bytes) | is_null | ~batch.is_real
    assert same.all()


def test_letters_are_replaced_by_letters_of_their_frequency(batch):
    view = view_of(batch, kind="random-chars", share=0.15)
    differs = (view.window.bytes != batch.bytes) & batch.is_real
    new = view.window.bytes[differs]
    assert set(new.tolist()) == {ord("a"), ord("b")} and 0.6 < (new == ord("a")).float().mean() < 0.9
    assert 0.08 < differs.sum() / batch.is_real.sum() < 0.15
    assert all(chr(byte).isalpha() for byte in batch.bytes[differs].tolist())


def test_words_change_case_and_nothing_else(batch):
    view = view_of(batch, kind="case")
    for before, after in zip(chunks_of(batch), chunks_of(view.window), strict=True):
        assert b"".join(before).lower() == b"".join(after).lower()
    words = [bytes(row.tolist()).split() for row in view.window.bytes]
    cased = [word for row in words for word in row if word.isalpha() and len(word) > 2]
    share = sum(word.isupper() for word in cased) / len(cased)
    assert 0.08 < share < 0.26  # a third of every other word


def test_identity_wants_every_chunk_and_hides_none(batch):
    view = view_of(batch, kind="none")
    assert view.window is batch and torch.equal(view.wanted, batch.is_chunk) and not view.hidden.any()


@pytest.mark.parametrize("kind", ["null-spans", "null-chunks", "null-bytes", "random-chars", "case"])
def test_a_view_is_the_same_for_any_split_of_the_batch(kind):
    windows = windows_of(CONFIG)
    whole = chunks_of(view_of(windows.batch(0), kind=kind).window)
    parts = [chunks_of(view_of(windows.batch(0, first, 2), kind=kind).window) for first in (0, 2)]
    assert whole == parts[0] + parts[1] and whole != chunks_of(view_of(windows.batch(0), 1, kind=kind).window)
