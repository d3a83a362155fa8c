"""`reinforce`: a policy places boundaries, rewarded by the bits they save (REINFORCE, Williams 1992)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hldm.chunking.chunker import SentenceChunker
from hldm.chunking.scorer import ChunkWriter
from hldm.chunking.segmenter import Segmenter, SegmenterState
from hldm.model.ops import linear_scan

PRETRAINING = 0.25  # share of the progress before the policy moves
SENTENCES = 0.5  # share of streams that are cut into sentences meanwhile, the others at random
DISCOUNT = 0.8  # of later bytes' bits in a cut's return: what a cut changes is over within a chunk or two
PRICE_MEMORY = 0.9  # decay a step of the average that is the cost of a start
RATE_STIFFNESS = 2.0  # standard deviations of the gain added to that cost when starts are twice as many
ENTROPY_BONUS = 0.01
BASELINE_WEIGHT = 0.1
HORIZON = 8  # last bytes of a window whose cuts are not judged: most of what they change is beyond it


class PolicySegmenter(Segmenter):
    """pi(start at t | bytes before t), from reward = -(bits of the chunks' decoder) - c x (starts).

    The return of byte t is the discounted sum of rewards from there on, less a learned baseline; the entropy of
    the policy adds a bonus. The cost c (`price`) is the average gain of a start, moved until there are as many
    starts as are wanted; without it the policy would start chunks everywhere or nowhere. This decoder has no latent
    and gains nothing from a start. So c is negative: starts are rewarded, and go where they cost the fewest bits.

    Before the policy moves, decoder and features learn: from sentences in half of the streams, from random chunks in
    the others, since the policy is to judge chunks far shorter than a sentence. Where there are no sentences, as in
    the language of tests/languages.py, a stream is then one chunk: F1 of its words is 0.98, and 0.98 without them.
    """

    def build(self) -> None:
        width = self.settings.width
        self.writer = ChunkWriter(width)
        self.policy, self.baseline = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)) for _ in range(2)
        )
        last = self.policy[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, -math.log(self.chunking.target_bytes - 1))
        self.price: Tensor
        self.register_buffer("price", torch.zeros(()))

    def level(self, before: Tensor) -> Tensor:
        return self.policy(before)

    def loss(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState, progress: float, generator: Generator
    ) -> tuple[Tensor, SegmenterState]:
        features, state = self.read(text, doc_start, state)
        known = features.before.detach()  # the policy reads the features, and does not bend them
        logit = self.policy(known)[..., 0]
        p = logit.sigmoid()
        start = torch.rand(p.shape, generator=generator) < p
        if progress < PRETRAINING:
            has_sentences = torch.rand(len(text), 1, generator=generator) < SENTENCES
            start = torch.where(has_sentences, sentence_starts(text) | doc_start, start)
        start = start.to(p.dtype)
        start[:, 0] = 1.0
        nats = self.writer(text, start)
        baseline = self.baseline(known)[..., 0]
        returns = discounted(-nats.detach())
        loss = self.next_byte_nats(features, text).mean() + nats[:, 1:].mean()
        loss = loss + BASELINE_WEIGHT * F.mse_loss(baseline, returns)
        if progress < PRETRAINING:
            return loss, state

        judged = slice(1, -HORIZON)
        advantage = self.advantage((returns - baseline)[:, judged], start[:, judged], p[:, judged])

        log_pi = -F.binary_cross_entropy_with_logits(logit, start, reduction="none")[:, judged]
        entropy = F.binary_cross_entropy_with_logits(logit, p, reduction="none").mean()
        policy_loss = -(advantage * log_pi).mean() - ENTROPY_BONUS * entropy
        return loss + policy_loss, state

    @torch.no_grad()
    def advantage(self, gain: Tensor, start: Tensor, p: Tensor) -> Tensor:
        """gain less the cost of starts, in standard deviations. (b t) all; moves that cost."""
        surprise = start - p
        average = (gain * surprise).sum() / surprise.square().sum()  # what a start gains, by least squares
        self.price.copy_(average.lerp(self.price, PRICE_MEMORY) if self.price else average)
        scale = gain.std()
        excess = self.chunking.target_bytes * start.mean() - 1
        return (gain - (self.price + RATE_STIFFNESS * scale * excess) * surprise) / scale


def sentence_starts(text: Tensor) -> Tensor:
    """(b t) bool: the white space after a sentence in each row of bytes (b t), as hldm.chunking.chunker finds it.

    A row is read for itself: a sentence that ended with the row before starts unseen.
    """
    find = SentenceChunker(1, text.shape[1]).borders
    return torch.from_numpy(np.stack([find(row.tobytes()) for row in text.to(torch.uint8).numpy()]))


def discounted(reward: Tensor) -> Tensor:
    """sum_k DISCOUNT^k reward_{t + k}, up to the window's end. (b t)."""
    backwards = reward.flip(1)[..., None]
    summed, _ = linear_scan(torch.full_like(backwards, DISCOUNT), backwards)
    return summed[..., 0].flip(1)
