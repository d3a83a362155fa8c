"""Parts whose worth is known: useless, exact, or right about something that can be counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_bound import bound_of, lay_out, make_model, make_text
from torch import nn

from hldm.config import (
    AutoencoderConfig,
    ChunkingConfig,
    DiffusionConfig,
    GriffinConfig,
    HierarchyConfig,
    PriorConfig,
)
from hldm.evaluation.parts import NEAREST, hidden_rows, measure, parts_in
from hldm.model.autoencoder import BYTE_FLOOR, Autoencoder
from hldm.model.diffusion import end_term
from hldm.model.hierarchy import level_starts
from hldm.model.prior import Prior

GRIFFIN = GriffinConfig(width=16, blocks=("recurrent",), heads=2)
LATENT_DIM = 2
PYRAMID = HierarchyConfig(levels=2, ratio=2, window=4)  # levels that short documents reach


class ToyAutoencoder(Autoencoder):
    """Latents that are all ones; a decoder that knows its text if it has a latent and nothing if not."""

    def encode(self, window, state):
        encoding, state = super().encode(window, state)
        return encoding._replace(latents=torch.ones_like(encoding.latents) * encoding.mask[..., None]), state

    def decode(self, events, latent, griffin, conditioning=None):
        has_latent = latent.mean(dim=-1).gather(1, events.chunk) > 0.5
        certain = 100.0 * nn.functional.one_hot(events.target, 258)
        return certain * has_latent[..., None], griffin


class KnowsIf(nn.Module):
    """A denoiser that finds ones where the context satisfies a condition, and corrects nothing elsewhere."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def read(self, context):
        return (self.condition(context),)  # (b n)

    def forward(self, z, gamma, conditioning, estimate):
        (knows,) = conditioning
        sigma = torch.sigmoid(gamma).sqrt()[..., None]
        return (1 - estimate) / sigma * knows[..., None, None]


def sees_level(level):
    return lambda context: (context.visible & (context.level == level)[:, None]).any(dim=-1)


def sees_far(context):
    far = (context.level > 0)[:, None] | (context.distance >= NEAREST)
    is_start = torch.arange(context.visible.shape[-1]) == 0
    return (context.visible & far & ~is_start).any(dim=-1)


def always(context):
    return torch.ones_like(context.visible[..., 0])


def make_toy(condition, components: int = 1, gamma_0: float = -2.0):
    torch.manual_seed(0)
    settings = AutoencoderConfig(
        latent_dim=LATENT_DIM,
        encoder=GRIFFIN,
        decoder=GRIFFIN,
        components=components,
        trunk_layers=1,
        trunk_width=8,
    )
    diffusion = DiffusionConfig(gamma_0=gamma_0)
    autoencoder = ToyAutoencoder.from_settings(settings, ChunkingConfig(), gamma_0).eval()
    small = PriorConfig(width=16, layers=1, heads=2, denoiser_layers=1)
    prior = Prior.from_settings(settings, small, PYRAMID, diffusion).eval()
    prior.denoiser = KnowsIf(condition)
    nn.init.zeros_(prior.mixture.prototypes)
    nn.init.zeros_(prior.mixture.log_deviation)  # one prototype: a standard normal
    return autoencoder, prior


def table_of(model, windows, draws=16, only=None):
    parts = [part for part in parts_in(*model) if only is None or part.name in only]
    costs = measure(*model, windows, parts, draws=draws, seed=0)
    return {name: row["hidden"] for name, row in hidden_rows(costs, parts).items()}


def bits_of_knowing(gamma_0: float) -> float:
    """KL(q(z_0 | x) || N(0, I)) less the end term, in bits: what the mixture alone pays for a latent of ones."""
    mu = torch.ones(LATENT_DIM, dtype=torch.float64)
    return float(end_term(mu, gamma_0) - end_term(mu, DiffusionConfig().gamma_1)) / math.log(2)


def positions(windows) -> np.ndarray:
    """Chunks of its document before each chunk of a corpus."""
    start = np.flatnonzero(windows.chunk_start)
    document = np.searchsorted(windows.corpus.offsets, start, side="right") - 1
    return np.arange(len(start)) - np.searchsorted(document, document)


def test_an_exact_denoiser_is_worth_what_the_mixture_pays():
    windows = lay_out(make_text())
    rows = table_of(make_toy(always), windows)
    expected = bits_of_knowing(-2.0) * windows.chunks / windows.characters
    for name in ("denoiser", "diffusion"):  # the path and the density cost the same
        assert abs(rows[name]["bits"] - expected) < 4 * rows[name]["standard_error"]
        assert rows[name]["standard_error"] < 0.05 * expected
    for name, row in rows.items():  # it needs nothing to know that
        if name not in ("denoiser", "diffusion"):
            assert row["latent"] == 0, name


