"""Two towers over latents: a causal contextualiser and a denoiser of the next latent.

The contextualiser (`hldm.model.contextualiser`) runs once per chunk, the denoiser (`hldm.model.denoiser`) once per
noise draw, so several draws share the expensive part. Two-tower diffusion over latents of text follows the Large
Concept Model (arXiv 2412.08821). Knows latents, and if `reads_text` the encoder's features beside them, never bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hldm.config import (
    AutoencoderConfig,
    DiffusionConfig,
    HierarchyConfig,
    PriorConfig,
    section_from_dict,
    to_dict,
)
from hldm.model.contextualiser import Context, Contextualiser
from hldm.model.denoiser import Conditioning
from hldm.model.diffusion import (
    Schedule,
    alpha_sigma,
    bound_integrand,
    diffuse,
    end_term,
    stratified,
    x0_from,
)
from hldm.model.mixture import LOGIT_CAP, MixturePredictor
from hldm.model.own_denoiser import make_denoiser
from hldm.model.state import ContextState, Encoding
from hldm.runs.saved_model import SavedModel
from hldm.text.windows import Batch, draw_normal, draw_uniform

DRAWS = 4  # of noise in training, which share one context: cheap beside it
CONTEXT_DROPOUT = 0.1  # share of contexts hidden in training, for guidance (arXiv 2207.12598)


class Prior(SavedModel):
    """p(next latent | latents before): contextualiser, denoiser and noise schedule."""

    @register_to_config
    def __init__(
        self,
        latent_dim: int,
        prior: dict,
        hierarchy: dict,
        diffusion: dict,
        feature_dim: int = 0,
        components: int = 0,
        autoencoder: str = "",
        logit_cap: float = 0.0,
        code: str = "",
    ):
        """feature_dim: width of the summary before a chunk, if anything here reads text;

        components, logit_cap: of the mixture that the denoiser corrects, 0 components for none;
        autoencoder: fingerprint of the weights whose latents these are; '' while both train.
        code: of the user's own parts it was trained with (hldm.generation.own_prior); '' for none
        """
        super().__init__()
        self.settings = section_from_dict(PriorConfig, prior)
        self.hierarchy = section_from_dict(HierarchyConfig, hierarchy)
        self.diffusion = section_from_dict(DiffusionConfig, diffusion)
        self.latent_dim = latent_dim
        self.contextualiser = Contextualiser(self.settings, self.hierarchy, latent_dim, feature_dim)
        self.denoiser = make_denoiser(self.settings, self.hierarchy, latent_dim)
        self.mixture = (
            MixturePredictor(feature_dim, latent_dim, components, logit_cap) if components else None
        )
        self.schedule = Schedule(self.diffusion)
        self.nothing = nn.Parameter(torch.zeros(self.settings.width))  # the context, when it is hidden
        self.build()

    def build(self) -> None:
        """Add what a subclass has beside this (`prior.plugin`)."""

    @classmethod
    def from_settings(
        cls,
        autoencoder: AutoencoderConfig,
        prior: PriorConfig,
        hierarchy: HierarchyConfig,
        diffusion: DiffusionConfig,
        logit_cap: float = LOGIT_CAP,
    ) -> Prior:
        """Build from config sections."""
        components = autoencoder.components
        feature_dim = autoencoder.known_width if prior.reads_text or components else 0
        sections = (to_dict(prior), to_dict(hierarchy), to_dict(diffusion))
        return cls(autoencoder.latent_dim, *sections, feature_dim, components, logit_cap=logit_cap)

    def initial_state(self, batch: int, device: torch.device | None = None) -> ContextState:
        """State at the start of a document."""
        return self.contextualiser.initial_state(batch, device)

    def hide(self, context: Context, hidden: Tensor) -> Context:
        """Replace the context of some chunks by nothing: only the document start stays visible.

        hidden: (b n) bool.
        """
        summary = torch.where(hidden[..., None], self.nothing, context.summary)
        shown = context.visible & ~hidden[..., None]
        shown[:, :, 0] = True
        feature = context.feature * ~hidden[..., None]
        return context._replace(summary=summary, visible=shown, feature=feature)

    def condition(self, context: Context) -> Conditioning:
        """The part of `denoise` that does not depend on the noise."""
        log_weights = None
        if self.mixture is not None:
            log_weights = self.mixture.log_weights(context.feature)[:, :, None]
        return Conditioning(log_weights, self.denoiser.read(context))

    def denoise(self, z: Tensor, gamma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0_hat(z_gamma, gamma, context). z: (b n m z); gamma: (b n m).

        conditioning: `condition` of the context, once for all draws and steps.
        With a mixture: its own estimate, corrected by sigma times what the network says.
        """
        if self.mixture is not None and conditioning.log_weights is not None:
            estimate = self.mixture.denoise(z, gamma, conditioning.log_weights)
            _, sigma = alpha_sigma(gamma.unsqueeze(-1))
            return estimate + sigma * self.denoiser(z, gamma, conditioning.blocks, estimate)
        prediction = self.denoiser(z, gamma, conditioning.blocks, torch.zeros_like(z))
        return x0_from(prediction, z, gamma)

    def spread(
        self, z: Tensor, gamma: Tensor, conditioning: Conditioning, u: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """How a draw of x0 varies around `denoise`: as the mixture's, which the network shifts as a whole.

        z, result: (b z); gamma, u: (b); conditioning: of one chunk a row. See `MixturePredictor.spread`.
        """
        assert self.mixture is not None and conditioning.log_weights is not None
        return self.mixture.spread(z, gamma, conditioning.log_weights[:, 0, 0], u, temperature)

    def estimate(self, x0: Tensor, gamma: Tensor, noise: Tensor, context: Context) -> Tensor:
        """x0_hat from x0 made noisy. x0, noise and result: (b n m z); gamma: (b n m)."""
        return self.denoise(diffuse(x0, gamma, noise), gamma, self.condition(context))

    def latent_term(
        self, latents: Tensor, mask: Tensor, context: Context, u: Tensor, noise: Tensor
    ) -> Tensor:
        """The diffusion term of the bound, 1/2 E_gamma[(d gamma/du) e^-gamma ||x0 - x0_hat||^2].

        Continuous time (VDM, arXiv 2107.00630, equation 15), an unbiased estimate from m draws.
        latents: (b n z) x0; mask: (b n); u: (b n m) stratified in [0, 1); noise: (b n m z).
        Returns nats per chunk, summed over dimensions, the mean over the draws (b n).
        """
        gamma = self.schedule.gamma(u)
        x0 = latents[:, :, None].expand_as(noise)
        x0_hat = self.estimate(x0, gamma, noise, context)
        terms = bound_integrand(x0, x0_hat, gamma) / self.schedule.density(gamma)  # (b n m)
        if self.training:
            squared_error = (x0 - x0_hat).detach().square().sum(dim=-1)
            self.schedule.observe(gamma[mask], squared_error[mask])
        return terms.mean(dim=-1)


class Payment(NamedTuple):
    """What the latents of a window cost under a prior, nats per chunk."""

    latent: Tensor  # (b n)
    end: Tensor  # (b n)


def price_latents(
    prior: Prior,
    encoding: Encoding,
    context: Context,
    batch: Batch,
    generator: torch.Generator,
    draws: int | None = None,
    hide: bool = False,
) -> Payment:
    """The latent and end terms of the bound, from `draws` stratified noise levels a chunk.

    hide: training's context dropout, for guidance.
    """
    b, n, z = encoding.latents.shape
    m = draws or DRAWS
    u = stratified(m, draw_uniform(batch, (n,), generator))
    noise = draw_normal(batch, (n, m, z), generator)
    context = context.first(n)
    if hide:
        hidden = draw_uniform(batch, (n,), generator) < CONTEXT_DROPOUT
        context = prior.hide(context, hidden)
    latent = prior.latent_term(encoding.latents, encoding.mask, context, u, noise)
    end = end_term(encoding.latents, prior.diffusion.gamma_1)
    return Payment(latent * encoding.mask, end * encoding.mask)
