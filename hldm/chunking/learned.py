"""`learned`: a router trained by gradients through its own choices, as in H-Net (arXiv 2507.07955, section 2).

bytes -> trunk -> router -> starts to some extent -> a decoder that forgets at starts (hldm.chunking.scorer) -> bytes.
Three things differ from H-Net. Chunks begin where the state *before* a byte has turned, so that a start
reveals nothing of the byte it is at. The router learns from what the decoder loses by forgetting at a start. And
no chunk level crosses the border, so there is nothing to smooth (H-Net's own form found fewer words: docs/journal.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hldm.chunking.scorer import ChunkWriter
from hldm.chunking.segmenter import Features, Segmenter, SegmenterState

RATIO_WEIGHT = 3.0  # alpha; H-Net's 0.03 is for chunks that gain from being short, these only lose
CURRICULUM = 0.3  # share of the progress in which the target shortens from half as much again as is wanted
SHARPNESS = 3.0  # of a start's log odds
NOISE = 1.5  # logistic, that training adds to them, less and less


class LearnedSegmenter(Segmenter):
    """p_t = (1 - cos(W_q y_{t-1}, W_k y_{t-2})) / 2, the probability that byte t opens a chunk (equation 4).

    y: the trunk's features through one residual layer; W_q and W_k start as the identity.
    """

    def build(self) -> None:
        width = self.carried = self.settings.width  # the state two bytes back
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        for linear in (self.query, self.key):
            nn.init.eye_(linear.weight)
        self.turn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.writer = ChunkWriter(width)

    def probability(self, features: Features, state: SegmenterState) -> tuple[Tensor, Tensor]:
        """p_t (b t), and what is carried on. state: as it was before these features."""
        now = features.before + self.turn(features.before)
        earlier = torch.cat([state.carry[:, None], now[:, :-1]], dim=1)
        similarity = F.cosine_similarity(self.query(now), self.key(earlier), dim=-1)
        return ((1 - similarity) / 2).clamp(1e-4, 1 - 1e-4), now[:, -1]

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        features, after = self.read(text, doc_start, state)
        p, carry = self.probability(features, state)
        return p[..., None], after._replace(carry=carry)

    def loss(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState, progress: float, generator: Generator
    ) -> tuple[Tensor, SegmenterState]:
        features, after = self.read(text, doc_start, state)
        p, carry = self.probability(features, state)
        # a start to some extent (concrete distribution, arXiv 1611.00712): its gradient knows of larger changes
        # than a straight-through one, with which F1 stayed below 0.4
        u = torch.rand(p.shape, generator=generator).clamp(1e-4, 1 - 1e-4)
        start = (SHARPNESS * p.logit() + NOISE * (1 - progress / 2) * u.logit()).sigmoid()
        nats = self.writer(text, start)[:, 1:].mean()

        # equation 10: least where the share of starts and their mean probability are both 1 / target
        target = self.chunking.target_bytes * max(1.0, 1.5 - 0.5 * progress / CURRICULUM)
        share, mean = (start.detach() > 0.5).to(p.dtype).mean(), p.mean()
        ratio = target / (target - 1) * ((target - 1) * share * mean + (1 - share) * (1 - mean))
        loss = self.next_byte_nats(features, text).mean() + nats + RATIO_WEIGHT * ratio
        return loss, after._replace(carry=carry)
