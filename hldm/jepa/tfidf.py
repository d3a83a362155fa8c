"""Texts as bags of terms: what every representation that was learned has to be compared with. Knows no model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def characters_3_to_5(text: str) -> list[str]:
    """Every run of 3, 4 and 5 characters of a text in lower case, with a space around it."""
    text = f" {text.lower()} "
    return [text[i : i + n] for n in (3, 4, 5) for i in range(len(text) - n + 1)]


def cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """Of every query with every candidate (k k), from sparse rows of unit length."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        return torch.sparse.mm(queries, candidates.T).to_dense()


def lower_words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    cleaned = "".join(letter if letter.isalnum() or letter == "'" else " " for letter in text.lower())
    return cleaned.split()


def tfidf(
    terms: Callable[[str], list[str]], queries: Sequence[str], candidates: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Rows of unit length, sparse (k terms): (1 + log count) log((1 + n) / (1 + n_term)) + 1, over both lists."""
    counts = [Counter(terms(text)) for text in (*queries, *candidates)]
    documents = Counter(term for count in counts for term in count)
    number = {term: index for index, term in enumerate(documents)}
    n = len(counts)
    frequency = torch.tensor([documents[term] for term in number], dtype=torch.float64)
    idf = ((1 + n) / (1 + frequency)).log() + 1

    def rows(some: list[Counter[str]]) -> Tensor:
        row = torch.tensor([index for index, count in enumerate(some) for _ in count])
        column = torch.tensor([number[term] for count in some for term in count])
        values = torch.tensor([c for count in some for c in count.values()], dtype=torch.float64)
        values = (1 + values.log()) * idf[column]
        size = torch.zeros(len(some), dtype=torch.float64).index_add(0, row, values.square()).sqrt()
        shape = (len(some), len(number))
        place = torch.stack([row, column])
        return torch.sparse_coo_tensor(place, values / size[row], shape, check_invariants=True).coalesce()

    return rows(counts[: len(queries)]), rows(counts[len(queries) :])
