"""The bytes of a chunk, or of a stretch of the twin's text: from what is known before it to symbols drawn one by one.

Where there are kernels all of it is one call (`hldm.kernels.write`); the loops here, a decoder step and a draw at a time,
are what that is held to, and what runs everywhere else. A decoder that writes a chunk at once needs neither. Every
row draws from its own generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.finite import require_finite
from hldm.kernels.write import Emitted, can_write, write_events
from hldm.model.autoencoder import Autoencoder, DecoderState, EncoderState
from hldm.model.griffin import GriffinState
from hldm.model.parallel_decoder import ENDS, ParallelDecoder
from hldm.model.state import put_rows, take_rows
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, START


class Piece(NamedTuple):
    """What one row wrote in one round."""

    text: bytes
    ends_document: bool


class Written(NamedTuple):
    """Chunks as written, and what the models know after them, so that nothing is read twice."""

    pieces: list[Piece]
    features: Tensor | None  # (b t d) the encoder's, at each byte; None where they have not been read
    encoder: GriffinState  # after the last byte; as it was, where they have not been read
    decoder: GriffinState  # after the last symbol


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
    most, model = autoencoder.chunking.max_bytes, autoencoder.settings
    device = latent.device
    u = _draws(generators, most + 1, device)
    doc_start = torch.tensor(opens, device=device)
    known = autoencoder.from_trunk(encoder.known * ~doc_start[:, None]) if model.trunk_layers else None
    if isinstance(autoencoder.decoder, ParallelDecoder):
        if model.reads_text:
            text = autoencoder.from_text(encoder.feature) * ~doc_start[:, None]
            known = text if known is None else text + known
        told = autoencoder.told_by_latent(latent, known)
        symbols = _write_at_once(autoencoder.decoder, told, u, settings)
        features, griffin = _read_back(autoencoder, symbols, doc_start, encoder)
        return Written(_pieces(symbols), features, griffin, decoder.griffin)
    if can_write(autoencoder, encoder.griffin, decoder.griffin, len(latent)):
        always = torch.ones_like(doc_start)
        emitted = write_events(
            autoencoder,
            latent,
            known,
            u,
            torch.full_like(doc_start, START, dtype=torch.long),
            encoder.feature,
            encoder.griffin,
            decoder.griffin,
            doc_start=doc_start,
            resets=doc_start if model.carry_state else always,
            starts=always,
            temperature=settings.decoder_temperature,
            top_p=settings.top_p,
        )
    else:
        emitted = _write_by_event(autoencoder, latent, known, u, encoder, decoder, doc_start, settings)
    return Written(_pieces(emitted.symbols), emitted.features, emitted.encoder, emitted.decoder)


def _write_at_once(decoder: ParallelDecoder, told: Tensor, u: Tensor, settings: GenerationConfig) -> Tensor:
    """Symbols (b e) of a chunk a row: its length is picked first, then all bytes. told (b e d), u (b e)."""
    heat, top_p = settings.decoder_temperature, settings.top_p
    chosen = pick(decoder.length_logits(told[:, -1]).float(), u[:, -1], heat, top_p)
    length = chosen // ENDS + 1
    longest = int(length.max())
    logits = decoder.byte_logits(told[:, : longest + 1], length)[:, :longest].float()
    symbols = pick(logits.flatten(0, 1), u[:, :longest].flatten(), heat, top_p).view(-1, longest)
    ends = (END_OF_CHUNK + chosen % ENDS)[:, None]
    written = torch.arange(longest, device=told.device) < length[:, None]
    return torch.cat([torch.where(written, symbols, ends), ends], dim=1)


def _read_back(
    autoencoder: Autoencoder, symbols: Tensor, opens: Tensor, encoder: EncoderState
) -> tuple[Tensor, GriffinState]:
    """The encoder's features at the bytes of chunks (b e-1 w), and its state after them; symbols (b e), opens (b)."""
    rows, events = symbols.shape
    features = encoder.feature.new_zeros(rows, events - 1, encoder.feature.shape[1])
    # of the rows with bytes left; byte by byte, for which there is a kernel
    live, doc_start = torch.arange(rows, device=symbols.device), opens[:, None]
    ends = state = encoder.griffin
    for index in range(events - 1):
        start = torch.full_like(doc_start, index == 0)
        y, state = autoencoder.read_byte(symbols[live, index, None], doc_start & start, start, state)
        features[live, index] = y[:, 0]
        done = symbols[live, index + 1] >= END_OF_CHUNK
        if bool(done.any()):
            ends = put_rows(ends, live[done], take_rows(state, done))
            live, doc_start, state = take_rows((live, doc_start, state), ~done)
    return features, ends


