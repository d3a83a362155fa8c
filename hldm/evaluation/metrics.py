"""What a text is worth, from texts and counts alone: ROUGE, perplexity, diversity, and two baselines.

`Rouge` and `Perplexity` are metrics of Hugging Face's evaluate that need no network; they are made on
first use, because importing evaluate takes longer than everything else together. Knows no model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hldm.evaluation.words import ends_unspaced, letter_words, normal_words, split_words, words_in

ROUGE_TYPES: tuple[str, ...] = ("rouge1", "rouge2", "rougeL")


SPACE_WITHIN = 200  # bytes; longer words are none


def rouge_scores(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> dict[str, float | None]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004); of several references the best one counts.

    In words of any script, see `hldm.evaluation.words`. A reference without any, such as a row of emoji, has nothing
    to compare with and does not count; None where no reference has words.
    Raises ValueError when the two differ in number, or are empty.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"ROUGE needs one reference for each prediction, got {len(predictions)} predictions "
            f"and {len(references)} references"
        )
    # its own tokenizer keeps nothing but a to z and digits
    scorer = RougeScorer(ROUGE_TYPES, tokenizer=SimpleNamespace(tokenize=normal_words))
    found = []
    for prediction, reference in zip(predictions, references, strict=True):
        targets = [reference] if isinstance(reference, str) else list(reference)
        if targets := [target for target in targets if normal_words(target)]:
            found.append(scorer.score_multi(targets, prediction))
    if not found:
        return dict.fromkeys(ROUGE_TYPES, None)
    return {name: sum(scores[name].fmeasure / len(found) for scores in found) for name in ROUGE_TYPES}


def perplexities(
    nats: Sequence[float], characters: Sequence[float], words: Sequence[float]
) -> dict[str, float]:
    """exp(nats / characters) and exp(nats / words): the same bill, shared out over either unit.

    nats: -log p of each text;  characters, words: how many it has. All are summed. Raises ValueError for none.
    """
    bill, letters, terms = sum(nats), sum(characters), sum(words)
    if letters <= 0 or terms <= 0:
        raise ValueError(
            f"perplexity needs text to share {bill} nats over, got {letters:g} characters, {terms:g} words"
        )
    return {"character_perplexity": _exp(bill / letters), "word_perplexity": _exp(bill / terms)}


def ratio_error(part: np.ndarray, whole: np.ndarray) -> float | None:
    """Standard error of sum(part) / sum(whole) by the spread over groups (k,), linearised; None for a single one."""
    groups = len(part)
    if groups < 2:
        return None
    residual = part - part.sum() * (whole / whole.sum())
    return math.sqrt(groups / (groups - 1) * (residual**2).sum()) / float(whole.sum())


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """How varied texts are, in words as `split_words` finds them; n-grams never span two texts.

    distinct1, distinct2: different n-grams over all of them, pooled (Li et al., arXiv 1510.03055)
    entropy:              of the pooled word frequencies, in bits
    repetition:           1 - different 4-grams over all of them within a text (seq-rep-4, arXiv 1908.04319),
                          averaged over the texts that have any
    Shares of nothing are 0.
    """
    word_lists = [split_words(text) for text in texts]
    words = Counter(word for word_list in word_lists for word in word_list)
    pairs = Counter(pair for word_list in word_lists for pair in _ngrams(word_list, 2))
    fours = [four for word_list in word_lists if (four := _ngrams(word_list, 4))]
    total = words.total()
    return {
        "distinct1": len(words) / max(total, 1),
        "distinct2": len(pairs) / max(pairs.total(), 1),
        "entropy": sum(n / total * math.log2(total / n) for n in words.values()),
        "repetition": sum(1 - len(set(four)) / len(four) for four in fours) / max(len(fours), 1),
    }


class TrainingText:
    """What stands in a training text, for the question how much of other texts does; built once, asked often."""

    def __init__(self, text: bytes, span: int):
        """span: bytes of what counts as copied."""
        self.span = span
        self._words = frozenset(letter_words(text.decode("utf-8", "replace")))
        self._spans = np.unique(_span_hashes(text, span))

    def known_words(self, texts: Sequence[str]) -> float:
        """Share of words, letters in a row, that occur in it; the first and last of a text may be cut."""
        words = [word for text in texts for word in letter_words(text)[1:-1]]
        return sum(word in self._words for word in words) / max(len(words), 1)

    def copied_share(self, texts: Sequence[bytes]) -> float:
        """Share of the texts' spans, at every place, that stand in it.

        By a 64-bit hash of each span; spans across two texts do not count. Texts without a span: 0.
        """
        hashes = np.concatenate([_span_hashes(text, self.span) for text in texts])
        at = np.searchsorted(self._spans, hashes).clip(max=max(len(self._spans) - 1, 0))
        return float((self._spans[at] == hashes).mean()) if len(hashes) and len(self._spans) else 0.0


def _span_hashes(text: bytes, span: int) -> np.ndarray:
    """A polynomial in an odd base, modulo 2^64, of every span of bytes."""
    data = np.frombuffer(text, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    count = max(len(data) - span + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(span):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + data[offset : offset + count]
    return hashes


def repeat_last_words(prompt: str, length: int, words: int = 8) -> str:
    """Baseline continuation: the prompt's last words over and over, `length` characters of them."""
    text = " ".join(prompt.split())
    last = words_in(text)[-words:]
    last_words = text[last[0].start() :] if last else ""
    return "".join(islice(cycle(last_words if ends_unspaced(text) else f"{last_words} "), length))


