"""A chunk, or a stretch of the twin's text: one decoder step and one draw at a time; then the chunk's latent.

Functions of states: what is carried comes in as a value and goes out as a new one. Every row draws from its own
generator. `hldm.kernels.write` does the same in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.finite import require_finite
from hldm.model.autoencoder import Autoencoder
from hldm.model.likelihood import floored
from hldm.model.state import DecoderState, EncoderState, pick_rows, put_rows
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, START


class Piece(NamedTuple):
    """What one row wrote in one round."""

    text: bytes
    ends_document: bool


class Written(NamedTuple):
    """Chunks as written, and what the models know after them, so that nothing is read twice."""

    pieces: list[Piece]
    latents: Tensor  # (b 1 z) of the chunks, as the encoder reads them
    encoder: EncoderState
    decoder: DecoderState


def pick(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """One symbol a row from softmax(logits / temperature) cut to the nucleus, by inverse CDF at u.

    logits (b v), u (b) in [0, 1). Temperature 0 takes the likeliest. Returns (b).
    """
    if not bool(logits.amax(dim=-1).isfinite().all()):  # -inf bars a symbol, NaN or inf is no probability
        require_finite(logits.amax(dim=-1), "the logits of bytes")
    if temperature == 0:
        return logits.argmax(dim=-1)
    p, symbol = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(dim=-1) - p
    p = p * (before < top_p)  # the likeliest always stays
    cdf = p.cumsum(dim=-1)
    chosen = torch.searchsorted(cdf, (u.double() * cdf[:, -1])[:, None], right=True)
    return symbol.gather(1, chosen.clamp(max=p.shape[1] - 1))[:, 0]


def draw_uniform_rows(generators: Sequence[torch.Generator], count: int, device: torch.device) -> Tensor:
    """(b count) uniform numbers in [0, 1), each row's from its own generator."""
    return torch.stack([torch.rand(count, generator=g) for g in generators]).to(device)


def pieces_of(symbols: Tensor) -> list[Piece]:
    """What was written, from symbols (b e); a row's are ends from its end on."""
    return [
        Piece(bytes(s for s in row if s < END_OF_CHUNK), END_OF_DOCUMENT in row) for row in symbols.tolist()
    ]


def write_chunks(
    autoencoder: Autoencoder,
    latent: Tensor,
    encoder: EncoderState,
    decoder: DecoderState,
    opens: Sequence[bool],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
) -> Written:
    """Expand one latent a row (b z) into the bytes of a chunk: 1 to max_bytes of them.

    encoder, decoder: states after the text so far, left as they are;  opens: whether a row opens a document.
    A row whose chunk has ended leaves the batch: nobody waits for the longest.
    """
    most, device, rows = autoencoder.chunking.max_bytes, latent.device, len(latent)
    u = draw_uniform_rows(generators, most + 1, device)  # (b e): events are the bytes and the end
    first_opens = torch.tensor(opens, device=device)[:, None]
    known = known_of_text(autoencoder, encoder, first_opens)
    symbols = torch.full((rows, most + 1), END_OF_CHUNK, device=device)  # what each event emits
    features = latent.new_zeros(rows, most, encoder.feature.shape[1])  # the encoder's, at each byte
    ends = (encoder.griffin, decoder.griffin)  # states of every row after its chunk

    # of the rows still writing
    live = torch.arange(rows, device=device)
    (reading, writing), latent, doc_start = ends, latent[:, None], first_opens
    feature = encoder.feature[:, None]
    symbol = torch.full((rows, 1), START, device=device)
    for event in range(most + 1):
        start = torch.full_like(symbol, event == 0, dtype=torch.bool)
        opening = doc_start & start
        conditioning = known
        if autoencoder.settings.reads_text:
            text = autoencoder.from_text(feature) * ~opening[..., None]
            conditioning = text if known is None else text + known
        place = torch.full_like(symbol, event)
        logits, writing = autoencoder.decode_symbols(
            symbol, opening, start, writing, latent=latent, place=place, conditioning=conditioning
        )
        logits = _allowed(floored(logits[:, 0].float(), autoencoder.byte_floor), event, most)
        symbol = pick(logits, u[live, event], settings.decoder_temperature, settings.top_p)[:, None]
        symbols[live, event] = symbol[:, 0]
        done = symbol[:, 0] >= END_OF_CHUNK
        if bool(done.any()):
            ends = put_rows(ends, live[done], pick_rows((reading, writing), done))
            if bool(done.all()):
                break
            live, symbol, latent, doc_start, opening, start, reading, writing, known = pick_rows(
                (live, symbol, latent, doc_start, opening, start, reading, writing, known), ~done
            )
        feature, reading = autoencoder.encoder(autoencoder.read(symbol), reading, opening, start)
        features[live, event] = feature[:, 0]
    reading, writing = ends
    length = (symbols < END_OF_CHUNK).sum(dim=1)
    last = symbols.gather(1, length[:, None] - 1)[:, 0]
    closed = autoencoder.close_chunk(features, reading, length, first_opens, encoder)
    return Written(pieces_of(symbols), *closed, DecoderState(writing, last))


def known_of_text(autoencoder: Autoencoder, encoder: EncoderState, opens: Tensor) -> Tensor | None:
    """What the trunk's output before a chunk adds to the decoder's input (b 1 d); None without a trunk.

    opens: (b 1) whether the chunk is the first of its document, and has no text before it
    """
    if not autoencoder.settings.trunk_layers:
        return None
    return autoencoder.from_trunk(encoder.known * ~opens)[:, None]


def _allowed(logits: Tensor, event: int, most: int) -> Tensor:
    """Logits (b 258) of an event: no chunk is empty, and none has more bytes than `most`."""
    if event == 0:
        logits[:, END_OF_CHUNK:] = float("-inf")
    if event == most:
        logits[:, :END_OF_CHUNK] = float("-inf")
    return logits


def write_bytes(
    autoencoder: Autoencoder,
    state: DecoderState,
    opens: Sequence[bool],
    settings: GenerationConfig,
    generators: Sequence[torch.Generator],
) -> tuple[list[Piece], DecoderState]:
    """max_bytes symbols of the twin a row, or fewer where a document ends.

    state: after the text so far, left as it is;  opens: whether a row opens a document
    """
    device = state.symbol.device
    u = draw_uniform_rows(generators, autoencoder.chunking.max_bytes, device)
    opening = torch.tensor(opens, device=device)
    symbol = torch.where(opening, START, state.symbol)
    symbols, griffin = torch.full_like(u, END_OF_DOCUMENT, dtype=torch.long), state.griffin
    ended = torch.zeros_like(opening)
    for index in range(u.shape[1]):
        start = (opening & (index == 0))[:, None]
        logits, griffin = autoencoder.decode_symbols(symbol[:, None], start, start, griffin)
        logits = floored(logits[:, 0].float(), autoencoder.byte_floor)
        logits[:, END_OF_CHUNK] = float("-inf")
        symbol = pick(logits, u[:, index], settings.decoder_temperature, settings.top_p)
        # what follows an end counts for nothing: its state is reset before anyone reads it
        symbol = torch.where(ended, END_OF_DOCUMENT, symbol)
        symbols[:, index] = symbol
        ended = symbol == END_OF_DOCUMENT
    return pieces_of(symbols), DecoderState(griffin, symbol)
