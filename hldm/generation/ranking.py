"""Which of several continuations of one text is the best: rules that a beam of candidates is ranked by.

A rule is a function from the stubs that stand after one text to a score each; more is better. It sees texts, latents
and bits, and knows no writer. None of them is what written text is judged by (hldm.studies.judge, ROUGE): a ranker that
judges itself always wins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.generation.chunk import Piece

CHRF_ORDER, CHRF_BETA = 6, 2  # Popovic 2015: n-grams of 1 to 6 characters, recall counts twice
AGREEMENT_ORDER = 4  # n-grams of 1 to 4 characters, as BrierLM's (hldm.studies.brier)
# Of moments, in standard deviations of their sum: a normal leaves so far once in 30,000 stubs.
FARTHEST = 4.0


@dataclass
class Stub:
    """One candidate: what it writes after a text, and what is known of each of its chunks."""

    before: bytes  # the text that it continues, prompt included
    pieces: list[Piece] = field(default_factory=list)
    residuals: list[Tensor] = field(
        default_factory=list
    )  # (z) each: what its latent misses of what was predicted
    bits: list[float] = field(
        default_factory=list
    )  # each: under the model's own bound; [] unless a rule asks
    lift: float = math.nan  # bits that the others cost less after this one; NaN unless a rule asks

    @property
    def text(self) -> bytes:
        """The chunks in one."""
        return b"".join(piece.text for piece in self.pieces)

    def of_pieces(self, first: int) -> Stub:
        """Another of its pieces from `first` on, what comes before them taken for certain."""
        before = self.before + b"".join(piece.text for piece in self.pieces[:first])
        return Stub(before, self.pieces[first:], self.residuals[first:], self.bits[first:], self.lift)


Ranker = Callable[[Sequence[Stub]], Sequence[float]]


# ---- the rules


def by_moments(stubs: Sequence[Stub]) -> list[float]:
    """How near mean and variance of a stub's latents are to those that the text before each chunk predicts.

    With r_c = (mu_c - m_c) / s_c, m_c and s_c mean and deviation of the mixture that predicts chunk c, r has mean 0 and
    mean square 1 under the prediction. The score is minus what both miss, in units of their standard deviations under a
    normal: -(sum over dimensions of c mean(r)^2 + c/2 (mean(r^2) - 1)^2), c chunks; -2 z on average for z dimensions.
    """
    return [-_missed(stub) for stub in stubs]


def has_left(stub: Stub) -> bool:
    """Whether the moments of a stub are FARTHEST standard deviations beyond what the context predicts."""
    terms = 2 * len(stub.residuals[0])  # squares of standard normals, each with mean 1 and variance 2
    return _missed(stub) > terms + FARTHEST * math.sqrt(2 * terms)


def _missed(stub: Stub) -> float:
    r = torch.stack(stub.residuals).double()  # (c z)
    count = len(r)
    mean, square = r.mean(dim=0), r.square().mean(dim=0)
    return float((count * mean.square() + count / 2 * (square - 1).square()).sum())


def by_bound(stubs: Sequence[Stub]) -> list[float]:
    """Minus the bits of a byte under the model's own bound; of the twin its own likelihood."""
    return [-sum(stub.bits) / max(len(stub.text), 1) for stub in stubs]


def by_risk(stubs: Sequence[Stub]) -> list[float]:
    """Minimum Bayes risk: the mean chrF of a stub against all others, each as likely to be the true text.

    Kumar and Byrne 2004; chrF is the F_2 of character n-grams, spaces left out (Popovic 2015).
    """
    grams = _ngrams(["".join(_characters(stub).split()) for stub in stubs], CHRF_ORDER)
    total = np.zeros((len(stubs), len(stubs)))
    orders = np.zeros_like(total)
    for counts in grams:  # (stubs kinds)
        both = np.minimum(counts[:, None], counts[None]).sum(axis=-1)
        size = counts.sum(axis=-1)
        f = (1 + CHRF_BETA**2) * both / np.maximum(size[:, None] + CHRF_BETA**2 * size[None], 1)
        counted = (size[:, None] > 0) & (size[None] > 0)
        total += f * counted
        orders += counted
    return _mean_of_others(total / np.maximum(orders, 1))


def by_agreement(stubs: Sequence[Stub]) -> list[float]:
    """How well a stub's n-grams forecast those of the others: Brier's score, strictly proper (as BrierLM, CALM).

    With p_i the distribution of the n-grams in stub i: sum over n = 1..4 of the mean over j of 2 p_i p_j - p_i p_i. The
    last term penalises a stub that repeats itself.
    """
    score = np.zeros(len(stubs))
    for counts in _ngrams([_characters(stub) for stub in stubs], AGREEMENT_ORDER):
        p = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
        alike = p @ p.T
        score += 2 * np.array(_mean_of_others(alike)) - alike.diagonal()
    return score.tolist()


def by_pairs(stubs: Sequence[Stub]) -> list[float]:
    """How many bits the others cost less after this stub than without it: the model reads them one after the other."""
    return [stub.lift for stub in stubs]


def _characters(stub: Stub) -> str:
    return stub.text.decode("utf-8", "surrogateescape")


def _ngrams(texts: Sequence[str], order: int) -> list[np.ndarray]:
    """How often each n-gram that any text has stands in each, for n = 1 .. order: (texts kinds)."""
    found = []
    for n in range(1, order + 1):
        counters = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts]
        kinds = {
            gram: number for number, gram in enumerate({gram for counter in counters for gram in counter})
        }
        counts = np.zeros((len(texts), len(kinds)))
        for row, counter in zip(counts, counters, strict=True):
            row[[kinds[gram] for gram in counter]] = list(counter.values())
        found.append(counts)
    return found


def _mean_of_others(values: np.ndarray) -> list[float]:
    """The mean of each row without the diagonal; 0 where there is nobody else. (k k) -> (k)."""
    others = len(values) - 1
    return ((values.sum(axis=-1) - values.diagonal()) / max(others, 1)).tolist()


# ---- what each needs


class Rule(NamedTuple):
    """A ranker, and what has to be known of stubs before it is asked."""

    rank: Ranker
    needs: Literal["", "residuals", "bits", "pairs"] = ""
    alone: bool = False  # judges a stub by itself, so the worst can be discarded before they are finished
    leaves: Callable[[Stub], bool] | None = None  # whether a stub is not worth going on with


RULES: dict[str, Rule] = {
    "moments": Rule(by_moments, needs="residuals", alone=True, leaves=has_left),
    "bound": Rule(by_bound, needs="bits", alone=True),
    "mbr": Rule(by_risk),
    "agreement": Rule(by_agreement),
    "pairwise": Rule(by_pairs, needs="pairs"),
}


def rule_of(rank: str | Ranker) -> Rule:
    """The rule of this name, or one of the user's own function. Raises ValueError that lists the choices."""
    if callable(rank):
        return Rule(rank)
    if rank not in RULES:
        raise ValueError(
            f"rank must be {', '.join(RULES)}, or a function of stubs (module:function), got {rank!r:.60}"
        )
    return RULES[rank]


def scores_of(rule: Rule, stubs: Sequence[Stub]) -> list[float]:
    """A score for each stub. Raises ValueError where a rule gives no number for each."""
    found = rule.rank(stubs)
    try:
        scores = [float(score) for score in found]
    except (TypeError, ValueError):
        scores = []
    if len(scores) != len(stubs) or any(math.isnan(score) for score in scores):
        raise ValueError(
            f"a ranker gives one number for each of its stubs, more for a better one: {len(stubs)} of them, "
            f"got {found!r:.80}"
        )
    return scores
