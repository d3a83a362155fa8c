"""What a chunk costs under the model that wrote it, read from where a writer stands: nothing before it is read again.

The terms are those of `hldm.generation.bound`, with noise that all rows share (common random numbers), so that their
differences are known better than any of them. Of the twin it is the likelihood itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.generation.chunk import Piece, Written
from hldm.generation.writer import ByteWriter, LatentWriter, Stretch
from hldm.model.diffusion import bound_integrand, diffuse, end_term, stratified
from hldm.model.likelihood import floored, read_chunks
from hldm.model.state import DecoderState, pick_rows
from hldm.text.bytes import END_OF_DOCUMENT, START
from hldm.text.windows import Window, window_of

LEVELS = 8  # of noise, for the diffusion term: as many as `hldm score` draws by default
DRAWS = 4  # latents that the decoder reads: each takes as long as to read the chunk


class Cost(NamedTuple):
    """Bits of one chunk a row, and what the models know after it."""

    bits: Tensor  # (b) float64
    read: Written | Stretch  # as if it had been drawn: for `take_in`


def cost_of(writer: LatentWriter | ByteWriter, pieces: Sequence[Piece], place: int) -> Cost:
    """Bits of one piece a row, each after what its row of a writer has taken in; the writer stays as it is.

    place: whatever has the same place shares its noise
    """
    if isinstance(writer, ByteWriter):
        return _cost_of_bytes(writer, pieces)
    generator = torch.Generator().manual_seed(place)
    return _cost_of_chunks(writer, pieces, generator)


def bits_after(
    writer: LatentWriter | ByteWriter, stubs: Sequence[Sequence[Piece]], first: Sequence[int]
) -> Tensor:
    """Bits (b) of the pieces of each row from its `first` on, after those before it and what the writer knows.

    The writer is used up. Pieces that are as far from the first share their noise.
    """
    bits = torch.zeros(len(stubs), dtype=torch.float64)
    rows = list(range(len(stubs)))
    for at in range(max(map(len, stubs))):
        if going := [i for i, row in enumerate(rows) if at < len(stubs[row])]:
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                writer = writer.pick(going, [writer.generators[i] for i in going])
            counts = torch.tensor([at >= first[row] for row in rows])
            cost = cost_of(writer, [stubs[row][at] for row in rows], at)
            bits[rows] += cost.bits.cpu() * counts
            writer.take_in(cost.read)  # type: ignore[arg-type]  # its own
    return bits


def _cost_of_chunks(writer: LatentWriter, pieces: Sequence[Piece], generator: torch.Generator) -> Cost:
    autoencoder, prior, device = writer.autoencoder, writer.prior, writer.device
    window = _window(pieces, writer.opens, device)
    encoding, encoder = autoencoder.encode(window, writer.encoder)
    mu = encoding.latents  # (b 1 z)
    rows, _, z = mu.shape

    gamma = prior.schedule.gamma(stratified(LEVELS, torch.rand((), generator=generator).to(device)))  # (m)
    noise = torch.randn(LEVELS, z, generator=generator).to(device)
    gamma, noise = gamma.expand(rows, 1, -1), noise.expand(rows, 1, -1, -1)
    x0 = mu[:, :, None].expand_as(noise)
    x0_hat = prior.denoise(diffuse(x0, gamma, noise), gamma, writer.conditioning)
    latent = (bound_integrand(x0, x0_hat, gamma) / prior.schedule.density(gamma)).mean(dim=-1)
    latent = (latent + end_term(mu, prior.diffusion.gamma_1))[:, 0]

    eps = torch.randn(DRAWS, z, generator=generator).to(device)  # (k z)
    index = torch.arange(rows, device=device).repeat_interleave(DRAWS)  # (b k)
    gamma_0 = mu.new_full((len(index), 1), prior.diffusion.gamma_0)
    z_0 = diffuse(mu[index], gamma_0, eps.repeat(rows, 1)[:, None])
    many = _window(
        [pieces[row] for row in index.tolist()], [writer.opens[row] for row in index.tolist()], device
    )
    reading, decoder = read_chunks(
        autoencoder, many, z_0, pick_rows(writer.decoder, index), pick_rows(encoding, index)
    )
    nats = latent.double() + reading.nats[:, 0].double().view(rows, DRAWS).mean(dim=-1)
    first = torch.arange(rows, device=device) * DRAWS  # a carried decoder goes on from its first draw
    return Cost(nats / math.log(2), Written(list(pieces), mu, encoder, pick_rows(decoder, first)))


def _window(pieces: Sequence[Piece], opens: Sequence[bool], device: torch.device) -> Window:
    """One chunk a row."""
    texts = [piece.text for piece in pieces]
    starts = [np.arange(len(text)) == 0 for text in texts]
    window = window_of(texts, starts, opens, device)
    closes = torch.tensor([piece.ends_document for piece in pieces], device=device)
    return replace(window, doc_end=window.chunk_end & window.is_real & closes[:, None])


def _cost_of_bytes(writer: ByteWriter, pieces: Sequence[Piece]) -> Cost:
    """Symbol by symbol, an end of the document included, which the last piece of one may consist of."""
    autoencoder, state = writer.autoencoder, writer.state
    device = state.symbol.device
    symbols = [[*piece.text] + [END_OF_DOCUMENT] * piece.ends_document for piece in pieces]
    length = torch.tensor([*map(len, symbols)], device=device)
    width = int(length.max())
    target = torch.tensor([row + [0] * (width - len(row)) for row in symbols], device=device)  # (b t)
    opens = torch.tensor(writer.opens, device=device)[:, None]
    first = torch.where(opens[:, 0], START, state.symbol)[:, None]
    symbol = torch.cat([first, target[:, :-1]], dim=1)
    at = torch.arange(width, device=device)
    start = opens & (at == 0)
    logits, griffin = autoencoder.decode_symbols(symbol, start, start, state.griffin, length=length)
    log_p = floored(logits.float(), autoencoder.byte_floor).log_softmax(dim=-1)
    nats = -log_p.gather(-1, target[..., None])[..., 0].double() * (at < length[:, None])
    last = target.gather(1, length[:, None] - 1)[:, 0]
    return Cost(nats.sum(dim=-1) / math.log(2), Stretch(list(pieces), DecoderState(griffin, last)))


def residuals_of(writer: LatentWriter, latents: Tensor) -> Tensor:
    """How far latents lie from what the mixture predicts before them, in its deviations. (b z) -> (b z).

    (mu - m) / s with m = sum_k w_k m_k and s^2 = sum_k w_k (m_k^2 + tau^2) - m^2. writer: where it stood before them
    """
    mixture = writer.prior.mixture
    assert mixture is not None
    opens = torch.tensor(writer.opens, device=writer.device)[:, None]
    weights = mixture.log_weights(writer.encoder.known * ~opens).exp()  # (b k)
    mean = weights @ mixture.prototypes
    square = weights @ mixture.prototypes.square() + (2 * mixture.log_deviation).exp()
    return (latents - mean) / (square - mean.square()).sqrt()
