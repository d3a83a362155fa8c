"""One latent on its way from noise to the chunk it becomes, and what the decoder would write at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hldm.app.page import marked, shown
from hldm.config import GenerationConfig, changed
from hldm.generation.chunk import write_chunks
from hldm.generation.writer import LatentWriter
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.prior import Prior
from hldm.model.state import pick_rows

STEPS = 24  # of the walks shown, however few a run writes with: a film needs frames
SHOWN_CONTEXT = 60  # characters before the chunk


class WatchedWriter(LatentWriter):
    """A writer whose latents are seen on their way."""

    def __init__(self, *arguments: Any):
        """Arguments are those of `LatentWriter`."""
        self.walk: list[tuple[Tensor, Tensor]] = []  # z and x0_hat (b z) of each step
        super().__init__(*arguments)

    def _denoise(self, z: Tensor, gamma: Tensor) -> Tensor:
        x0_hat = super()._denoise(z, gamma)
        self.walk.append((z, x0_hat))
        return x0_hat


@torch.no_grad()
def denoising_path(
    autoencoder: Autoencoder,
    prior: Prior,
    prompt: bytes,
    settings: GenerationConfig,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, Any]:
    """A walk of the run's sampler after a prompt, of whole chunks.

    At each step: log SNR, z, the denoiser's guess x0_hat of the latent, and the likeliest chunk under that guess. The
    last step's text is the likeliest under z_0 itself, which is what a text is written from.
    """
    settings = changed(settings, steps=steps)
    generators = [torch.Generator().manual_seed(seed)]
    writer = WatchedWriter(autoencoder, prior, [prompt], settings, generators)
    assert writer.plan is not None
    z_0 = writer.sample_latents()
    alpha_0, _ = alpha_sigma(torch.tensor(prior.diffusion.gamma_0, device=writer.device))
    zs = torch.cat([*(z for z, _ in writer.walk), z_0])  # (s+1 z)
    guesses = torch.cat([*(x0_hat for _, x0_hat in writer.walk), z_0 / alpha_0])
    # the decoder reads z_0 = alpha_0 mu + noise: alpha_0 x0_hat is the mean of what it was trained on
    read = torch.cat([alpha_0 * guesses[:-1], z_0])
    rows = torch.zeros(len(read), dtype=torch.long, device=writer.device)
    likeliest = changed(settings, decoder_temperature=0.0)
    written = write_chunks(
        autoencoder,
        read,
        pick_rows(writer.encoder, rows),
        pick_rows(writer.decoder, rows),
        writer.opens * len(read),
        likeliest,
        [torch.Generator().manual_seed(seed) for _ in read],
    )
    context = shown(prompt)[-SHOWN_CONTEXT:]
    return {
        "context": context,
        "steps": [
            {
                "log_snr": round(-float(gamma), 2),
                "z": _rounded(z),
                "guess": _rounded(guess),
                "text": marked(piece.text),
            }
            for gamma, z, guess, piece in zip(
                writer.plan.gammas.tolist(), zs.cpu(), guesses.cpu(), written.pieces, strict=True
            )
        ],
    }


def _rounded(x: Tensor) -> list[float]:
    return [round(float(value), 3) for value in np.asarray(x)]


def denoising_paths(
    autoencoder: Autoencoder,
    prior: Prior,
    texts: list[bytes],
    settings: GenerationConfig,
    *,
    places: int = 3,
    seeds: int = 2,
) -> list[dict[str, Any]]:
    """Walks after several places of a text, given as its chunks; the text's own next chunk stands with each."""
    found = []
    last = len(texts) - 1
    for place in sorted({max(1, round((k + 1) * last / (places + 1))) for k in range(places)} - {last + 1}):
        for seed in range(seeds):
            prompt = b"".join(texts[:place])
            path = denoising_path(autoencoder, prior, prompt, settings, seed=seed)
            found.append({**path, "seed": seed, "true": marked(texts[place]) if place < len(texts) else ""})
    return found
