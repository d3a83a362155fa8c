"""`select`: score every byte's state, keep the best few of a window, end a chunk at each that is kept.

`queries`: the same, kept by learned attention queries instead of a score.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hldm.chunking.segmenter import Segmenter, SegmenterState

FRESH_BYTES = 2  # last bytes that the reader sees beside what was kept
QUERIES = 8  # of a stretch


class SelectSegmenter(Segmenter):
    """A reader of kept states must foresee the next byte; what helps it is kept.

    Training keeps the k = window / target_bytes best of a window: hard forward, the score's sigmoid backward
    (straight-through). The reader sees the last kept state and the last FRESH_BYTES bytes. At use a byte starts a
    chunk when the score of the state before it is above the threshold, which no later byte can change.
    """

    def build(self) -> None:
        width = self.settings.width
        self.score: nn.Module = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.fresh = nn.ModuleList(nn.Embedding(257, width) for _ in range(FRESH_BYTES))  # 256: none yet
        self.reader = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 256))

    def level(self, before: Tensor) -> Tensor:
        return self.score(before)

    def loss(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState, progress: float, generator: Generator
    ) -> tuple[Tensor, SegmenterState]:
        features, state = self.read(text, doc_start, state)
        start = self.keep(features.before)
        kept = features.before
        held = hold(kept * start[..., None], start.detach() > 0)
        recent = torch.zeros_like(kept)
        for back, table in enumerate(self.fresh, start=1):
            recent = recent + table(F.pad(text, (back, 0), value=256)[:, : text.shape[1]])
        logits = self.reader(torch.cat([held, recent], dim=-1))
        read_nats = F.cross_entropy(logits.mT, text, reduction="none")
        return self.next_byte_nats(features, text).mean() + read_nats.mean(), state

    def keep(self, before: Tensor) -> Tensor:
        """1 where a state is kept, 0 elsewhere, with a gradient. (b t d) -> (b t)."""
        return self.best(self.score(before)[..., 0])

    def best(self, scores: Tensor) -> Tensor:
        """1 at the k best of each window, 0 elsewhere, with the gradient of the scores' sigmoid. (b t)."""
        k = max(1, round(scores.shape[1] / self.chunking.target_bytes))
        best = scores.topk(k, dim=1)
        hard = torch.zeros_like(scores).scatter(1, best.indices, 1.0)  # of equal scores no more than k
        soft = (scores - best.values[:, -1:].detach()).sigmoid()
        return hard + soft - soft.detach()


class Attention(nn.Module):
    """How much each learned query attends to a state, before the softmax over states; and all of them together."""

    def __init__(self, width: int):
        super().__init__()
        self.key = nn.Linear(width, width)
        self.queries = nn.Parameter(torch.randn(QUERIES, width) / width**0.5)

    def each(self, before: Tensor) -> Tensor:
        """(b t d) -> (b t q)."""
        return self.key(before) @ self.queries.T

    def forward(self, before: Tensor) -> Tensor:
        """log of the sum over queries, which knows no later state. (b t d) -> (b t 1)."""
        return self.each(before).logsumexp(dim=-1, keepdim=True)


class QuerySegmenter(SelectSegmenter):
    """QUERIES learned queries attend to a stretch of QUERIES x target_bytes; the state each attends to most is kept.

    Hard forward, the attention's softmax backward. Two queries may keep the same state, which then counts once.
    """

    def build(self) -> None:
        super().build()
        self.score = Attention(self.settings.width)

    def keep(self, before: Tensor) -> Tensor:
        assert isinstance(self.score, Attention)
        size = round(QUERIES * self.chunking.target_bytes)
        t = before.shape[1]
        logits = F.pad(self.score.each(before), (0, 0, 0, -t % size), value=-1e9)
        soft = logits.unflatten(1, (-1, size)).softmax(dim=2)  # (b n s q)
        hard = torch.zeros_like(soft).scatter(2, soft.argmax(dim=2, keepdim=True), 1.0)
        kept = (hard + soft - soft.detach()).sum(dim=-1).flatten(1)[:, :t]
        return kept / kept.detach().clamp(min=1)


def hold(kept: Tensor, start: Tensor) -> Tensor:
    """At every byte what was kept last, at it or before; zeros before the first. kept (b t d), start (b t) bool."""
    position = torch.arange(start.shape[1], device=start.device)
    last = torch.where(start, position, -1).cummax(dim=1).values  # (b t)
    held = kept.gather(1, last.clamp(min=0)[..., None].expand_as(kept))
    return held * (last >= 0)[..., None]
