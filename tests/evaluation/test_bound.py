"""The bound over a corpus: known answers, the same for any layout, and a standard error that is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hldm.chunking.chunker import make_chunker
from hldm.config import (
    AutoencoderConfig,
    ChunkingConfig,
    DiffusionConfig,
    GriffinConfig,
    HierarchyConfig,
    PriorConfig,
)
from hldm.evaluation.bound import evaluate_bound
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import end_term
from hldm.model.prior import Prior
from hldm.text.corpus import Corpus, make_corpus
from hldm.text.windows import Windows

GRIFFIN = GriffinConfig(width=32, blocks=("recurrent", "attention"), heads=2)
DIFFUSION = DiffusionConfig()


def make_model(
    latent_dim: int = 4,
    carry_state: bool = False,
    reads_text: bool = False,
    components: int = 0,
    gamma_0: float = DIFFUSION.gamma_0,
):
    torch.manual_seed(0)
    settings = AutoencoderConfig(
        latent_dim=latent_dim,
        encoder=GRIFFIN,
        decoder=GRIFFIN,
        carry_state=carry_state,
        reads_text=reads_text,
        components=components,
        trunk_layers=int(components > 0),
        trunk_width=16,
    )
    autoencoder = Autoencoder.from_settings(settings, ChunkingConfig()).eval()
    if not latent_dim:
        return autoencoder, None
    small = PriorConfig(reads_text=reads_text, width=32, layers=1, heads=2, denoiser_layers=1)
    prior = Prior.from_settings(
        settings, small, HierarchyConfig(levels=1), DiffusionConfig(gamma_0=gamma_0)
    ).eval()
    return autoencoder, prior


def make_text(documents: int = 6, words: int = 60) -> Corpus:
    rng = np.random.default_rng(0)
    vocabulary = ["sun", "naïve", "river", "of", "stone", "and", "unquestionably", "日本", "light"]
    return make_corpus("words", (" ".join(rng.choice(vocabulary, words)).encode() for _ in range(documents)))


def lay_out(corpus: Corpus, lanes: int = 4, window_bytes: int = 128) -> Windows:
    return Windows(
        corpus, make_chunker(ChunkingConfig()), lanes=lanes, window_bytes=window_bytes, shuffle=False
    )


def bound_of(model, windows, seed=0, draws=16):
    return evaluate_bound(*model, windows, draws=draws, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("latent_dim", [0, 4])
def test_a_uniform_decoder_pays_log2_258_for_every_byte_and_every_end(latent_dim):
    model = make_model(latent_dim)
    torch.nn.init.zeros_(model[0].outputs.weight)
    windows = lay_out(make_text())
    ends = windows.chunks if latent_dim else len(windows.corpus)
    expected = (len(windows.corpus.text) + ends) * math.log2(258) / windows.characters
    assert bound_of(model, windows).bits_per_character()["decoder"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("lanes", "window_bytes"), [(1, 64), (4, 256), (6, 4096)])
def test_the_twin_costs_the_same_however_the_text_is_laid_out(lanes, window_bytes):
    model = make_model(latent_dim=0)
    expected = bound_of(model, lay_out(make_text(), 3, 100))
    bound = bound_of(model, lay_out(make_text(), lanes, window_bytes))
    np.testing.assert_allclose(bound.nats, expected.nats, rtol=1e-5)
    bits = bound.bits_per_character()
    assert bits["standard_error"] == bits["latent"] == bits["end"] == 0
    assert bits["bound"] == bits["decoder"]


@pytest.mark.parametrize(
    "kind",
    [
        dict(),
        dict(carry_state=True),
        dict(reads_text=True),
        dict(components=8),
    ],
)
def test_the_latent_model_costs_the_same_however_the_text_is_laid_out_but_for_its_noise(kind):
    model = make_model(**kind)
    one, other = (bound_of(model, lay_out(make_text(4, 30), *layout)) for layout in [(1, 64), (4, 256)])
    np.testing.assert_allclose(one.end, other.end, rtol=1e-5)  # a function of mu alone
    noise = math.sqrt(one.variance + other.variance)
    assert abs(one.nats.sum() - other.nats.sum()) < 4 * noise
    assert noise < 0.02 * one.nats.sum()


def test_the_denoiser_that_expects_standard_normal_latents_costs_their_divergence_from_it():
    """With x0_hat = alpha z, as a prior begins, latent and end terms telescope to KL(q(z_0) || N(0, I))."""
    autoencoder, prior = model = make_model()
    windows = lay_out(make_text(), lanes=1, window_bytes=10_000)
    with torch.no_grad():
        encoding, _ = autoencoder.encode(windows.batch(0), autoencoder.encoder_state(1))
    expected = float(end_term(encoding.latents, DIFFUSION.gamma_0).sum())
    bounds = [bound_of(model, windows, seed) for seed in range(4)]
    paid = np.array([bound.latent.sum() + bound.end.sum() for bound in bounds])
    noise = math.sqrt(bounds[0].variance / len(bounds))
    assert abs(paid.mean() - expected) < 4 * noise
    assert noise < 0.02 * expected


def test_a_constant_latent_that_the_prior_knows_costs_nothing(monkeypatch):
    autoencoder, prior = model = make_model()
    monkeypatch.setattr(prior, "denoise", lambda z, gamma, told: torch.zeros_like(z))
    for part in (autoencoder.to_latent.outer, autoencoder.from_latent.outer):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    windows = lay_out(make_text())
    bound = bound_of(model, windows)
    assert bound.latent.sum() == 0
    a = 1 / (1 + math.exp(DIFFUSION.gamma_1))  # alpha_1^2, and sigma_1^2 = 1 - a
    assert bound.end.sum() == pytest.approx(windows.chunks * 4 * 0.5 * (-a - math.log1p(-a)), rel=1e-3)
    assert bound.variance == pytest.approx(0, abs=1e-6)  # and a deaf decoder reads no noise


@pytest.mark.parametrize("carry_state", [False, True])
def test_the_standard_error_is_the_spread_of_repeated_estimates(carry_state):
    model = make_model(carry_state=carry_state)
    windows = lay_out(make_text(2, 20), lanes=2, window_bytes=128)
    bits = [bound_of(model, windows, seed, draws=4).bits_per_character() for seed in range(40)]
    spread = np.std([b["bound"] for b in bits], ddof=1)
    claimed = math.sqrt(np.mean([b["standard_error"] ** 2 for b in bits]))
    assert 0.65 < claimed / spread < 1.5  # a standard deviation of 40 is known to 11 %


def test_the_text_error_of_equally_long_documents_is_that_of_their_mean():
    rng = np.random.default_rng(0)
    corpus = make_corpus("equal", (rng.choice([*b"abc "], 200).astype(np.uint8).tobytes() for _ in range(6)))
    bound = bound_of(make_model(latent_dim=0), lay_out(corpus))
    bits = bound.nats / bound.characters / math.log(2)
    assert len(set(bound.characters)) == 1
    expected = np.std(bits, ddof=1) / math.sqrt(len(bits))
    assert bound.bits_per_character()["standard_error_text"] == pytest.approx(expected)
    assert bound_of(make_model(0), lay_out(make_text(1))).bits_per_character()["standard_error_text"] is None


def importance_of(model, windows, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return evaluate_bound(*model, windows, draws=2, samples=samples, generator=generator).importance.sum()


def test_one_importance_weighted_draw_is_the_bound_under_the_mixture_and_more_are_tighter():
    model = make_model(components=8, reads_text=True)
    windows = lay_out(make_text(4, 30))
    bound = bound_of(model, windows, draws=16)  # of a prior that has learnt nothing: the mixture alone
    ones = np.array([importance_of(model, windows, 1, seed) for seed in range(8)])
    error = math.sqrt(ones.var(ddof=1) / len(ones) + bound.variance)
    assert abs(ones.mean() - bound.nats.sum()) < 4 * error
    assert error < 0.01 * bound.nats.sum()
    tighter = [importance_of(model, windows, samples) for samples in (1, 4, 16)]
    assert tighter[0] > tighter[1] > tighter[2]


def test_importance_weights_find_the_likelihood_where_it_is_known():
    """A decoder deaf to its latent gives every text the same probability whatever the latent costs."""
    model = make_model(components=8, latent_dim=2, gamma_0=0.0)
    for parameter in model[0].from_latent.outer.parameters():
        torch.nn.init.zeros_(parameter)
    windows = lay_out(make_text(4, 30))
    decoder = bound_of(model, windows, draws=2).decoder.sum()
    loose, tight = (importance_of(model, windows, samples) - decoder for samples in (1, 64))
    assert loose > 0.003 * decoder
    assert abs(tight) < 0.1 * loose


def test_what_is_no_bound_is_refused():
    autoencoder, prior = make_model()
    windows = lay_out(make_text(1))
    shuffled = Windows(make_text(1), make_chunker(ChunkingConfig()), lanes=1, window_bytes=64, shuffle=True)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="draws must be even"):
        evaluate_bound(autoencoder, prior, windows, draws=3, generator=generator)
    with pytest.raises(ValueError, match="shuffle=False"):
        evaluate_bound(autoencoder, prior, shuffled, generator=generator)
    with pytest.raises(ValueError, match="belongs to an autoencoder with latents"):
        evaluate_bound(autoencoder, None, windows, generator=generator)
    with pytest.raises(ValueError, match="importance weights need"):
        evaluate_bound(autoencoder, prior, windows, samples=4, generator=generator)
    with pytest.raises(ValueError, match="eval"):
        evaluate_bound(autoencoder.train(), prior, windows, generator=generator)
