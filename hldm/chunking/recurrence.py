"""`state_change` and `gate`: chunks begin where the recurrence of Griffin itself says that something new does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hldm.chunking.segmenter import Features, Rule, Segmenter, SegmenterState, Settings
from hldm.model.griffin import RGLRU, Layout, ResidualBlock

TEACHING_WEIGHT = 0.3  # of the gates' cross-entropy, a mean over channels, beside nats a byte; not swept


class Recurrence(NamedTuple):
    """One recurrent block at work."""

    states: Tensor  # (b t d) h_t
    gates: Tensor  # (b t d) recurrence gate r_t in 0..1: the decay is a^(8 r_t), so 0 keeps all and 1 forgets


@contextmanager
def watched(trunk: nn.Module) -> Iterator[list[Recurrence]]:
    """The recurrences of all blocks of a trunk, while it runs, first to last."""
    found: list[Recurrence] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
        assert isinstance(module, RGLRU)
        x = arguments[0]  # (b t d)
        weight, bias = module.gate_weight.to(x.dtype), module.gate_bias.to(x.dtype)
        heads, w = weight.shape[:2]
        gates = torch.einsum("bthi,hio->btho", x.unflatten(-1, (heads, w)), weight[..., w:]) + bias[1]
        found.append(Recurrence(result[0], gates.flatten(-2).sigmoid()))

    hooks = [part.register_forward_hook(note) for part in trunk.modules() if isinstance(part, RGLRU)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class ForgettingSegmenter(Segmenter):
    """A byte model some channels of which forget where it does not know what comes next.

    Left to itself, the recurrence moves as much within a word as between two, and so do its gates (measured in
    tests/languages.py: F1 0.2, no better than chance, also when change or memory was penalised).
    So the recurrence gates of a block's first channels are taught, by cross-entropy, to open at the byte after which
    entropy rises most, as often as chunks are wanted: their state holds within a chunk. The next byte then starts
    one. A cut before a byte must not depend on it: in generation the byte is not there yet.
    """

    block = -1  # whose channels are taught

    def build(self) -> None:
        self.channels = self.settings.width // 4

    def recurrence(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState
    ) -> tuple[Features, Recurrence, SegmenterState]:
        """Features, and the recurrence of the taught channels."""
        with watched(self.trunk) as found:
            features, state = self.read(text, doc_start, state)
        return features, Recurrence(*(part[..., : self.channels] for part in found[self.block])), state

    def loss(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState, progress: float, generator: Generator
    ) -> tuple[Tensor, SegmenterState]:
        features, recurrence, state = self.recurrence(text, doc_start, state)
        log_p = self.outputs(features.before).log_softmax(dim=-1)
        nats = -log_p.gather(2, text[..., None]).mean()
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(dim=-1)
            rise = entropy.diff(dim=1)  # (b t-1)
            wanted = (rise > rise.flatten().quantile(1 - 1 / self.chunking.target_bytes)).to(rise.dtype)
        gates = recurrence.gates[:, :-1]
        wanted = wanted[..., None].expand_as(gates)
        return nats + TEACHING_WEIGHT * F.binary_cross_entropy(gates, wanted), state


class StateSegmenter(ForgettingSegmenter):
    """How far the recurrent state before a byte has moved, in Euclidean distance, since the open chunk began."""

    rule: Rule = "movement"

    def build(self) -> None:
        super().build()
        self.carried = self.channels  # their last state

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        _, recurrence, after = self.recurrence(text, doc_start, state)
        before = torch.cat([state.carry[:, None], recurrence.states[:, :-1]], dim=1)
        before = before.masked_fill(doc_start[..., None], 0.0)
        return before, after._replace(carry=recurrence.states[:, -1])


class GateSegmenter(ForgettingSegmenter):
    """How much less the gates kept at the byte before than at the one before that: the fall of 1 - r.

    r: a mean over the taught channels of the first block. Its gates see what its convolution does, four bytes, so that
    the same letters are cut alike wherever they stand and chunks of a text are of fewer kinds. Without spaces four
    bytes do not tell where a word ends: F1 in tests/languages.py 0.44.
    """

    # kinds of chunks: 15.1 % after a quarter of a minute, 15.0 % after half of one, 20.0 % after 0.12 minutes
    settings = Settings(minutes=0.25)
    block = 0
    carried = 2  # what the last byte keeps, and its fall

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        gates, after = self.first_gates(text, doc_start, state)
        kept = 1 - gates.mean(dim=-1)  # (b t)
        fall = torch.cat([state.carry[:, :1], kept[:, :-1]], dim=1) - kept
        fall = fall.masked_fill(doc_start, 0.0)  # not from another document's last byte
        before = torch.cat([state.carry[:, 1:], fall[:, :-1]], dim=1)
        return before[..., None], after._replace(carry=torch.stack([kept[:, -1], fall[:, -1]], dim=1))

    def first_gates(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState
    ) -> tuple[Tensor, SegmenterState]:
        """The taught gates (b t d) without what comes after the first recurrence: a quarter of the time."""
        block, (carried, *others) = self.trunk.blocks[0], state.griffin
        assert isinstance(block, ResidualBlock)
        layout = Layout.of(doc_start, doc_start, None)
        with watched(block) as found:
            _, carried = block.temporal(block.temporal_norm(self.embed(text)), carried, layout)
        return found[0].gates[..., : self.channels], state._replace(griffin=(carried, *others))
