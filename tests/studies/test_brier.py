"""BrierLM: unbiased where the distribution is known, largest for the true one, and sure of what it may be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tiny_model import tiny_pipeline

from hldm.evaluation.prompts import Prompt
from hldm.studies.brier import END, brier_lm, brier_terms, measure_brier, symbols


def test_two_samples_estimate_2_p_of_y_less_sum_of_p_squared_without_bias():
    """Every pair of samples and every truth, weighed by its probability, against the definition."""
    rng = np.random.default_rng(0)
    grams = list(itertools.product(range(2), repeat=3))  # three symbols of two kinds: 8 grams
    p, q = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8))  # of the model, of the text
    index = np.array(list(itertools.product(range(8), repeat=3)))
    weight = p[index[:, 0]] * p[index[:, 1]] * q[index[:, 2]]
    first, second, truth = (np.array(grams)[index[:, k]] for k in range(3))
    found = (weight[:, None] * brier_terms(first, second, truth)).sum(axis=0)
    for n in (1, 2, 3):
        heads = [gram[:n] for gram in grams]
        mass = {head: sum(p[k] for k in range(8) if heads[k] == head) for head in set(heads)}
        expected = sum(q[k] * 2 * mass[heads[k]] for k in range(8)) - sum(m * m for m in mass.values())
        assert found[n - 1] == pytest.approx(expected)


def sampled(p: np.ndarray, q: np.ndarray, places: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    draws = [rng.choice(len(of), (places, 4), p=of) for of in (p, p, q)]
    return brier_lm(brier_terms(*draws))


def test_the_true_distribution_reaches_most_and_its_value_is_known():
    q = np.array([0.7, 0.2, 0.1])
    agreement = float((q * q).sum())  # 2 E p(y) - sum p^2 of one symbol; of n independent ones its power
    found = sampled(q, q, 200_000)
    assert found.value == pytest.approx(100 * agreement**2.5, abs=4 * found.standard_error)
    assert found.standard_error < 0.3
    for other in ([0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]):
        assert sampled(np.array(other), q, 50_000).value < found.value


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.4, 0.1])
    repeated = [sampled(p, q, 400, seed) for seed in range(60)]
    spread = np.std([found.value for found in repeated], ddof=1)
    assert 0.7 < np.mean([found.standard_error for found in repeated]) / spread < 1.4


def test_a_model_that_knows_the_text_has_100_and_one_that_never_agrees_has_0():
    truth = np.arange(40).reshape(10, 4)
    assert brier_lm(brier_terms(truth, truth, truth)) == (pytest.approx(100), pytest.approx(0))
    assert brier_lm(brier_terms(truth + 1, truth + 2, truth)) == (0, 0)
    assert brier_lm(brier_terms(truth + 1, truth + 1, truth)).value == 0  # sure of what is wrong: below 0
    with pytest.raises(ValueError, match="at least 2 places"):
        brier_lm(np.ones((1, 4)))
    with pytest.raises(ValueError, match="two samples and the truth"):
        brier_terms(truth, truth[:3], truth)


def test_what_was_written_is_compared_by_bytes_and_an_end_is_none():
    assert symbols([b"abcdef", "é".encode(), b""]).tolist() == [
        [97, 98, 99, 100],
        [0xC3, 0xA9, END, END],
        [END] * 4,
    ]


@pytest.mark.parametrize("kind", [{}, dict(latent_dim=0, components=0, reads_text=False)])
def test_a_pipeline_is_measured_by_its_own_samples(kind):
    pipeline = tiny_pipeline(**kind)
    places = [Prompt(b"and the king said ", "unto")] * 80  # more than are written at once
    settings = pipeline.settings
    found = measure_brier(pipeline, settings, places, seed=0)
    assert found == measure_brier(pipeline, settings, places, seed=0)
    greedy = settings.model_copy(update={"decoder_temperature": 0.0, "temperature": 0.0})
    written = pipeline("and the king said ", 4, temperature=0.0, decoder_temperature=0.0).sequences[0]
    told = [place._replace(continuation=written.decode("utf-8", "surrogateescape")) for place in places]
    assert measure_brier(pipeline, greedy, told, seed=0).value == pytest.approx(100)
