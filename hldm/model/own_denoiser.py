"""The denoiser of a prior: ours, or a class of the user's own that `prior.denoiser=module:Class` names."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor, nn

from hldm import plugins
from hldm.config import ConfigError, HierarchyConfig, PriorConfig
from hldm.model.contextualiser import Context
from hldm.model.denoiser import Denoiser

SETTING = "prior.denoiser"


class OwnDenoiser(Protocol):
    """What a denoiser of one's own must provide: a torch module with these.

    b documents, n chunks, m noise draws a chunk, z latent width, c context entries, d context width. What it answers
    for one draw of one chunk must depend on no other draw, chunk or document, and of the context on that chunk's
    alone: `context.summary` and `context.feature` at the chunk, `context.memory` where `context.visible` is true.
    """

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int) -> None:
        """Build it for latents of `latent_dim` numbers; config.width and config.denoiser_layers are its size."""

    def read(self, context: Context) -> Any:
        """What `forward` needs of the context: worked out once for all draws and steps."""

    def forward(self, z: Tensor, gamma: Tensor, conditioning: Any, estimate: Tensor) -> Tensor:
        """(b n m z) from noisy latents z (b n m z) at gamma = -log SNR (b n m); conditioning: what `read` made.

        estimate: (b n m z) the mixture's guess of the clean latent, and what is returned its correction in units of
        sigma, so that zeros are a good start; without a mixture zeros, and what is returned is v of the diffusion.
        """
        ...


def make_denoiser(config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int) -> Denoiser:
    """The denoiser that the settings name. Raises ConfigError, one line, for one that lacks what it must provide."""
    if not config.denoiser:
        return Denoiser(config, hierarchy, latent_dim)
    where = f"{SETTING}={config.denoiser}"
    cls = plugins.load(config.denoiser, SETTING)
    if not issubclass(cls, nn.Module):
        raise ConfigError(f"{where} must be a torch.nn.Module")
    plugins.require_methods(cls, OwnDenoiser, where)
    made = plugins.called(
        f"{where}: {cls.__name__}(config, hierarchy, latent_dim)", cls, config, hierarchy, latent_dim
    )
    return cast(Denoiser, made)  # as far as a prior asks
