"""A classifier of passages that knows no model: logistic regression on TF-IDF of runs of characters.

What steered text is judged by, so it must not be what steers: it sees letters, the guide sees latents and the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = (2, 3, 4, 5)  # bytes of a run
BUCKETS = 2**17
EPOCHS, BATCH, RATE, DECAY = 6, 256, 0.05, 1e-6  # Adam; measured on the built-in text, hardly matter


class Bags(NamedTuple):
    """Texts as weighed sets of runs, in a row."""

    bucket: Tensor  # (n,) int64
    weight: Tensor  # (n,) float32
    offset: Tensor  # (texts + 1,)

    def some(self, rows: Tensor) -> Bags:
        """These texts only."""
        pairs = [(int(self.offset[row]), int(self.offset[row + 1])) for row in rows.tolist()]
        at = torch.cat([torch.arange(a, b) for a, b in pairs])
        sizes = torch.tensor([0, *(b - a for a, b in pairs)])
        return Bags(self.bucket[at], self.weight[at], sizes.cumsum(dim=0))


class NGramClassifier:
    """p(label | text), from texts and labels."""

    def __init__(self, texts: Sequence[bytes], labels: np.ndarray, values: int, seed: int = 0):
        """labels: (texts,) 0..values - 1. Every value counts alike, however rare it is."""
        counts = [_counts(text) for text in texts]
        seen = np.zeros(BUCKETS)
        for index, _ in counts:
            seen[index] += 1
        self.idf = np.log((1 + len(texts)) / (1 + seen)) + 1
        self.weight = torch.zeros(BUCKETS, values, requires_grad=True)
        self.bias = torch.zeros(values, requires_grad=True)
        self._fit(self._bags(counts), torch.from_numpy(labels), values, seed)

    def _bags(self, counts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Bags:
        weights = []
        for index, count in counts:
            weight = (1 + np.log(count)) * self.idf[index]
            weights.append(weight / max(np.sqrt(np.square(weight).sum()), 1e-12))
        offset = np.append(0, np.cumsum([len(index) for index, _ in counts]))
        return Bags(
            torch.from_numpy(np.concatenate([index for index, _ in counts])),
            torch.from_numpy(np.concatenate(weights)).float(),
            torch.from_numpy(offset),
        )

    def _logits(self, bags: Bags) -> Tensor:
        summed = F.embedding_bag(
            bags.bucket, self.weight, bags.offset[:-1], mode="sum", per_sample_weights=bags.weight
        )
        return summed + self.bias

    def _fit(self, bags: Bags, labels: Tensor, values: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        balance = 1 / torch.bincount(labels, minlength=values).clamp_min(1).float()
        optimizer = torch.optim.Adam([self.weight, self.bias], lr=RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
                loss = F.cross_entropy(self._logits(bags.some(rows)), labels[rows], balance)
                loss = loss + DECAY * self.weight.square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def log_p(self, texts: Sequence[bytes]) -> np.ndarray:
        """log p(label | text) (texts values)."""
        return self._logits(self._bags([_counts(text) for text in texts])).log_softmax(dim=-1).numpy()


def _counts(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of a text's runs of ORDERS bytes in lower case, with a space around it, and how often each occurs."""
    data = np.frombuffer(b" " + text.lower() + b" ", np.uint8).astype(np.uint64) + np.uint64(1)
    hashes = []
    for order in ORDERS:
        count = max(len(data) - order + 1, 0)
        found = np.full(count, order, dtype=np.uint64)
        for offset in range(order):
            found = found * np.uint64(0x9E3779B97F4A7C15) + data[offset : offset + count]
        hashes.append((found >> np.uint64(40)) % np.uint64(BUCKETS))
    return np.unique(np.concatenate(hashes).astype(np.int64), return_counts=True)


def accuracy(found: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Share of right answers, and its mean over the values that occur. found, labels: (texts,)"""
    right = found == labels
    by_value = [right[labels == value].mean() for value in np.unique(labels)]
    return float(right.mean()), float(np.mean(by_value))
