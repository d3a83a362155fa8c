"""All denoising steps of a batch of latents in a single call of C++: mixture, network and solver in turns.

What `hldm.model.diffusion.sample` does with `Prior.denoise`, to rounding, for a prior that corrects a mixture. What
depends on the noise level alone is worked out in torch, once for a text: weights do not change while it is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hldm.kernels.structs import run, struct, weights_of
from hldm.model.denoiser import Conditioning
from hldm.model.diffusion import Steps, alpha_sigma
from hldm.model.prior import Prior

MOST_STEPS = 1000  # whose noise is drawn beforehand


def _parameters(prior: Any) -> dict[str, list[Tensor | None]]:
    """What the denoiser does products with, by the names in `Denoising` of hldm/kernels/cpp/denoise.cpp."""
    denoiser = prior.denoiser
    in_blocks = [(block.query, block.attended, block.mlp[0], block.mlp[2]) for block in denoiser.blocks]
    return {
        "inputs": weights_of(denoiser.inputs),
        "parameters": [weight for linears in in_blocks for weight in weights_of(*linears)],
        "outputs": weights_of(denoiser.outputs),
    }


class PlannedSteps:
    """A plan's steps, with all worked out that is the same for every latent; for a prior with a mixture."""

    def __init__(self, prior: Prior, plan: Steps):
        mixture = prior.mixture
        denoiser: Any = prior.denoiser  # Any: modules in lists have no type of their own
        assert mixture is not None
        gammas = plan.gammas[:-1]
        time = denoiser.by_level(gammas)
        self._call = struct("denoise.cpp", "Denoising")(
            steps=len(plan.weights),
            z=prior.latent_dim,
            d=denoiser.inputs.out_features,
            width=prior.settings.width,
            heads=prior.settings.heads,
            components=len(mixture.prototypes),
            hidden=denoiser.blocks[0].mlp[0].out_features,
            blocks=len(denoiser.blocks),
            levels=torch.stack(alpha_sigma(gammas), dim=1).contiguous(),
            solver=plan.weights.contiguous(),
            prototypes=mixture.prototypes,
            square=(2 * mixture.log_deviation).exp(),
            by_level=[block.from_gamma(time) for block in denoiser.blocks],
            **_parameters(prior),
        )

    def draw(
        self,
        conditioning: Conditioning,
        noise: Tensor,
        uniform: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """z_0 (b z) after all steps.

        conditioning: `Prior.condition` of one context a row;  noise: (1 + steps b z), or (1 b z) where steps add none
        uniform, temperature: (steps b) float64, of `Prior.spread`; None: steps take the estimate as it is
        """
        latent, noise = noise[0], noise[1:]
        call, rows = self._call, len(latent)
        assert latent.shape == (rows, call.z) and len(noise) in (0, call.steps)
        assert conditioning.log_weights is not None
        latent = latent.clone(memory_format=torch.contiguous_format)
        call.fill(
            rows=rows,
            entries=conditioning.blocks[0].key.shape[2],
            latent=latent,
            uniform=None if uniform is None else uniform.contiguous(),
            temperature=temperature,
            noise=noise.contiguous() if len(noise) else latent.new_zeros(call.steps, rows, call.z),
            log_weights=conditioning.log_weights.float().contiguous(),
            conditioning=[part.float().contiguous() for block in conditioning.blocks for part in block],
        )
        run("hldm_denoise", call)
        return latent
