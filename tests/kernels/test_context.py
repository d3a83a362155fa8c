"""A chunk's context in one call of C++ is the contextualiser's, chunk after chunk, and so is what is made of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hldm.config import (
    AutoencoderConfig,
    DiffusionConfig,
    GriffinConfig,
    HierarchyConfig,
    PriorConfig,
    changed,
)
from hldm.generation.footprint import kept_bytes
from hldm.kernels.context import KeptContext
from hldm.model.mixture import MixturePredictor
from hldm.model.prior import Prior
from hldm.model.state import select_rows

Z, CHUNKS = 3, 90


def make_prior(
    levels: int = 2, reads_text: bool = True, components: int = 20, cap: float = 0, **settings
) -> Prior:
    """Every parameter away from 0; with two levels the coarsest lets go of its first entries after 30 chunks."""
    torch.manual_seed(0)
    griffin = GriffinConfig(width=24, blocks=("recurrent",), heads=2)
    autoencoder = AutoencoderConfig(
        latent_dim=Z,
        encoder=griffin,
        decoder=griffin,
        reads_text=reads_text,
        trunk_layers=0,
        components=components,
    )
    config = PriorConfig(reads_text=reads_text, width=16, layers=1, heads=2, denoiser_layers=2)
    prior = Prior.from_settings(
        autoencoder,
        changed(config, **settings),
        HierarchyConfig(levels=levels, ratio=2, window=2),
        DiffusionConfig(gamma_0=-2.0),
    )
    if cap:
        prior.mixture = MixturePredictor(griffin.width, Z, components, logit_cap=cap)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior.eval()


def seen(conditioning) -> list[Tensor]:
    """The conditioning, whatever the order of entries: mean and spread of attention to them for a few queries."""
    found = [] if conditioning.log_weights is None else [conditioning.log_weights]
    for block in conditioning.blocks:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(*block.key.shape[:2], 5, block.key.shape[-1], generator=generator)
        share = (query @ block.key.mT + block.bias).softmax(dim=-1)
        found += [block.shared, block.gates, share @ block.value, (share.square()).sum(-1)]
        found.append(block.bias.isfinite().sum(-1))
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (3, dict(levels=0)),
        (3, dict(levels=1, layers=2)),
        *((rows, dict()) for rows in (1, 3, 64)),
        (3, dict(cap=0.5)),
        *((rows, dict(levels=3, layers=2, components=0)) for rows in (1, 3, 64)),
        (3, dict(levels=3, reads_text=False)),
        (3, dict(levels=1, reads_text=False, components=0, denoiser_layers=1)),
    ],
)
def test_every_chunk_of_many_has_the_context_that_torch_gives_it(plain_torch, rows, kind):
    prior = make_prior(**kind)
    contextualiser, generator = prior.contextualiser, torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    f, always = contextualiser.feature_dim, torch.ones(rows, 1, dtype=torch.bool)
    state = prior.initial_state(rows)
    _, state = contextualiser(
        draw(rows, 5, Z), always.expand(-1, 5), ~always.expand(-1, 5), state, draw(rows, 5, f)
    )
    kept = KeptContext(prior, state)
    nothing, fresh = torch.zeros(rows, 0, dtype=torch.bool), prior.initial_state(rows)
    for _ in range(CHUNKS if rows < 64 else CHUNKS // 2):
        latents, after = draw(rows, 1, Z), draw(rows, 1, f)
        closed = torch.rand(rows, generator=generator) < 0.02
        with plain_torch():
            _, state = contextualiser(latents, always, ~always, state, after)
            state = select_rows(closed, fresh, state)
            context, _ = contextualiser(latents[:, :0], nothing, nothing, state)
            expected = seen(prior.condition(context.first(1)))
        found = seen(kept.add(latents[:, 0], after[:, 0], closed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_was_passed_in_is_left_alone(plain_torch):
    prior = make_prior()
    state, (latents, after) = prior.initial_state(2), torch.randn(2, 2, 24)
    before = [part.clone() for part in (*state.entries, state.hidden, state.written, state.partial)]
    kept = KeptContext(prior, state)
    for _ in range(9):
        kept.add(latents[:, :Z], after, torch.tensor([False, False]))
    after = [*state.entries, state.hidden, state.written, state.partial]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@torch.no_grad()
def test_what_is_kept_takes_the_memory_that_the_footprint_says(plain_torch):
    prior = make_prior(levels=3, layers=2)
    kept = KeptContext(prior, prior.initial_state(5))._call
    tensors = [kept.kept["level"], kept.kept["end"], *kept.kept["pairs"]]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 5 * kept_bytes(prior)