def test_a_denoiser_that_corrects_nothing_is_worth_nothing_and_so_is_its_context():
    model = make_toy(lambda context: ~always(context))
    rows = table_of(model, lay_out(make_text()))
    assert rows["denoiser"] == {"bits": 0, "standard_error": 0, "latent": 0, "decoder": 0}
    assert {rows[name]["bits"] for name in ("context", "level-1", "level-2", "far", "everything")} == {0}
    assert abs(rows["diffusion"]["bits"]) < 4 * rows["diffusion"]["standard_error"]


@pytest.mark.parametrize("level", [1, 2])
def test_the_level_that_the_denoiser_reads_is_worth_it_and_the_others_nothing(level):
    windows = lay_out(make_text())
    rows = table_of(make_toy(sees_level(level)), windows)
    starts = level_starts(torch.from_numpy(positions(windows)), PYRAMID)  # (chunks levels+1)
    knows = starts[:, level - 1] > starts[:, level]  # an entry of that level stands between the two
    expected = bits_of_knowing(-2.0) * float(knows.sum()) / windows.characters
    assert 0 < knows.float().mean() < 1
    for name in (f"level-{level}", "far", "context", "denoiser", "everything"):
        assert abs(rows[name]["bits"] - expected) < 4 * rows[name]["standard_error"], name
    assert rows[f"level-{3 - level}"]["bits"] == rows["entry-latents"]["bits"] == 0


def test_what_reads_far_chunks_misses_them():
    windows = lay_out(make_text())
    rows = table_of(make_toy(sees_far), windows, only=("far",))
    knows = positions(windows) > NEAREST
    expected = bits_of_knowing(-2.0) * knows.sum() / windows.characters
    assert abs(rows["far"]["bits"] - expected) < 4 * rows["far"]["standard_error"]


def test_text_that_says_which_of_two_prototypes_is_worth_one_bit_a_chunk():
    """Weights are certain given features and equal without: one bit, where prototypes lie far apart."""
    autoencoder, prior = make_toy(lambda context: ~always(context), components=2, gamma_0=-8.0)
    prior.mixture.prototypes.data = torch.tensor([[1.0], [-1.0]]).expand(2, LATENT_DIM).clone()
    prior.mixture.log_deviation.data.fill_(-4.0)
    prior.mixture.logit_cap = 0.0

    class Weigh(
        nn.Module
    ):  # the first prototype if there is a feature, as there is but at a document's start
        def forward(self, feature):
            says = (feature.abs().sum(dim=-1, keepdim=True) > 0).float()
            return torch.cat([100 * says, torch.zeros_like(says)], dim=-1)

    prior.mixture.weigh = Weigh()
    windows = lay_out(make_text())
    rows = table_of(
        (autoencoder, prior), windows, draws=64, only=("text", "prior-text", "everything", "trunk")
    )
    informed = windows.chunks - len(windows.corpus)
    for name in ("text", "prior-text", "everything"):
        expected = informed / windows.characters  # less the 1 % that noise at gamma_1 has not hidden yet
        assert abs(rows[name]["bits"] - expected) < 4 * rows[name]["standard_error"] + 0.01 * expected
        assert rows[name]["standard_error"] < 0.06 * expected
    assert rows["trunk"]["bits"] == 0  # the last chunk says as much


def test_a_latent_that_says_all_is_worth_all_of_the_symbols():
    windows = lay_out(make_text())
    rows = table_of(make_toy(always, gamma_0=-8.0), windows, draws=2)
    symbols = len(windows.corpus.text) + windows.chunks
    sure = math.log2(1 - BYTE_FLOOR + BYTE_FLOOR / 258)
    expected = symbols * (math.log2(258) + sure) / windows.characters
    assert rows["latent"]["bits"] == rows["latent"]["decoder"] == pytest.approx(expected, rel=1e-5)
    assert rows["latent-shuffled"]["bits"] == rows["bytes"]["bits"] == 0  # all latents say the same


@pytest.mark.parametrize("kind", [dict(), dict(carry_state=True), dict(reads_text=True, components=8)])
def test_the_whole_costs_what_the_bound_says(kind):
    model, windows = make_model(**kind), lay_out(make_text())
    costs = measure(*model, windows, [], draws=16, seed=0)
    bound = bound_of(model, windows)
    assert costs.whole[1].sum() == pytest.approx(bound.decoder.sum(), rel=0.01)
    assert costs.whole.sum() == pytest.approx(bound.nats.sum(), abs=5 * math.sqrt(2 * bound.variance))
    assert costs.clusters.characters.sum() == windows.characters


def test_hiding_leaves_the_model_as_it_was():
    model, windows = make_model(reads_text=True, components=8), lay_out(make_text())
    before = {name: value.clone() for part in model for name, value in part.state_dict().items()}
    parts = parts_in(*model)
    once, again = (measure(*model, windows, parts, draws=2, seed=1) for _ in range(2))
    np.testing.assert_array_equal(once.whole, again.whole)
    for name, value in once.without.items():
        np.testing.assert_array_equal(value, again.without[name])
    assert all(torch.equal(before[name], v) for part in model for name, v in part.state_dict().items())
