"""From features of bytes to the latent of their chunk, and what brings latents to unit scale.

Two readouts make one latent of a chunk's bytes, over a window of chunks or over one chunk as it is written:
a mean that knows each byte's place, and, for chunks of a constant length, a strided convolution.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.model.ops import add_rows, placed_gelu
from hldm.text.windows import Window


class PlacedReadout(nn.Module):
    """A two-layer perceptron that knows how far into its chunk it is: W_2 gelu(W_1 x + p_k).

    A mean over bytes forgets their order, and a latent must say which byte comes where: with the place k
    inside the nonlinearity both sides can read and write letter by letter from the first steps on.
    """

    def __init__(self, inputs: int, outputs: int, places: int):
        super().__init__()
        hidden = 2 * max(inputs, outputs)
        self.inner = nn.Linear(inputs, hidden)
        self.place = nn.Embedding(places, hidden)
        self.outer = nn.Linear(hidden, outputs)

    def features(self, inner: Tensor, index: Tensor, place: Tensor) -> Tensor:
        """gelu(W_1 x + p_k) (b t d), from W_1 x (b n d) at index (b t) and k = place (b t)."""
        place = place.clamp(max=self.place.num_embeddings - 1)
        return placed_gelu(inner, index, self.place.weight, place)


class MeanReadout(PlacedReadout):
    """A chunk's latent from the mean over its bytes k of gelu(W_1 y_k + p_k)."""

    def of_chunks(self, y: Tensor, window: Window) -> Tensor:
        """Raw latents of a window's chunks (b n z), from y (b t d)."""
        every = torch.arange(y.shape[1], device=y.device).expand(y.shape[:2])
        return self.outer(pool_by_chunk(self.features(self.inner(y), every, window.place), window))

    def of_chunk(self, y: Tensor, length: Tensor) -> Tensor:
        """The same of one chunk a row (b 1 z), from y (b l d) and length (b)."""
        every = torch.arange(y.shape[1], device=y.device).expand(y.shape[:2])
        return self.outer(shares(y, length) @ self.features(self.inner(y), every, every))


class StridedReadout(nn.Module):
    """z = sum_k W_k y_k + b over a chunk's bytes k: a causal convolution whose kernel and stride are a chunk.

    A shorter chunk, the last of a document, is one with zeros after it.
    """

    def __init__(self, inputs: int, outputs: int, places: int):
        super().__init__()
        self.places = places
        self.kernel = nn.Linear(places * inputs, outputs)  # W_0, W_1, ... side by side

    def of_chunks(self, y: Tensor, window: Window) -> Tensor:
        """Raw latents of a window's chunks (b n z), from y (b t d)."""
        return self.kernel(lay_by_chunk(y, window, self.places).flatten(2))

    def of_chunk(self, y: Tensor, length: Tensor) -> Tensor:
        """The same of one chunk a row (b 1 z), from y (b l d) and length (b)."""
        is_real = torch.arange(y.shape[1], device=y.device) < length[:, None]
        laid = (y * is_real[..., None]).flatten(1)
        return F.linear(laid, self.kernel.weight[:, : laid.shape[1]], self.kernel.bias)[:, None]


class LatentNormaliser(nn.Module):
    """mu = (raw - mean) / deviation per dimension: measured, saved, never trained.

    Statistics of raw latents are summed up in training and folded in once an optimizer step, so
    that they are the same for any split of the batch over ranks and micro-batches.
    """

    mean: Tensor
    deviation: Tensor
    seen: Tensor
    sums: Tensor

    # Averages over about 20 steps: long enough to be quiet, short enough to follow a young encoder.
    MOMENTUM = 0.95

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # steps folded in
        # count, sum and sum of squares since the last step
        self.register_buffer("sums", torch.zeros(3, dim), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """Raw latents (... z) -> unit-scale ones."""
        return (raw - self.mean) / self.deviation

    @torch.no_grad()
    def observe(self, raw: Tensor) -> None:
        """Add raw latents (k z) to the running sums."""
        raw = raw.detach().float()
        count = torch.full_like(self.sums[0], raw.shape[0])
        self.sums += torch.stack([count, raw.sum(dim=0), raw.square().sum(dim=0)])

    def hold(self, latents: Tensor) -> Tensor:
        """What keeps raw latents at unit scale around 0: nats whose gradient says so, from mu (... z). (...).

        The loss knows mu alone, but the scale of raw latents has a gradient all the same, for mean and deviation
        are of steps before: unopposed it makes them ever larger or ever smaller, a ten-thousandth and less,
        and then every step of the optimizer turns latents into others. 1/2 tanh(log deviation) mu^2 + tanh(mean /
        deviation) mu is a sum over chunks, hence the same for any split of the batch.
        """
        scale, place = self.deviation.log().tanh(), (self.mean / self.deviation).tanh()
        return (0.5 * scale * latents.square() + place * latents).sum(dim=-1)

    @torch.no_grad()
    def update(self, skipped: bool = False) -> None:
        """Fold the sums into mean and deviation, once an optimizer step; forget them if it was skipped."""
        sums = self.sums.clone()
        self.sums.zero_()
        if skipped:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        if sums[0, 0] < 2:
            return
        mean, second = sums[1] / sums[0], sums[2] / sums[0]
        self.seen += 1
        # Debiased: the first step counts in full, later ones ever less down to 1 - momentum.
        share = max(1 - self.MOMENTUM, 1 / int(self.seen))
        old_second = self.deviation.square() + self.mean.square()
        new_mean = self.mean.lerp(mean, share)
        variance = old_second.lerp(second, share) - new_mean.square()
        self.mean.copy_(new_mean)
        self.deviation.copy_(variance.clamp(min=1e-8).sqrt())


def shares(y: Tensor, length: Tensor) -> Tensor:
    """(b 1 l): of each byte of y (b l d) in the mean over the first length (b)."""
    place = torch.arange(y.shape[1], device=y.device)
    return (place < length[:, None])[:, None] / length[:, None, None]


def pool_by_chunk(x: Tensor, window: Window) -> Tensor:
    """Mean of x over the bytes of each chunk; zeros where a row has fewer chunks.

    x: (b t d), summed in float32 at least. Returns (b n d). Raises ValueError when x and window differ in b or t.
    """
    if x.shape[:2] != window.bytes.shape:
        raise ValueError(
            f"x (b t d) and bytes (b t) must share b and t, got {tuple(x.shape)} and {tuple(window.bytes.shape)}"
        )
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    size = add_rows(values.new_ones(*x.shape[:2], 1), window.chunk_id, window.chunks)
    return (add_rows(values, window.chunk_id, window.chunks) / size.clamp(min=1)).to(x.dtype)  # (b n d)


def lay_by_chunk(x: Tensor, window: Window, most: int) -> Tensor:
    """The bytes of each chunk, at most l = `most`, side by side, zeros after its last. (b t d) -> (b n l d)."""
    b, _, d = x.shape
    # one row of places for all, with a spare one at the end for padding
    size = b * window.chunks * most
    chunk = window.chunk_id + window.chunks * torch.arange(b, device=x.device)[:, None]
    index = torch.where(window.is_real, chunk * most + window.place, size).flatten()
    laid = x.new_zeros(size + 1, d).index_copy(0, index, x.flatten(0, 1))
    return laid[:-1].view(b, window.chunks, most, d)
