"""A small causal byte model that is asked where chunks begin, and what turns its answers into chunks.

A segmenter is trained first, on the training text alone, and frozen: chunks remain a function of text. Every byte
gets a signal, from the bytes up to it; a chunk would like to start where the signal exceeds `threshold` (`rule`
"level"), or has moved so far, in Euclidean distance, from where it was when the open chunk began ("movement"). The
threshold is set so that chunks of training text have a wanted mean length, by bisection on the real cutter, limits
included, and is saved with the weights. A strategy is a subclass, in a file of its own, with `signal` and, if next
bytes are not all there is to learn, `loss`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor, nn

from hldm.chunking.chunker import Chunker, Cutter
from hldm.config import ChunkingConfig, StackConfig, changed, section_from_dict, to_dict
from hldm.model.griffin import Griffin
from hldm.model.state import GriffinState
from hldm.runs.saved_model import SavedModel
from hldm.text.bytes import to_ids

BLOCK_BYTES = 4096  # of text read at once: bounds memory whatever its length
NEAR_BYTES = 16  # in which a border by movement is sought first
BISECTIONS = 24  # halvings of the threshold's range: a relative error of 6e-8, as float32

Rule = Literal["level", "movement"]
Stretch = tuple[bytes, bool]  # of a text, and whether a document starts with it

S = TypeVar("S", bound="Segmenter")


class Settings(NamedTuple):
    """Size and training of a segmenter: what docs/chunking.md compares all strategies with."""

    width: int = 64  # d, residual stream
    layers: int = 2  # recurrent blocks
    lanes: int = 16  # texts read side by side in training
    window_bytes: int = 256  # bytes of each lane in one optimizer step
    steps: int = 2000
    minutes: float = 1.0  # or after so many, if sooner; at most a fifth of stage one's, which pay for it
    learning_rate: float = 4e-3  # peak
    sample_bytes: int = 65_536  # training text on which the threshold is set


class SegmenterState(NamedTuple):
    """What is carried along a text."""

    griffin: GriffinState
    feature: Tensor  # (b d) after the last byte
    carry: Tensor  # (b k) whatever else the strategy's signal needs


class Features(NamedTuple):
    """What the trunk knows at each byte."""

    after: Tensor  # (b t d) having read it
    before: Tensor  # (b t d) having read those before it; zeros where a document starts


class Segmenter(SavedModel):
    """Bytes -> Griffin -> next byte, and the signal of a strategy."""

    settings = Settings()
    rule: Rule = "level"
    carried = 1  # k of SegmenterState.carry

    @register_to_config
    def __init__(self, chunking: dict):
        super().__init__()
        self.chunking = section_from_dict(ChunkingConfig, chunking)
        settings = self.settings
        blocks = ("recurrent",) * settings.layers
        self.embed = nn.Embedding(256, settings.width)
        self.trunk = Griffin(changed(StackConfig(), width=settings.width, blocks=blocks), window=1)
        self.outputs = nn.Linear(settings.width, 256)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.outputs.weight, std=0.5 * settings.width**-0.5)
        nn.init.zeros_(self.outputs.bias)
        self.register_buffer("threshold", torch.zeros(()))
        self.build()

    @classmethod
    def from_settings(cls: type[S], chunking: ChunkingConfig) -> S:
        """Build from the config's section."""
        return cls(to_dict(chunking))

    def build(self) -> None:
        """Add what the strategy has beside the trunk."""

    def initial_state(self, batch: int) -> SegmenterState:
        """The state before any text."""
        scale = self.trunk.norm.scale
        feature = scale.new_zeros(batch, len(scale))
        return SegmenterState(
            self.trunk.initial_state(batch), feature, feature.new_zeros(batch, self.carried)
        )

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        """(b t k) whose level, or movement, makes a border of a byte; a function of the bytes up to it."""
        features, state = self.read(text, doc_start, state)
        return self.level(features.before), state

    def level(self, before: Tensor) -> Tensor:
        """(b t 1) the signal of a byte by the features before it (b t d), where that is all it takes."""
        raise NotImplementedError

    def read(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Features, SegmenterState]:
        """Features of text (b t), documents of which start where doc_start (b t) says."""
        after, griffin = self.trunk(self.embed(text), state.griffin, doc_start, doc_start)
        before = torch.cat([state.feature[:, None], after[:, :-1]], dim=1)
        before = before.masked_fill(doc_start[..., None], 0.0)
        return Features(after, before), state._replace(griffin=griffin, feature=after[:, -1])

    def loss(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState, progress: float, generator: Generator
    ) -> tuple[Tensor, SegmenterState]:
        """What training minimises on a window (b t) of every stream: here, nats of a next byte.

        progress: share of the training that is done;  generator: of whatever the strategy draws
        """
        features, state = self.read(text, doc_start, state)
        return self.next_byte_nats(features, text).mean(), state

    def next_byte_nats(self, features: Features, text: Tensor) -> Tensor:
        """-ln p(byte | bytes before it). (b t)."""
        return F.cross_entropy(self.outputs(features.before).mT, text, reduction="none")

    def chunker(self, min_bytes: int, max_bytes: int) -> SegmenterChunker:
        """The strategy within limits, as the weights are now."""
        return SegmenterChunker(self, min_bytes, max_bytes)

    @torch.no_grad()
    def calibrate(self, documents: Sequence[np.ndarray]) -> float:
        """Set the threshold so that chunks of these documents have the wanted mean length; returns theirs."""
        chunker = self.chunker(self.chunking.min_bytes, self.chunking.max_bytes)
        signals = [chunker.signals(document) for document in documents]
        total = sum(map(len, documents))

        def mean_bytes(threshold: float) -> float:
            cut = (
                SignalCutter(chunker, threshold).cut(document.tobytes(), signal)
                for document, signal in zip(documents, signals, strict=True)
            )
            return total / sum(int(is_start.sum()) for is_start in cut)

        joined = np.concatenate(signals)
        if self.rule == "movement":
            low, high = -1.0, float(np.ptp(joined, axis=0).sum())
        else:
            low, high = float(joined.min()) - 1, float(joined.max()) + 1
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if mean_bytes(middle) > self.chunking.target_bytes else (middle, high)
        self.threshold.fill_(low)
        return mean_bytes(float(self.threshold))


