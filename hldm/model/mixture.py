"""A mixture that predicts the next latent from the text before it: light enough to train beside an encoder.

    p(mu | h) = sum_k w_k(h) N(mu; m_k, diag s^2),   z_gamma = alpha mu + sigma eps

Only the weights depend on the text, as a softmax over words would: K prototypes m_k are shared. Its
likelihood and its denoiser are both in closed form, and belong together: the diffusion bound under the
exact denoiser of p is KL(q(z_0 | x) || p(z_0 | h)) (both reverse the same noising). So a prior that is built
on this denoiser starts at the rate that stage one ended with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hldm.model.diffusion import alpha_sigma
from hldm.runs.saved_model import SavedModel

# Without it mixtures off the shipped shape put all their weight on one prototype in the first steps, and no gradient
# comes back: at 8 numbers a chunk 3.66 bits a character after 150 steps in place of 2.58 (docs/journal.md).
LOGIT_CAP = 5.0


class MixturePredictor(SavedModel):
    """Weights from a feature of the text (... d), prototypes (k z), one variance a dimension."""

    @register_to_config
    def __init__(
        self,
        feature_dim: int,
        latent_dim: int,
        components: int,
        logit_cap: float = 0.0,
    ):
        """logit_cap: the weights' logits l become c tanh(l / c) (Gemma 2, arXiv 2408.00118); 0 for no cap."""
        super().__init__()
        self.logit_cap = logit_cap
        self.weigh = nn.Sequential(
            nn.LayerNorm(feature_dim),
            nn.Linear(feature_dim, 2 * feature_dim),
            nn.GELU(),
            nn.Linear(2 * feature_dim, components),
        )
        self.prototypes = nn.Parameter(torch.randn(components, latent_dim))  # mu has unit scale
        self.log_deviation = nn.Parameter(torch.full((latent_dim,), math.log(0.5)))

    def log_weights(self, feature: Tensor) -> Tensor:
        """log w_k(h). (... d) -> (... k)."""
        logits = self.weigh(feature).float()
        if self.logit_cap:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return F.log_softmax(logits, dim=-1)

    def joint(self, z: Tensor, gamma: Tensor, log_weights: Tensor) -> Tensor:
        """log w_k + log N(z_gamma; alpha m_k, alpha^2 s^2 + sigma^2). (... z), (...) or (), (... k) -> (... k)."""
        alpha, sigma = (x.unsqueeze(-1) for x in alpha_sigma(gamma))
        variance = alpha.square() * (2 * self.log_deviation).exp() + sigma.square()  # (... z)
        precision = 1 / variance
        # |z - alpha m|^2 / variance, multiplied out: two products with the prototypes, nothing (... k z)
        cross = (alpha * z * precision) @ self.prototypes.T
        square = (alpha.square() * precision) @ self.prototypes.square().T
        own = (z.square() * precision + variance.log() + math.log(2 * math.pi)).sum(-1, keepdim=True)
        return log_weights + cross - 0.5 * (square + own)

    def rate(self, mu: Tensor, noise: Tensor, gamma_0: float, log_weights: Tensor) -> Tensor:
        """KL(q(z_0 | x) || p(z_0 | h)) in nats, an unbiased estimate from one draw. (... z) -> (...)."""
        gamma = torch.tensor(gamma_0, device=mu.device)
        alpha, sigma = alpha_sigma(gamma)
        log_p = self.joint(alpha * mu + sigma * noise, gamma, log_weights).logsumexp(dim=-1)
        # the entropy of q is known: no need to draw it
        entropy = 0.5 * mu.shape[-1] * (1 + math.log(2 * math.pi) - F.softplus(torch.tensor(-gamma_0)))
        return -entropy - log_p

    def sample(
        self,
        gamma: float,
        log_weights: Tensor,
        generators: Sequence[torch.Generator],
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw z_gamma: a component, then its normal. log_weights: (b k), a generator a row. Returns (b z).

        temperature: scales the noise, and sharpens the weights to w^(1 / temperature); 0 takes the likeliest.
        """
        device, z = self.prototypes.device, self.prototypes.shape[1]
        # per row: first its uniform number, then its noise
        drawn = [
            (torch.rand(1, generator=g, dtype=torch.float64), torch.randn(z, generator=g)) for g in generators
        ]
        u, noise = (torch.stack(numbers).to(device) for numbers in zip(*drawn, strict=True))
        chosen = _choose(log_weights, u[:, 0], temperature)
        alpha, sigma = (float(x) for x in alpha_sigma(torch.tensor(gamma, dtype=torch.float64)))
        deviation = (alpha**2 * (2 * self.log_deviation).exp() + sigma**2).sqrt()
        mean = alpha * self.prototypes[chosen]
        return mean + temperature * deviation * noise

    def denoise(self, z: Tensor, gamma: Tensor, log_weights: Tensor) -> Tensor:
        """E[mu | z_gamma] under the mixture. z: (... z); gamma: (...); log_weights: (... k)."""
        alpha, _ = (x.unsqueeze(-1) for x in alpha_sigma(gamma))
        mean = self.joint(z, gamma, log_weights).softmax(dim=-1) @ self.prototypes
        # each component corrects its prototype by the same share of what it misses
        return mean + self._gain(gamma) * (z - alpha * mean)

    def spread(
        self, z: Tensor, gamma: Tensor, log_weights: Tensor, u: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Draw a component of p(mu | z_gamma): its mean less `denoise`, and its variance, the same for all.

        z: (b z); gamma and u: (b), u uniform in [0, 1); log_weights: (b k). Returns (b z) twice.
        temperature: sharpens the components' shares to a power of 1 / temperature, as in `sample`
        """
        joint = self.joint(z, gamma, log_weights)
        mean = joint.softmax(dim=-1) @ self.prototypes
        alpha, _ = (x.unsqueeze(-1) for x in alpha_sigma(gamma))
        left = 1 - alpha * self._gain(gamma)
        chosen = self.prototypes[_choose(joint, u, temperature)]
        return left * (chosen - mean), left * (2 * self.log_deviation).exp()

    def _gain(self, gamma: Tensor) -> Tensor:
        """alpha s^2 / (alpha^2 s^2 + sigma^2), the regression of mu on z_gamma in a component. (...) -> (... z)."""
        alpha, sigma = (x.unsqueeze(-1) for x in alpha_sigma(gamma))
        square = (2 * self.log_deviation).exp()
        return alpha * square / (alpha.square() * square + sigma.square())


def _choose(log_weights: Tensor, u: Tensor, temperature: float) -> Tensor:
    """One component a row by inverse CDF at u. (b k), (b) -> (b)."""
    cdf = (log_weights.double() / max(temperature, 1e-6)).softmax(dim=-1).cumsum(dim=-1)
    chosen = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=log_weights.shape[1] - 1)
