"""A classifier of letters learns what letters tell, and nothing where they tell nothing."""

from __future__ import annotations

import numpy as np

from hldm.studies.ngram_classifier import NGramClassifier, accuracy


def texts_and_labels(seed: int, count: int) -> tuple[list[bytes], np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.2).astype(int)  # one value is rare
    words = [(b"sun", b"sea", b"sky"), (b"mud", b"mire", b"moor")]
    texts = [b" ".join(rng.choice([*words[label], b"and", b"the"], 8)) for label in labels]
    return texts, labels


def test_it_tells_new_texts_apart_and_not_ones_without_a_difference():
    texts, labels = texts_and_labels(0, 300)
    classifier = NGramClassifier(texts, labels, 2)
    others, right = texts_and_labels(1, 200)
    log_p = classifier.log_p(others)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-5)
    assert accuracy(log_p.argmax(axis=1), right)[1] > 0.95
    shuffled = np.random.default_rng(2).permutation(labels)
    assert accuracy(NGramClassifier(texts, shuffled, 2).log_p(others).argmax(axis=1), right)[1] < 0.8


def test_accuracy_counts_values_alike():
    share, mean = accuracy(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1]))
    assert (share, mean) == (0.75, 0.5)
