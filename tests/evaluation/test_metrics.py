"""Metrics: known answers, and the same ones through evaluate without a network."""

from __future__ import annotations

import math

import pytest
import torch

from hldm.evaluation import metrics
from hldm.evaluation.metrics import (
    TrainingText,
    diversity,
    perplexities,
    random_passage,
    repeat_last_words,
    rouge_scores,
)


def test_rouge_of_a_text_with_itself_is_one_and_with_another_is_zero():
    assert rouge_scores(["in the beginning"], ["in the beginning"]) == dict.fromkeys(metrics.ROUGE_TYPES, 1.0)
    assert rouge_scores(["in the beginning"], ["words words"]) == dict.fromkeys(metrics.ROUGE_TYPES, 0.0)


def test_rouge_agrees_with_a_count_by_hand():
    scores = rouge_scores(["the cat sat"], ["the cat lay down"])
    assert scores["rouge1"] == pytest.approx(2 * 2 / (3 + 4))  # 2 words of 3 and of 4
    assert scores["rouge2"] == pytest.approx(2 * 1 / (2 + 3))  # 1 pair of 2 and of 3
    assert scores["rougeL"] == pytest.approx(2 * 2 / (3 + 4))


def test_of_several_references_the_best_one_counts():
    assert rouge_scores(["a b", "c"], [["x", "a b"], ["c"]])["rouge1"] == 1.0


@pytest.mark.parametrize(("predictions", "references"), [(["a"], []), ([], [])])
def test_rouge_of_unequal_numbers_is_refused(predictions, references):
    with pytest.raises(ValueError, match="one reference for each prediction"):
        rouge_scores(predictions, references)


def test_a_uniform_guess_has_the_perplexity_of_its_choices():
    values = perplexities(nats=[10 * math.log(256)], characters=[10], words=[5])
    assert values["character_perplexity"] == pytest.approx(256)
    assert values["word_perplexity"] == pytest.approx(256**2)
    assert perplexities([1e6], [1], [1])["word_perplexity"] == math.inf
    with pytest.raises(ValueError, match="0 characters"):
        perplexities([1.0], [0], [0])


def test_diversity_of_texts_with_known_counts():
    values = diversity(["a b c d", "a b c d", ""])
    assert values["distinct1"] == 4 / 8
    assert values["distinct2"] == 3 / 6
    assert values["entropy"] == pytest.approx(2.0)  # four words, equally often
    assert values["repetition"] == 0.0  # within a text


def test_repetition_counts_what_a_text_says_again():
    assert diversity(["a " * 13])["repetition"] == pytest.approx(1 - 1 / 10)
    assert set(diversity([]).values()) == {0.0}


def test_the_repeating_baseline_has_the_length_asked_for():
    assert repeat_last_words("one two three", 12, words=2) == "two three tw"
    assert repeat_last_words("", 3) == "   "


def test_a_random_passage_is_whole_characters_of_the_text_from_the_start_of_a_word():
    text = "été über naïve 日本語 plain words\n" * 20
    passages = {random_passage(text.encode(), 15, torch.Generator().manual_seed(seed)) for seed in range(50)}
    assert len(passages) > 5
    for passage in passages:
        assert len(passage) == 15
        assert f" {passage}" in f" {text}"
    with pytest.raises(ValueError, match="more than 60 bytes, got 2"):
        random_passage(b"ab", 15, torch.Generator())


def test_the_evaluate_metrics_give_the_same_numbers_batch_by_batch(tmp_path):
    rouge = metrics.Rouge(cache_dir=str(tmp_path))
    rouge.add_batch(predictions=["the cat sat"], references=["the cat lay down"])
    rouge.add_batch(predictions=["a"], references=["a"])
    expected = rouge_scores(["the cat sat", "a"], ["the cat lay down", "a"])
    assert rouge.compute() == pytest.approx(expected)
    several = metrics.Rouge(cache_dir=str(tmp_path)).compute(predictions=["a"], references=[["b", "a"]])
    assert several["rouge1"] == 1.0
    perplexity = metrics.Perplexity(cache_dir=str(tmp_path))
    perplexity.add(nats=30.5, characters=10, words=2)
    assert perplexity.compute(nats=[1.5], characters=[6], words=[2]) == pytest.approx(
        perplexities([30.5, 1.5], [10, 6], [2, 2])
    )


def test_known_words_leaves_out_the_ends_which_may_be_cut():
    training = TrainingText(b"the king said: go", span=5)
    assert training.known_words(["XX the king XX"]) == 1
    assert training.known_words(["XX the kong said XX", "go"]) == pytest.approx(2 / 3)
    assert training.known_words([""]) == 0


def test_copied_spans_are_found_wherever_they_stand():
    text = bytes(range(256)) * 2
    training = TrainingText(text, span=50)
    assert training.copied_share([text[30:100]]) == 1
    assert training.copied_share([text[:60] + b"\0" * 60]) == pytest.approx(11 / 71)
    assert training.copied_share([b"\0" * 100, b"short"]) == 0
    assert TrainingText(b"short", span=50).copied_share([text]) == 0
