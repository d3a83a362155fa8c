"""The study compares like with like: same prompts, true text first, single draws at their best temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hldm.generation.writer import row_generators
from hldm.studies.best_of import AGAIN, _compare, entropy, study_candidates, table


def row(name, entropy, bits, rouge):
    each = np.array(bits), np.array(rouge)
    return {"name": name, "entropy": entropy, "ngram_bits": each[0].mean(), "each": each}


def test_a_rule_is_compared_with_the_best_single_draws_at_the_true_entropy():
    rows = [
        row("single", 7.0, [1.0, 1.0], [0.9, 0.9]),  # best of all, but its words do not vary
        row("single", 7.9, [2.0, 2.2], [0.1, 0.2]),
        row("single", 8.1, [2.4, 2.4], [0.1, 0.1]),
        row("mbr of 8", 8.0, [1.5, 1.9], [0.2, 0.5]),
    ]
    for each, at in zip(rows, (0.2, 0.5, 0.7, 0.7), strict=True):
        each["decoder_temperature"] = at
    _compare(rows, 8.0, "single", 0.7)
    assert [each.get("is_reference", False) for each in rows] == [False, True, False, False]
    assert [each["is_near"] for each in rows] == [False, True, True, True]
    assert rows[3]["best_bits"] == pytest.approx((0.4, 0.1))  # of the differences 0.5 and 0.3
    assert rows[3]["best_rouge"] == pytest.approx((0.2, 0.1))
    assert rows[3]["shipped_bits"] == pytest.approx((0.7, 0.2))
    assert "shipped_bits" not in rows[2]


def test_entropy_is_that_of_pooled_words_and_of_pairs_within_a_text():
    assert entropy(["a b", "a b"], 1) == 1 and entropy(["a b", "a b"], 2) == 0
    assert entropy(["a b c d"], 1) == 2 and entropy(["a"], 2) == 0


@pytest.mark.slow
def test_every_rule_stands_beside_single_draws_and_true_text(trained_run):
    asked = dict(prompts=2, max_characters=24, candidates=2, depth=2, temperatures=[0.7])
    found = study_candidates(trained_run, **asked, say=lambda line: None)
    rows = found["candidates_judged"]
    names = [each["name"] for each in rows]
    assert names[0] == "true text" and names.count("single") == 5
    assert names[6:] == [f"{rule} of 2" for rule in ("moments", "bound", "mbr", "agreement", "pairwise")]
    assert rows[0]["ngram_bits"] < min(each["ngram_bits"] for each in rows[1:])  # a dozen steps write noise
    assert sum(each.get("is_reference", False) for each in rows) == 1
    assert all("each" not in each for each in rows) and "reference" in str(table(found))
    again = study_candidates(trained_run, **asked, rules=["mbr"], say=lambda line: None)
    [mbr] = [each for each in again["candidates_judged"] if each["name"] == "mbr of 2"]
    assert mbr["ngram_bits"] == next(each["ngram_bits"] for each in rows if each["name"] == "mbr of 2")


def test_the_second_text_of_a_prompt_is_another_one():
    """BrierLM asks for independent texts: seeds that torch takes for the same would make it -1 or 1 a place."""
    first, second = (row_generators(seed, 64) for seed in (3, 3 + AGAIN))
    assert all(
        torch.rand(1, generator=a) != torch.rand(1, generator=b) for a, b in zip(first, second, strict=True)
    )


def test_an_unknown_rule_is_refused_before_anything_is_written(trained_run):
    with pytest.raises(ValueError, match="rank must be moments, bound, mbr"):
        study_candidates(trained_run, rules=["best"], prompts=2, say=lambda line: None)
