"""Strategies that ask a model keep to what every strategy keeps to, and find the words of a language without spaces."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import segmenters_of
from hypothesis import given, settings
from languages import boundary_f1, unsegmented

from hldm.chunking.chunker import TEXT_STRATEGIES
from hldm.chunking.reinforce import PolicySegmenter, sentence_starts
from hldm.chunking.scorer import ChunkWriter
from hldm.chunking.segmenter import ChunkStream, Segmenter
from hldm.chunking.strategies import SEGMENTERS, cached_starts, read_segmenter
from hldm.config import ChunkingConfig, ConfigError, ModelStrategy, TextStrategy, changed
from hldm.text.bytes import to_ids
from hldm.text.corpus import make_corpus
from hldm.training.segmenters import train_segmenter
from tests.chunking.test_chunker import any_bytes, limits, valid_text

every_strategy = pytest.mark.parametrize("strategy", list(SEGMENTERS))
TEXT = ("It was. Was it? 世界和平 😀😀\n\ndef f(x):\n    return x\n" * 6).encode()

ABC = make_corpus("abc", [b"abcde abc " * 200])


@lru_cache
def untrained(strategy: str) -> Segmenter:
    """Random weights, and a threshold in the middle of what they give."""
    torch.manual_seed(0)
    chunking = ChunkingConfig(strategy=strategy, min_bytes=1, max_bytes=12, target_bytes=5)
    with segmenters_of(width=16, layers=1):
        segmenter = SEGMENTERS[strategy].from_settings(chunking).eval()
    for parameter in segmenter.parameters():
        if not parameter.any():  # a policy starts the same everywhere, which is no test of a cutter
            torch.nn.init.normal_(parameter)
    segmenter.calibrate([np.frombuffer(TEXT, np.uint8)])
    return segmenter


def test_every_name_in_the_settings_is_a_strategy():
    assert set(TEXT_STRATEGIES) == set(get_args(TextStrategy))
    assert set(SEGMENTERS) == set(get_args(ModelStrategy))


@every_strategy
@settings(max_examples=25, deadline=None)
@given(text=any_bytes, limit=limits)
def test_chunks_join_to_the_text_within_their_limits(strategy, text, limit):
    is_start = untrained(strategy).chunker(*limit).chunk_start(text)
    assert is_start.shape == (len(text),) and is_start.dtype == bool
    parts = [part.tobytes() for part in np.split(np.frombuffer(text, np.uint8), np.flatnonzero(is_start)[1:])]
    assert b"".join(parts) == text and is_start[:1].all()
    if text:
        assert all(1 <= len(part) <= limit[1] for part in parts)
        assert all(len(part) >= min(limit[0], limit[1] - 3) for part in parts[:-1])


@every_strategy
@settings(max_examples=10, deadline=None)
@given(text=valid_text, limit=limits)
def test_no_character_is_split(strategy, text, limit):
    if limit[1] >= 4:
        is_start = untrained(strategy).chunker(*limit).chunk_start(text)
        for part in np.split(np.frombuffer(text, np.uint8), np.flatnonzero(is_start)[1:]):
            part.tobytes().decode()


@every_strategy
@settings(max_examples=8, deadline=None)
@given(text=any_bytes, more=any_bytes, limit=limits)
def test_a_byte_at_a_time_gives_the_chunks_of_the_whole_and_later_bytes_none_other(
    strategy, text, more, limit
):
    chunker = untrained(strategy).chunker(*limit)
    whole = chunker.chunk_start(text).tolist()
    stream = ChunkStream(chunker)
    assert [bool(stream.push([(text[t : t + 1], t == 0)])[0]) for t in range(len(text))] == whole
    assert chunker.chunk_start(text + more)[: len(text)].tolist() == whole


@every_strategy
def test_documents_in_a_row_are_chunked_as_one_by_one(strategy, monkeypatch):
    monkeypatch.setattr(
        "hldm.chunking.segmenter.BLOCK_BYTES", 50
    )  # a block may hold the end of one and the next
    chunker = untrained(strategy).chunker(2, 9)
    documents = [
        np.frombuffer(text, np.uint8) for text in (TEXT[:120], b"a", TEXT[40:61], b"", TEXT, b"b" * 60)
    ]
    one_by_one = np.concatenate([chunker.chunk_start(document) for document in documents])
    assert chunker.chunk_starts(documents).tolist() == one_by_one.tolist()


@every_strategy
def test_time_grows_with_the_text_only(strategy):
    chunker = untrained(strategy).chunker(2, 64)
    for unit in (b"a", b"\x80", b"word ", "👩\u200d👧世界".encode(), np.random.default_rng(0).bytes(1000)):
        began = time.process_time()
        chunker.chunk_start(unit * (20_000 // len(unit)))
        assert time.process_time() - began < 5  # measured: below 0.5 s; a quadratic one takes half a minute


@every_strategy
def test_the_threshold_gives_the_wanted_mean_length(strategy):
    segmenter = untrained(strategy)
    document = np.frombuffer(TEXT, np.uint8)
    found = segmenter.chunker(1, 12).chunk_start(document)
    assert len(document) / found.sum() == pytest.approx(
        5, rel=0.15
    )  # the text repeats itself: steps are coarse


@every_strategy
def test_a_saved_segmenter_cuts_as_before_and_for_its_settings_only(strategy, tmp_path):
    segmenter = untrained(strategy)
    segmenter.save_pretrained(str(tmp_path))
    with segmenters_of(width=16, layers=1):
        again = read_segmenter(tmp_path, segmenter.chunking)
        with pytest.raises(ConfigError, match="other settings of chunking"):
            read_segmenter(tmp_path, changed(segmenter.chunking, target_bytes=7))
    assert again is not None
    expected = segmenter.chunker(1, 12).chunk_start(TEXT)
    assert again.chunker(1, 12).chunk_start(TEXT).tolist() == expected.tolist()


@every_strategy
def test_what_is_trained_has_gradients(strategy):
    torch.manual_seed(0)
    segmenter = SEGMENTERS[strategy].from_settings(untrained(strategy).chunking)
    text = torch.randint(256, (3, 40))
    doc_start = torch.zeros(3, 40, dtype=torch.bool)
    doc_start[:, 0] = doc_start[1, 20] = True
    generator = torch.Generator().manual_seed(0)
    loss, _ = segmenter.loss(text, doc_start, segmenter.initial_state(3), 0.9, generator)
    loss.backward()
    without = {
        name for name, p in segmenter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    # the policy's last layer starts at 0, so nothing below it moves in the first step
    assert without <= {"policy.0.weight", "policy.0.bias"}


def test_sentences_start_at_the_white_space_after_one_in_each_row_for_itself():
    rows = [b"It was. Was it? No", b"Mr. Smith: 3.5! No", "世界。和平 ok. Yes.\n".encode()[:18]]
    found = sentence_starts(torch.stack([torch.from_numpy(to_ids(row)) for row in rows]))
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[7, 15], [15], [9]]


def test_the_policy_waits_while_its_decoder_learns_from_sentences_and_random_chunks(monkeypatch):
    torch.manual_seed(0)
    segmenter = SEGMENTERS["reinforce"].from_settings(untrained("reinforce").chunking)
    assert isinstance(segmenter, PolicySegmenter)
    cuts, write = [], segmenter.writer.forward
    monkeypatch.setattr(
        segmenter.writer, "forward", lambda text, start: cuts.append(start.bool()) or write(text, start)
    )
    text = torch.from_numpy(to_ids(TEXT[:60])).expand(32, -1)
    doc_start = torch.zeros_like(text, dtype=torch.bool)
    sentences = sentence_starts(text)
    sentences[:, 0] = True
    generator = torch.Generator().manual_seed(0)
    for progress, moves in ((0.2, False), (0.3, True)):
        segmenter.zero_grad()
        segmenter.loss(text, doc_start, segmenter.initial_state(32), progress, generator)[0].backward()
        assert (segmenter.policy[2].weight.grad is not None) == moves
    lanes = [(cut == sentences).all(dim=1).sum().item() for cut in cuts]
    assert 8 <= lanes[0] <= 24 and lanes[1] == 0


def test_the_entropy_of_a_byte_is_in_bits():
    chunking = untrained("entropy").chunking
    segmenter = SEGMENTERS["entropy"].from_settings(chunking)
    torch.nn.init.zeros_(segmenter.outputs.weight)
    text, doc_start = torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.bool)
    with torch.no_grad():
        for bias, bits in ((0.0, 8.0), (100.0, 7.0)):  # all bytes alike; half of them impossible
            segmenter.outputs.bias[:128] = bias
            entropy, _ = segmenter.signal(text, doc_start, segmenter.initial_state(1))
            torch.testing.assert_close(entropy, torch.full_like(entropy, bits))


def test_a_decoder_of_chunks_knows_nothing_from_before_a_start():
    torch.manual_seed(0)
    writer = ChunkWriter(16).double()
    text = torch.randint(256, (1, 12))
    start = torch.zeros(1, 12, dtype=torch.float64)
    start[0, 5] = 1
    other = text.clone()
    other[0, :5] = 7
    torch.testing.assert_close(writer(text, start)[0, 5:], writer(other, start)[0, 5:])
    assert (writer(text, 0 * start)[0, 6:] != writer(other, 0 * start)[0, 6:]).all()


def test_boundaries_of_a_corpus_are_read_from_disk_unless_damaged(tmp_path, monkeypatch):
    segmenter, corpus = untrained("gate"), make_corpus("x", [TEXT, TEXT[:50]])
    made = cached_starts(tmp_path, segmenter, corpus)
    assert (
        made.tolist()
        == segmenter.chunker(1, 12).chunk_starts([corpus.document(0), corpus.document(1)]).tolist()
    )
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 8]))
    assert cached_starts(tmp_path, segmenter, corpus).tolist() == made.tolist()
    assert path.read_bytes() == whole
    monkeypatch.setattr(type(segmenter), "chunker", None)  # it is not asked again
    assert cached_starts(tmp_path, segmenter, corpus).tolist() == made.tolist()


def test_training_a_segmenter_repeats_itself():
    language = unsegmented(size=3000)
    chunking = untrained("entropy").chunking
    with segmenters_of(width=16, layers=1, lanes=2, steps=3, minutes=math.inf):
        one, two = (train_segmenter(chunking, language.corpus, seed=1).state_dict() for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


# The steps are what each takes on this language: seconds for a next byte alone, some tens where cuts are learned.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "steps", "least"),
    [
        ("entropy", 300, 0.9),
        ("state_change", 400, 0.6),
        ("gate", 400, 0.3),  # four bytes do not tell; chance is 0.2
        ("reinforce", 500, 0.9),
        ("learned", 500, 0.9),
    ],
)
def test_the_words_of_a_language_without_spaces_are_found(strategy, steps, least):
    language = unsegmented()
    chunking = ChunkingConfig(
        strategy=strategy,
        min_bytes=1,
        max_bytes=16,
        target_bytes=language.mean_bytes,
    )
    held_out = 36_000
    training = make_corpus("training", [language.corpus.text[:held_out].tobytes()])
    with segmenters_of(window_bytes=128, steps=steps, minutes=math.inf, sample_bytes=8000):
        segmenter = train_segmenter(chunking, training)
    found = segmenter.chunker(1, 16).chunk_start(language.corpus.text[held_out:])
    assert boundary_f1(found, language.is_word_start[held_out:]) > least
