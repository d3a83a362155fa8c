"""What turns signals into chunks: the two rules against a loop that says what they mean, and what a trunk knows."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from conftest import segmenters_of
from torch import Tensor

from hldm.chunking.segmenter import (
    ChunkStream,
    Rule,
    Segmenter,
    SegmenterChunker,
    SegmenterState,
    SignalCutter,
)
from hldm.chunking.strategies import SEGMENTERS
from hldm.config import ChunkingConfig, ModelStrategy, to_dict

LIMITS = [(1, 1), (1, 12), (4, 12), (3, 40), (1, 65_536), (9, 65_536)]
RULES: tuple[Rule, ...] = ("level", "movement")


def small_segmenter(strategy: ModelStrategy, seed: int = 0, layers: int = 1, **settings) -> Segmenter:
    """An untrained segmenter of a width of 16, in float64."""
    torch.manual_seed(seed)
    settings = {"min_bytes": 1, "max_bytes": 12, "target_bytes": 5, **settings}
    chunking = ChunkingConfig(strategy=strategy, **settings)
    with segmenters_of(width=16, layers=layers):
        return SEGMENTERS[strategy].from_settings(chunking).double().eval()


def random_text(b: int, t: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes (b t), and doc_start (b t): a document a row."""
    text = torch.randint(256, (b, t), generator=torch.Generator().manual_seed(seed))
    return text, torch.arange(t).expand(b, t) == 0


class Told(Segmenter):
    """Gives the signals of a table, in the order of the bytes of a document."""

    def __init__(self, table: np.ndarray, threshold: float, rule: Rule) -> None:
        super().__init__(to_dict(ChunkingConfig()))
        self.table = torch.from_numpy(table)
        self.threshold = torch.tensor(threshold, dtype=torch.float64)
        self.rule = rule

    def initial_state(self, batch: int) -> SegmenterState:
        return SegmenterState((), torch.zeros(batch, 0), torch.zeros(batch, 1))

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        first = int(state.carry)
        end = first + text.shape[1]
        return self.table[None, first:end], state._replace(carry=torch.full((1, 1), end))


def starts_by_loop(
    text: bytes, signal: np.ndarray, threshold: float, rule: Rule, min_bytes: int, max_bytes: int
) -> list[bool]:
    """Where chunks start in valid UTF-8, byte by byte."""
    starts: list[int] = []
    for t in range(len(text)):
        if 0x80 <= text[t] < 0xC0:
            continue  # within a character
        if not starts:
            starts.append(t)
            continue
        character = text[t:].decode(errors="ignore")[:1].encode()
        held = t - starts[-1]
        if rule == "movement":
            wants = math.dist(signal[t], signal[starts[-1]]) > threshold
        else:
            wants = signal[t, 0] > threshold
        if held + len(character) > max_bytes or (wants and held >= min_bytes):
            starts.append(t)
    return [t in starts for t in range(len(text))]


def random_signal(t: int, seed: int, grid: bool) -> np.ndarray:
    """(t 3) steps and jumps; on a grid, signals meet the threshold exactly and come back to where they were."""
    rng = np.random.default_rng(seed)
    if grid:
        return rng.integers(-2, 3, (t, 3)).astype(np.float64)
    return rng.normal(size=(t, 3)) + 0.2 * rng.normal(size=(t, 3)).cumsum(axis=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [False, True])
def test_a_chunk_starts_where_its_rule_says(rule, grid, monkeypatch):
    longest = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        characters = [b"a", b"b ", b"\n", "é世😀".encode()] if seed % 2 else [b"a", b"b"]
        text = b"".join(characters[i] for i in rng.integers(len(characters), size=100))
        signal = random_signal(len(text), seed, grid)
        min_bytes, max_bytes = LIMITS[rng.integers(seed % 2, len(LIMITS))]
        # on the grid 3 is the length of (2, 2, 1), and 2 the largest signal
        threshold = float(rng.choice([-1, 0, 1, 2, 3, 6] if grid else [0.7, 2, 4, 5]))
        expected = starts_by_loop(text, signal, threshold, rule, min_bytes, max_bytes)
        chunker = SegmenterChunker(Told(signal, threshold, rule), min_bytes, max_bytes)
        assert SignalCutter(chunker, threshold).cut(text, signal).tolist() == expected
        monkeypatch.setattr(
            "hldm.chunking.segmenter.BLOCK_BYTES", 7 + seed % 20
        )  # the open chunk began blocks ago
        assert chunker.chunk_start(text).tolist() == expected
        longest = max(longest, 0, *np.diff(np.flatnonzero(expected)))
    assert longest > 48  # 16, then 32: beyond where a border by movement is sought first, and second


