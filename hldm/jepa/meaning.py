"""What vectors of texts are worth, from the vectors alone: retrieval, probes, correlation with graded similarity.

Knows no text and no model. Raw cosines favour whatever all vectors share; centring takes the mean away, and ZCA
whitening the directions in which all vectors vary: no claim without all three (docs/jepa.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 1e-6  # of the mean variance, added to every direction before it is whitened
NEIGHBOURS = 5
PENALTY = 1e-3  # of the squared weights of a probe, against the mean nats


class Frame(NamedTuple):
    """Where vectors are looked at from: x -> (x - mean) turn."""

    mean: Tensor  # (z)
    turn: Tensor  # (z z)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Vectors (k z) as seen from here, of unit length, float64."""
        return F.normalize((vectors.double() - self.mean) @ self.turn, dim=-1)


def frames(sample: Tensor) -> dict[str, Frame]:
    """Raw, centred and whitened, fitted on a sample (k z) of training texts."""
    sample = sample.double()
    mean = sample.mean(dim=0)
    same = torch.eye(sample.shape[1], dtype=torch.float64)
    values, directions = torch.linalg.eigh(torch.cov(sample.T).reshape(same.shape))
    values = values.clamp(min=0) + RIDGE * values.mean().clamp(min=1e-300)
    whiten = directions @ torch.diag(values.rsqrt()) @ directions.T
    return {
        "raw": Frame(torch.zeros_like(mean), same),
        "centred": Frame(mean, same),
        "whitened": Frame(mean, whiten),
    }


class Retrieval(NamedTuple):
    """How often the right candidate is found, over all queries."""

    recall_1: float
    recall_5: float
    mrr: float  # mean of 1 / rank


def retrieve(similarity: Tensor) -> Retrieval:
    """similarity: (k k) of each query with each candidate; the right one has its number.

    A tie counts as half of those tied before it: vectors that are all the same are worth chance, not everything.
    """
    right = similarity.diagonal()[:, None]
    better = (similarity > right).sum(dim=1).double()
    tied = (similarity == right).sum(dim=1).double() - 1
    rank = 1 + better + tied / 2
    return Retrieval(*(float(part.double().mean()) for part in (rank <= 1, rank <= 5, 1 / rank)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, ties at their mean rank; nan where one of the two does not vary."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (a, b)]
    ranks = [values - values.mean() for values in ranks]
    size = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / size) if size else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def probe(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor) -> float:
    """Accuracy of a logistic regression on vectors (k z), standardised, fitted by L-BFGS to its end."""
    mean, deviation = train.double().mean(dim=0), train.double().std(dim=0).clamp(min=1e-12)
    x, x_test = ((part.double() - mean) / deviation for part in (train, test))
    classes = int(max(train_label.max(), test_label.max())) + 1
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, train_label) + PENALTY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        return float(((x_test @ weight + bias).argmax(dim=1) == test_label).double().mean())


def nearest_neighbours(train: Tensor, train_label: Tensor, test: Tensor, test_label: Tensor) -> float:
    """Accuracy of the label that most of the NEIGHBOURS nearest vectors have, by cosine of unit vectors (k z).

    Of labels that are as frequent the one wins whose neighbours are nearer, by the sum of their cosines.
    """
    cosine, nearest = (test @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
    label = train_label[nearest]
    votes = torch.zeros(len(test), int(train_label.max()) + 1, dtype=torch.float64)
    # a vote counts 1, and its cosine decides between equals
    votes.scatter_add_(1, label, 1 + cosine.double() / (4 * NEIGHBOURS))
    return float((votes.argmax(dim=1) == test_label).double().mean())


class McNemar(NamedTuple):
    """Two ways of answering, on the same questions (McNemar 1947), by the exact binomial test."""

    only_first: int  # right where the second is wrong
    only_second: int
    p: float  # two-sided: how likely a split as uneven is, were both as good


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Whether one of two is right more often. Raises ValueError for lists of different length."""
    answers = list(zip(first, second, strict=True))
    a, b = sum(x and not y for x, y in answers), sum(y and not x for x, y in answers)
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1))
    return McNemar(a, b, min(1.0, 2 * tail / 2 ** (a + b)))


def pair_features(u: Tensor, v: Tensor) -> Tensor:
    """u, v, |u - v| and uv side by side (k 4z), as InferSent's (arXiv 1705.02364, section 3.1)."""
    return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)
