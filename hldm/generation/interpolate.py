"""From one text to another by way of their latents: a path of latents for every weight, written out.

mu_j(w) = (1 - w) a_j + w b_j   (linear),   or along the arc between their directions (spherical, Shoemake 1985)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hldm.config import GenerationConfig, changed
from hldm.generation.branches import make_branches, write_branches
from hldm.generation.encode import encode_texts
from hldm.generation.score import as_documents
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.prior import Prior

Path = Literal["linear", "spherical"]
MAX_STEPS = 101


class Step(NamedTuple):
    """What is written at one weight."""

    weight: float  # of the second text
    chunks: list[bytes]

    @property
    def text(self) -> bytes:
        """The chunks in one."""
        return b"".join(self.chunks)


def blend(a: Tensor, b: Tensor, weight: float, path: Path) -> Tensor:
    """Between a (... z) and b, at weight 0 and 1 exactly these.

    spherical: directions along the arc between them, lengths in proportion; where they are parallel, the line.
    """
    if path == "linear" or weight in (0.0, 1.0):
        return (1 - weight) * a + weight * b
    size_a, size_b = (x.norm(dim=-1, keepdim=True) for x in (a, b))
    u, v = a / size_a.clamp_min(1e-12), b / size_b.clamp_min(1e-12)
    angle = torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True)) * 2
    sine = angle.sin()
    # parallel or opposite: no arc, or many; a latent of 0 has no direction
    is_flat = (sine < 1e-4) | (size_a < 1e-9) | (size_b < 1e-9)
    safe = sine.where(~is_flat, torch.ones_like(sine))
    direction = (((1 - weight) * angle).sin() * u + (weight * angle).sin() * v) / safe
    arc = ((1 - weight) * size_a + weight * size_b) * direction
    return torch.where(is_flat, (1 - weight) * a + weight * b, arc)


def latent_path(a: Tensor, b: Tensor, weight: float, path: Path) -> Tensor:
    """Latents (k z) between those of two texts (n z), (m z), k between n and m in proportion to the weight.

    Chunk j of k meets, in each text, the chunk at the same share of its length: texts are not blended with themselves.
    """
    count = max(round((1 - weight) * len(a) + weight * len(b)), 1)
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    one, other = ((share * len(x)).long().clamp(max=len(x) - 1) for x in (a, b))
    return blend(a[one], b[other], weight, path)


@torch.no_grad()
def interpolate_texts(
    autoencoder: Autoencoder,
    prior: Prior | None,
    first: str | bytes,
    second: str | bytes,
    settings: GenerationConfig,
    *,
    steps: int = 7,
    path: Path = "linear",
) -> list[Step]:
    """Texts at `steps` weights from 0 to 1, each the likeliest bytes of its latents; nothing is drawn.

    The decoder also reads what it has written so far, so at weight 0 the first text comes back but for what its latents
    do not hold. Raises ValueError, one line.
    """
    if path not in get_args(Path):
        raise ValueError(f"path must be one of {', '.join(get_args(Path))}, got {path!r:.40}")
    if not 2 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must lie in 2..{MAX_STEPS}, both texts included, got {steps}")
    if prior is None:
        raise ValueError("the twin has no latents to interpolate: take the run with latents")
    texts = as_documents([first, second], "texts")
    device = next(autoencoder.parameters()).device
    latents = encode_texts(autoencoder, list(texts), pooled=False)
    one, other = (x.to(device) for x in latents)
    weights = [step / (steps - 1) for step in range(steps)]
    paths = [latent_path(one, other, weight, path) for weight in weights]
    most = max(map(len, paths))
    held = torch.stack([torch.cat([each, each[-1:].expand(most - len(each), -1)]) for each in paths])
    alpha, _ = alpha_sigma(torch.tensor(prior.diffusion.gamma_0, device=device))
    likeliest = changed(settings, decoder_temperature=0.0, guidance=1.0)
    writer = make_branches(autoencoder, prior, [b""], likeliest, [[0] * steps])
    written = write_branches(writer, most, alpha * held)  # z_0 at its mean
    return [
        Step(weight, branch.chunks[: len(each)])
        for weight, branch, each in zip(weights, written, paths, strict=True)
    ]