class SegmenterChunker(Chunker):
    """Chunks by a segmenter's signal, whole documents or a stretch at a time.

    Signals are computed in float64: rounding would else decide, now and then, that a page has other chunks
    than the same page read a byte at a time.
    """

    def __init__(self, segmenter: Segmenter, min_bytes: int, max_bytes: int) -> None:
        super().__init__(min_bytes, max_bytes)
        self.segmenter = copy.deepcopy(segmenter).double().eval()
        self.threshold = float(segmenter.threshold)

    def chunk_start(self, text: bytes | np.ndarray) -> np.ndarray:
        """(t,) bool: the first byte of every chunk of one document."""
        return self.chunk_starts([np.frombuffer(bytes(text), np.uint8)])

    def chunk_starts(
        self, documents: Sequence[np.ndarray], at_block: Callable[[], object] = lambda: None
    ) -> np.ndarray:
        """The same of many documents in a row, read in blocks that may hold the end of one and the next.

        at_block: called before each
        """
        stream, found = ChunkStream(self), [np.zeros(0, bool)]
        for block in _blocks(documents):
            at_block()
            found.append(stream.push(block))
        return np.concatenate(found)

    def signals(self, document: np.ndarray) -> np.ndarray:
        """(t k) of a whole document."""
        stream = ChunkStream(self)
        return np.concatenate([stream.read(block) for block in _blocks([document])])


def _blocks(documents: Sequence[np.ndarray]) -> Iterator[list[Stretch]]:
    """Documents in a row, in blocks of BLOCK_BYTES or a little more, that may hold the end of one and the next."""
    block: list[Stretch] = []
    for document in documents:
        for begin in range(0, len(document), BLOCK_BYTES):
            block.append((document[begin : begin + BLOCK_BYTES].tobytes(), begin == 0))
            if sum(len(stretch) for stretch, _ in block) >= BLOCK_BYTES:
                yield block
                block = []
    if block:
        yield block


class ChunkStream:
    """Where chunks start in a text that comes in stretches; what is carried between them has a fixed size."""

    def __init__(self, chunker: SegmenterChunker) -> None:
        self.chunker = chunker
        self.state = chunker.segmenter.initial_state(1)
        self.cutter = SignalCutter(chunker, chunker.threshold)

    @torch.no_grad()
    def read(self, stretches: Sequence[Stretch]) -> np.ndarray:
        """Signals (t k) of stretches in a row, none of them empty."""
        text = torch.from_numpy(to_ids(b"".join(stretch for stretch, _ in stretches)))[None]
        doc_start = torch.cat([(torch.arange(len(part)) == 0) & opens for part, opens in stretches])
        signal, self.state = self.chunker.segmenter.signal(text, doc_start[None], self.state)
        return signal[0].numpy()

    def push(self, stretches: Sequence[Stretch]) -> np.ndarray:
        """(t,) bool for stretches in a row."""
        stretches = [(stretch, opens) for stretch, opens in stretches if stretch]
        if not stretches:
            return np.zeros(0, bool)
        signal, found = self.read(stretches), []
        for stretch, opens in stretches:
            if opens:
                self.cutter = SignalCutter(self.chunker, self.chunker.threshold)
            found.append(self.cutter.cut(stretch, signal[: len(stretch)]))
            signal = signal[len(stretch) :]
        return np.concatenate(found)


class SignalCutter(Cutter):
    """Cuts one document by its signal, a stretch at a time."""

    def __init__(self, chunker: SegmenterChunker, threshold: float) -> None:
        super().__init__(chunker.min_bytes, chunker.max_bytes)
        self.rule, self.threshold = chunker.segmenter.rule, threshold
        self.origin: np.ndarray | None = None  # (k,) signal where the open chunk began

    def cut(self, text: bytes, signal: np.ndarray) -> np.ndarray:
        """(t,) bool: chunk starts of a stretch with this signal (t k). No character is split."""
        is_first_byte = np.frombuffer(text, np.uint8) & 0xC0 != 0x80
        if self.rule == "level":
            is_start = self.push_borders(text, (signal[:, 0] > self.threshold) & is_first_byte)
        else:
            is_start = self.push(text, _movement(signal, is_first_byte, self.threshold, self.origin))
        if is_start.any():
            self.origin = signal[np.flatnonzero(is_start)[-1]].copy()
        return is_start


def _movement(
    signal: np.ndarray, allowed: np.ndarray, threshold: float, origin: np.ndarray | None
) -> Callable[[int, int, int], int]:
    least = math.copysign(threshold * threshold, threshold)

    def find(start: int, first: int, stop: int) -> int:
        before = signal[start] if start >= 0 else origin
        size = NEAR_BYTES  # a border is mostly near; were each look as far as a chunk may go, time would be O(n max)
        while first < stop:
            end = min(first + size, stop)
            moved = signal[first:end] - before
            far = (np.einsum("tk,tk->t", moved, moved) > least) & allowed[first:end]
            at = int(far.argmax())
            if far[at]:
                return first + at
            first, size = end, 2 * size
        return -1

    return find