def test_movement_is_measured_from_the_start_of_the_open_chunk():
    signal = np.array([0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 0, 9, 0], np.float64)[:, None]
    chunker = SegmenterChunker(Told(signal, 1.5, "movement"), 1, 65_536)
    assert np.flatnonzero(chunker.chunk_start(b"a" * 13)).tolist() == [0, 2, 4, 6, 8, 11, 12]
    # in Euclidean distance: of (3, 4), 5 and not 7
    signal = np.array([[0, 0], [3, 4]], np.float64)
    for threshold, count in ((4.9, 2), (5.0, 1), (6.0, 1)):
        assert SignalCutter(chunker, threshold).cut(b"aa", signal).sum() == count


def test_a_level_has_a_sign():
    signal = np.array([0, -3, 1, 2, -9, 2.5], np.float64)[:, None]
    chunker = SegmenterChunker(Told(signal, 1.5, "level"), 1, 65_536)
    assert np.flatnonzero(chunker.chunk_start(b"a" * 6)).tolist() == [0, 3, 5]


@pytest.mark.parametrize("threshold", [-1.0, 1.5, 1e9])  # a border at every byte, now and then, never
def test_movement_takes_time_that_grows_with_the_text_only(threshold):
    text = b"a" * 30_000
    signal = random_signal(len(text), seed=0, grid=True)
    chunker = SegmenterChunker(Told(signal, threshold, "movement"), 1, 65_536)
    began = time.process_time()
    found = SignalCutter(chunker, threshold).cut(text, signal)
    assert time.process_time() - began < 2  # measured: 0.2 s; more, were each look as far as a chunk may go
    assert found.sum() == {-1.0: len(text), 1e9: 1}.get(threshold, found.sum())


@pytest.mark.parametrize("strategy", sorted(SEGMENTERS))
def test_a_document_knows_nothing_of_the_one_before_from_its_second_byte_on(strategy):
    segmenter = small_segmenter(strategy)
    for parameter in segmenter.parameters():
        if not parameter.any():  # a policy starts the same everywhere
            torch.nn.init.normal_(parameter)
    documents = list(np.random.default_rng(0).integers(97, 123, (100, 6)).astype(np.uint8))
    segmenter.calibrate([np.concatenate(documents)])
    chunker = segmenter.chunker(1, 12)
    alone = np.concatenate([chunker.chunk_start(document) for document in documents])
    found = ChunkStream(chunker).push([(document.tobytes(), True) for document in documents])
    assert 110 < found.sum() < 500
    assert np.flatnonzero(found != alone).tolist() == []


def test_a_chunker_keeps_the_weights_it_was_made_of():
    segmenter = small_segmenter("entropy")
    text = random_text(1, 200)[0][0].numpy().astype(np.uint8) % 26 + 97
    segmenter.calibrate([text])
    chunker = segmenter.chunker(1, 12)
    found = chunker.chunk_start(text).tolist()
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.normal_()
        segmenter.threshold += 1
    assert chunker.chunk_start(text).tolist() == found
    assert segmenter.chunker(1, 12).chunk_start(text).tolist() != found


def test_a_byte_is_foreseen_from_those_before_it_in_its_document():
    segmenter = small_segmenter("entropy")
    text, doc_start = random_text(2, 30)
    doc_start[1, 17] = True
    state = segmenter.initial_state(2)
    first, state = segmenter.read(text[:, :11], doc_start[:, :11], state)
    rest, _ = segmenter.read(text[:, 11:], doc_start[:, 11:], state)
    after, before = (torch.cat(pair, dim=1) for pair in zip(first, rest, strict=True))
    assert not before[:, 0].any() and not before[1, 17].any()
    torch.testing.assert_close(before[:, 1:16], after[:, :15])
    torch.testing.assert_close(before[:, 18:], after[:, 17:-1])
    p = segmenter.outputs(before).softmax(dim=-1)
    nats = [-p[row, t, text[row, t]].log() for row in range(2) for t in range(11)]
    found = segmenter.next_byte_nats(first, text[:, :11])
    torch.testing.assert_close(found.flatten(), torch.stack(nats))
    loss, _ = segmenter.loss(
        text[:, :11], doc_start[:, :11], segmenter.initial_state(2), 0.5, torch.Generator()
    )
    torch.testing.assert_close(loss, found.mean())