def random_passage(training_text: bytes, length: int, generator: torch.Generator) -> str:
    """Baseline continuation: `length` characters of the training text from the start of a random word.

    Where no space comes for SPACE_WITHIN bytes, as in Chinese, from the start of a random character.

    Raises ValueError when the text is too short to be sure of them.
    """
    starts = len(training_text) - 4 * length  # a character has at most 4 bytes in UTF-8
    if starts <= 0:
        raise ValueError(
            f"a passage of {length} characters needs a training text of more than {4 * length} bytes, "
            f"got {len(training_text)}"
        )
    inside = int(torch.randint(starts, (), generator=generator))
    earliest = max(inside - SPACE_WITHIN, 0)
    start = training_text.rfind(b" ", earliest, inside) + 1  # of the word that this byte is in
    if not start and earliest:
        start = inside
        while start > earliest and training_text[start] & 0xC0 == 0x80:  # inside a character of UTF-8
            start -= 1
    passage = training_text[start : start + 4 * length]
    return passage.decode("utf-8", errors="ignore")[:length]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # e^709 is the last one a float holds


@cache
def _evaluate_metrics() -> dict[str, type]:
    """`Rouge`, a reference being a text or a list of them, and `Perplexity`."""
    import datasets
    import evaluate

    def metric(name: str, compute: Callable[..., Any], *columns: dict[str, Any]) -> type:
        features = [datasets.Features(kinds) for kinds in columns]
        info = evaluate.MetricInfo(description=compute.__doc__ or "", citation="", features=features)
        methods = {"_info": lambda _: info, "_compute": lambda _, **values: compute(**values)}
        return type(name, (evaluate.Metric,), methods)

    text, number = datasets.Value("string"), datasets.Value("float64")
    references = (datasets.Sequence(text), text)
    return {
        "Rouge": metric(
            "Rouge", rouge_scores, *({"predictions": text, "references": kind} for kind in references)
        ),
        "Perplexity": metric(
            "Perplexity", perplexities, dict.fromkeys(("nats", "characters", "words"), number)
        ),
    }


def __getattr__(name: str) -> type:
    if name in ("Rouge", "Perplexity"):
        return _evaluate_metrics()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def compute(metric: str, **columns: Any) -> dict[str, float]:
    """Rouge or Perplexity, as evaluate computes it; it writes what it is given to disk: gone when it is done."""
    with TemporaryDirectory() as folder:
        return _evaluate_metrics()[metric](cache_dir=folder).compute(**columns)