def _draws(generators: Sequence[torch.Generator], events: int, device: torch.device) -> Tensor:
    """(b e) uniform numbers, each row's from its own generator."""
    return torch.stack([torch.rand(events, generator=g) for g in generators]).to(device)


def _pieces(symbols: Tensor) -> list[Piece]:
    """What was written, from symbols (b e); a row's are ends from its end on."""
    return [
        Piece(bytes(s for s in row if s < END_OF_CHUNK), END_OF_DOCUMENT in row) for row in symbols.tolist()
    ]


def _write_by_event(
    autoencoder: Autoencoder,
    latent: Tensor,
    known: Tensor | None,
    u: Tensor,
    encoder: EncoderState,
    decoder: DecoderState,
    opens: Tensor,
    settings: GenerationConfig,
) -> Emitted:
    """`write_events` for chunks, in torch. latent (b z), known (b d) of the trunk, u (b e), opens (b)."""
    (rows, events), most = u.shape, u.shape[1] - 1
    device, model = latent.device, autoencoder.settings
    latent, doc_start = latent[:, None], opens[:, None]
    known = None if known is None else known[:, None]
    emitted = torch.full((rows, events), END_OF_CHUNK, device=device)  # what each event emits
    features = latent.new_zeros(rows, most, encoder.feature.shape[1]) if model.reads_text else None
    ends = (encoder.griffin, decoder.griffin)

    # of the rows still writing
    live = torch.arange(rows, device=device)
    states = ends
    feature = encoder.feature[:, None]
    symbol = torch.full((rows, 1), START, device=device)
    for index in range(events):
        reading, writing = states
        first = torch.zeros_like(symbol)
        start = torch.full_like(symbol, index == 0, dtype=torch.bool)
        opening = doc_start & start
        told = known
        if features is not None:
            text = autoencoder.from_text(feature) * ~opening[..., None]
            told = text if known is None else text + known
        logits, writing = autoencoder.decode(
            symbol, latent, first, opening, start, writing, place=first + index, told=told
        )
        logits = logits[:, 0].float()
        if index == 0:  # no chunk is empty
            logits[:, END_OF_CHUNK:] = float("-inf")
        if index == most:  # and none is longer
            logits[:, :END_OF_CHUNK] = float("-inf")
        symbol = pick(logits, u[live, index], settings.decoder_temperature, settings.top_p)[:, None]
        emitted[live, index] = symbol[:, 0]
        states = (reading, writing)
        done = symbol[:, 0] >= END_OF_CHUNK
        if bool(done.any()):
            ends = put_rows(ends, live[done], take_rows(states, done))
            if bool(done.all()):
                break
            go_on = ~done
            live, symbol, latent, doc_start, opening, start, states, known = take_rows(
                (live, symbol, latent, doc_start, opening, start, states, known), go_on
            )
        if features is not None:
            reading, writing = states
            feature, reading = autoencoder.read_byte(symbol, opening, start, reading)
            features[live, index] = feature[:, 0]
            states = (reading, writing)
    return Emitted(emitted, features, *ends)


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
    u = _draws(generators, autoencoder.chunking.max_bytes, device)
    opening = torch.tensor(opens, device=device)
    symbol = torch.where(opening, START, state.symbol)
    if can_write(autoencoder, (), state.griffin, len(symbol)):
        symbols, _, _, griffin = write_events(
            autoencoder,
            None,
            None,
            u,
            symbol,
            None,
            (),
            state.griffin,
            doc_start=opening,
            resets=opening,
            starts=opening,
            temperature=settings.decoder_temperature,
            top_p=settings.top_p,
        )
        return _pieces(symbols), DecoderState(griffin, symbols[:, -1])
    symbols, griffin = torch.full_like(u, END_OF_DOCUMENT, dtype=torch.long), state.griffin
    ended = torch.zeros_like(opening)
    for index in range(u.shape[1]):
        start = (opening & (index == 0))[:, None]
        logits, griffin = autoencoder.decode(
            symbol[:, None], None, torch.zeros_like(symbol)[:, None], start, start, griffin
        )
        logits = logits[:, 0].float()
        logits[:, END_OF_CHUNK] = float("-inf")
        symbol = pick(logits, u[:, index], settings.decoder_temperature, settings.top_p)
        # what follows an end counts for nothing: its state is reset before anyone reads it
        symbol = torch.where(ended, END_OF_DOCUMENT, symbol)
        symbols[:, index] = symbol
        ended = symbol == END_OF_DOCUMENT
    return _pieces(symbols), DecoderState(griffin, symbol)
