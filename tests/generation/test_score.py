"""Scores of texts: evaluation's bound, the same alone and in a batch, additive over prefix and rest, honest errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_model import tiny_pipeline

from hldm.chunking.reading import prompt_chunker
from hldm.evaluation.bound import evaluate_bound, held_out_windows
from hldm.text.bytes import MAX_PROMPT_BYTES
from hldm.text.corpus import make_corpus
from hldm.text.noise import PlacedGenerator

TEXTS = ["And the king said, Let us go up.", "naïve 日本 light", "x", "a" * 700 + " of stone and sun " * 60]
KINDS = {
    "mixture": {},
    "trunk": dict(trunk_layers=1, trunk_width=8),
    "carried": dict(components=0, carry_state=True),
    "twin": dict(latent_dim=0, components=0, reads_text=False),
}


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request):
    return tiny_pipeline(**KINDS[request.param])


@pytest.fixture(scope="module")
def mixture():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def twin():
    return tiny_pipeline(**KINDS["twin"])


def score_of(pipeline, text, prefix=None, **options):
    """Of one text."""
    (score,) = pipeline.score(text, prefix, **options)
    return score


def numbers(score):
    return [score.bits, score.standard_error, score.decoder, score.latent, score.end]


def test_a_text_costs_what_evaluation_says_of_it(pipeline):
    for text in TEXTS:
        score = score_of(pipeline, text, draws=4, seed=3)
        windows = held_out_windows(pipeline.autoencoder, make_corpus("one", [text.encode()]))
        bound = evaluate_bound(
            pipeline.autoencoder, pipeline.prior, windows, draws=4, generator=PlacedGenerator(3)
        ).bits_per_character()
        assert score.characters == len(text)
        assert score.bits_per_character == pytest.approx(bound["bound"], rel=1e-6)
        assert score.standard_error == pytest.approx(bound["standard_error"] * len(text), rel=1e-4)
        assert score.bits == pytest.approx(score.decoder + score.latent + score.end)


def test_a_batch_gives_what_its_texts_give_one_by_one(pipeline):
    prefixes = ["In the beginning ", "", "日本", "of "]
    together = pipeline.score(TEXTS, prefixes)
    for text, prefix, score in zip(TEXTS, prefixes, together, strict=True):
        np.testing.assert_allclose(
            numbers(score), numbers(score_of(pipeline, text, prefix)), rtol=1e-4, atol=1e-3
        )


def test_noise_depends_on_seed_and_place_alone(mixture):
    one, other = (score_of(mixture, text) for text in ("sun and light", "sun and stone"))
    first, same = one.noise[0], other.noise[0]  # the first chunk is "sun " in both
    assert first == pytest.approx(same, rel=1e-4) and first != 0
    assert score_of(mixture, "sun and light", seed=1).noise[0] != pytest.approx(first, rel=1e-2)


def test_the_places_of_noise_are_counted_from_the_text_not_from_its_prefix():
    places = np.array([-70, -1, 0, 1, 64])
    batch = held_out_windows(tiny_pipeline().autoencoder, make_corpus("x", [b"abcd" * 5])).batch(0)
    assert batch.chunk_index.shape == (1, 5)
    drawn = PlacedGenerator(0, places).draw(torch.randn, batch, (5, 3))[0]
    again = PlacedGenerator(0, places[::-1].copy()).draw(torch.randn, batch, (5, 3))[0].flip(0)
    torch.testing.assert_close(drawn, again)
    assert len(np.unique(drawn.numpy())) == drawn.numel()
    generator = PlacedGenerator(0, places)
    assert not torch.equal(
        generator.draw(torch.randn, batch, (5, 3)), generator.draw(torch.randn, batch, (5, 3))
    )


@pytest.mark.parametrize("prefix", ["And the king said,", "日本 naïve "])
def test_the_twin_pays_for_a_prefix_and_for_the_rest_what_it_pays_for_both(twin, prefix):
    rest = " Let us go up to the city of stone."
    parts = [
        score_of(twin, prefix, ends_document=False),
        score_of(twin, rest, prefix=prefix, ends_document=True),
    ]
    assert sum(part.bits for part in parts) == pytest.approx(score_of(twin, prefix + rest).bits, rel=1e-5)
    assert score_of(twin, prefix).standard_error == 0 == score_of(twin, prefix).latent


def test_after_a_prefix_the_chunks_that_follow_it_are_paid_for_as_in_the_whole(mixture):
    """Where the text is cut at the end of the prefix anyway, the terms add up over the two."""
    prefix, rest = "sun and", " light of stone"
    whole, *pieces = (
        prompt_chunker(mixture.autoencoder).chunk_start(text.encode())
        for text in (prefix + rest, prefix, rest)
    )
    assert whole.tolist() == np.concatenate(pieces).tolist()
    parts = [
        score_of(mixture, prefix, ends_document=False),
        score_of(mixture, rest, prefix=prefix, ends_document=True),
    ]
    assert sum(part.end for part in parts) == pytest.approx(score_of(mixture, prefix + rest).end, rel=1e-4)
    whole = score_of(mixture, prefix + rest, draws=100)
    parts = [
        score_of(mixture, prefix, ends_document=False, draws=100),
        score_of(mixture, rest, prefix=prefix, ends_document=True, draws=100),
    ]
    error = math.hypot(whole.standard_error, *(part.standard_error for part in parts))
    assert abs(sum(part.bits for part in parts) - whole.bits) < 4 * error < 0.1 * whole.bits


def test_a_prefix_changes_what_follows_and_an_empty_one_is_none(pipeline):
    text = "the city of stone"
    assert score_of(pipeline, text, "").bits == score_of(pipeline, text).bits
    after = score_of(pipeline, text, prefix="And he went up to ")
    assert after.bits != pytest.approx(score_of(pipeline, text, ends_document=False).bits, rel=1e-5)


def test_a_uniform_decoder_pays_log2_258_for_every_byte_and_end(twin):
    torch.manual_seed(0)
    flat = tiny_pipeline(**KINDS["twin"])
    torch.nn.init.zeros_(flat.autoencoder.outputs.weight)
    torch.nn.init.zeros_(flat.autoencoder.outputs.bias)
    assert score_of(flat, "naïve").bits == pytest.approx(7 * math.log2(258))
    assert score_of(flat, "naïve", "x").bits == pytest.approx(6 * math.log2(258))  # its document goes on


def test_the_standard_error_is_the_spread_over_seeds(pipeline):
    scores = [score_of(pipeline, "And the king said, Let us", draws=2, seed=seed) for seed in range(40)]
    spread = np.std([score.bits for score in scores], ddof=1)
    claimed = math.sqrt(np.mean([score.standard_error**2 for score in scores]))
    if pipeline.prior is None:
        assert claimed == 0 and spread < 1e-9
    else:
        assert 0.6 < claimed / spread < 1.6


def test_a_difference_is_known_better_than_its_parts_where_texts_share_noise(mixture):
    pairs = [
        mixture.score(["and the sun of stone is light", "and the sun of stone was light"], draws=2, seed=seed)
        for seed in range(40)
    ]
    found = [a.minus(b) for a, b in pairs]
    claimed = math.sqrt(np.mean([error**2 for _, error in found]))
    spread = np.std([bits for bits, _ in found], ddof=1)
    assert 0.6 < claimed / spread < 1.6
    assert spread < 0.8 * np.std([a.bits for a, _ in pairs], ddof=1) * math.sqrt(2)


def test_importance_weights_tighten_and_know_their_error(mixture, twin):
    text = "And the king said, Let us go up to the city."
    one, few, many = (score_of(mixture, text, samples=samples) for samples in (1, 4, 32))
    assert one.importance > many.importance and few.importance > many.importance
    assert one.importance_error is None and many.importance_error < few.importance_error
    repeated = [score_of(mixture, text, draws=2, samples=8, seed=seed) for seed in range(24)]
    spread = np.std([score.importance for score in repeated], ddof=1)
    assert 0.5 < math.sqrt(np.mean([s.importance_error**2 for s in repeated])) / spread < 1.6
    exact = score_of(twin, text, samples=4)
    assert exact.importance == exact.bits and exact.importance_error == 0
    assert score_of(mixture, text).importance is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(texts=""), r"texts\[0\] is empty"),
        (dict(texts=["a", b""]), r"texts\[1\] is empty"),
        (dict(texts=[]), "no text given"),
        (dict(texts=7), "texts must be str, bytes or a list of them, got int"),
        (dict(texts=["a", 7]), r"texts\[1\] must be str or bytes, got int"),
        (dict(texts="\ud800"), "half a surrogate pair"),
        (dict(texts="a" * (MAX_PROMPT_BYTES + 1)), r"1,048,577 bytes, and at most 1,048,576"),
        (dict(texts=["a", "b"], prefix=["c"]), "prefix must be one text or one for each of 2"),
        (dict(texts="a", prefix=[3]), r"prefix\[0\] must be str or bytes"),
        (dict(texts="a", draws=3), "draws must be even"),
        (dict(texts="a", draws=0.5), "draws must be a whole number"),
        (dict(texts="a", samples=-1), "samples must be a whole number of at least 0, got -1"),
        (dict(texts="a", seed="x"), "seed must be a whole number"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(mixture, arguments, match):
    with pytest.raises(ValueError, match=match) as error:
        mixture.score(**arguments)
    assert "\n" not in str(error.value)


def test_weights_gone_bad_are_named_instead_of_a_score():
    broken = tiny_pipeline()
    torch.nn.init.constant_(broken.autoencoder.outputs.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        score_of(broken, "a")


def test_importance_weights_need_a_mixture():
    with pytest.raises(ValueError, match="importance weights need"):
        tiny_pipeline(**KINDS["carried"]).score("a", samples=2)
