import pytest
import torch

from hldm.config import DiffusionConfig, HierarchyConfig, PriorConfig, to_dict
from hldm.model.prior import Prior
from hldm.model.state import named_tensors

SETTINGS = PriorConfig(reads_text=False, width=16, layers=2, heads=2, denoiser_layers=2)
HIERARCHY = HierarchyConfig(levels=2, ratio=2, window=3)


def make_prior(latent_dim: int = 3) -> Prior:
    torch.manual_seed(0)
    prior = (
        Prior(latent_dim, to_dict(SETTINGS), to_dict(HIERARCHY), to_dict(DiffusionConfig())).double().eval()
    )
    for parameter in prior.parameters():  # nothing may hide behind a zero initialisation
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return prior


def make_text(chunks: int = 21) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents of two lanes: one with a document border inside, one that ends early."""
    latents = torch.randn(2, chunks, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    doc_start = torch.zeros(2, chunks, dtype=torch.bool)
    doc_start[:, 0] = True
    doc_start[0, 8] = True
    mask = torch.ones(2, chunks, dtype=torch.bool)
    mask[1, chunks - 4 :] = False
    return latents, mask, doc_start


def double_state(prior: Prior, rows: int):
    state = prior.initial_state(rows)
    wide = {name: tensor.double() for name, tensor in named_tensors(state) if tensor.is_floating_point()}
    return state._replace(
        hidden=wide["carry.hidden"], partial=wide["carry.partial"], latest=wide["carry.latest"]
    )


def attended(prior: Prior, context) -> torch.Tensor:
    """What the denoiser makes of a context: (b n z)."""
    b, n = context.summary.shape[:2]
    z = torch.ones(b, n, 1, 3, dtype=torch.float64)
    return prior.denoise(z, torch.zeros(b, n, 1, dtype=torch.float64), prior.condition(context))[:, :, 0]


@pytest.mark.parametrize("cuts", [[1] * 21, [8, 13], [3, 0, 11, 7]])
def test_the_mask_of_training_and_the_state_of_generation_are_the_same_thing(cuts):
    prior = make_prior()
    latents, mask, doc_start = make_text()
    whole, _ = prior.contextualiser(latents, mask, doc_start, double_state(prior, 2))
    expected = attended(prior, whole)
    state, at, found = double_state(prior, 2), 0, []
    for cut in cuts:
        part = slice(at, at + cut)
        context, state = prior.contextualiser(latents[:, part], mask[:, part], doc_start[:, part], state)
        found.append(attended(prior, context)[:, :cut])
        at += cut
    found = torch.cat(found, dim=1)
    torch.testing.assert_close(found[mask], expected[:, :-1][mask])
    # and the context of what follows is that of the whole text, padding or not
    after = context.of(mask[:, part].sum(dim=1, keepdim=True))
    torch.testing.assert_close(attended(prior, after)[0, 0], expected[0, 21])
    following, _ = prior.contextualiser(latents[:, :0], mask[:, :0], doc_start[:, :0], state)
    torch.testing.assert_close(attended(prior, following)[:, 0], attended(prior, after)[:, 0])


def test_context_knows_the_chunks_before_in_its_document_and_nothing_else():
    prior = make_prior()
    latents, mask, doc_start = make_text()
    latents.requires_grad_(True)
    context, _ = prior.contextualiser(latents, mask, doc_start, double_state(prior, 2))
    out = attended(prior, context)
    for chunk, first in ((5, 0), (8, 8), (9, 8), (20, 8)):
        (grad,) = torch.autograd.grad(out[0, chunk].sum(), latents, retain_graph=True)
        touched = (grad.abs().sum(dim=-1) > 1e-12).nonzero().tolist()  # block sums cancel to rounding
        assert touched == [[0, i] for i in range(first, chunk)]


def test_hidden_context_is_the_same_for_every_text():
    prior = make_prior()
    latents, mask, doc_start = make_text()
    hidden = torch.ones(2, 22, dtype=torch.bool)
    outs = []
    for text in (latents, -latents):
        context, _ = prior.contextualiser(text, mask, doc_start, double_state(prior, 2))
        outs.append(attended(prior, prior.hide(context, hidden)))
    torch.testing.assert_close(outs[0], outs[1])


def test_draws_that_share_a_context_do_not_see_each_other():
    prior = make_prior()
    latents, mask, doc_start = make_text()
    context, _ = prior.contextualiser(latents, mask, doc_start, double_state(prior, 2))
    z = torch.randn(2, 22, 4, 3, dtype=torch.float64)
    gamma = torch.randn(2, 22, 4, dtype=torch.float64)
    conditioning = prior.condition(context)
    together = prior.denoise(z, gamma, conditioning)
    alone = torch.cat([prior.denoise(z[:, :, [i]], gamma[:, :, [i]], conditioning) for i in range(4)], dim=2)
    torch.testing.assert_close(together, alone)


def test_an_untrained_prior_of_zero_latents_pays_what_the_formula_says():
    # F starts at 0 and v = alpha eps - sigma x0: x0_hat = alpha z, so with x0 = 0 the error is alpha sigma eps
    torch.manual_seed(0)
    diffusion = DiffusionConfig(gamma_0=-2.0)
    prior = Prior(3, to_dict(SETTINGS), to_dict(HIERARCHY), to_dict(diffusion)).double().eval()
    chunks, draws = 4, 2_000
    latents = torch.zeros(1, chunks, 3, dtype=torch.float64)
    mask = torch.ones(1, chunks, dtype=torch.bool)
    context, _ = prior.contextualiser(latents, mask, mask & False, double_state(prior, 1))
    u = (torch.arange(draws, dtype=torch.float64) + 0.5).expand(1, chunks, draws) / draws
    noise = torch.randn(1, chunks, draws, 3, dtype=torch.float64)
    latent = prior.latent_term(latents, mask, context.first(chunks), u, noise)
    # 1/2 integral of e^-gamma alpha^2 sigma^2 = 1/2 integral of sigmoid(-gamma)^2, over 3 dimensions
    gamma = torch.linspace(-2, 5, 10_001, dtype=torch.float64)
    expected = 1.5 * torch.trapezoid(torch.sigmoid(-gamma) ** 2, gamma)
    torch.testing.assert_close(latent, expected.expand(1, chunks), rtol=0.1, atol=0)
