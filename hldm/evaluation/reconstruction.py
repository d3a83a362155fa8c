"""How much of a text comes back from its latents: what the decoder writes, against what was there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.chunk import write_chunks
from hldm.generation.writer import row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.likelihood import noisy_latents, read_chunks, sum_by_chunk
from hldm.model.state import DecoderState, Encoding
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, count_characters
from hldm.text.windows import Batch, Windows

ENOUGH_CHUNKS = 4096  # the standard error of a share is then below 0.8 points: 0.5 / sqrt(4096)


def read_windows(autoencoder: Autoencoder, windows: Windows) -> Iterator[tuple[Batch, Encoding]]:
    """Every window on the model's device, and what the encoder makes of it, its state carried along."""
    device = next(autoencoder.parameters()).device
    state = autoencoder.encoder_state(windows.lanes, device)
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step).to(device)
        encoding, state = autoencoder.encode(batch, state)
        yield batch, encoding


@torch.no_grad()
def reconstruct(
    autoencoder: Autoencoder, windows: Windows, gamma_0: float, generator: torch.Generator
) -> dict[str, Any]:
    """Accuracy from latents as the decoder gets them (`noisy`, at gamma_0) and without noise (`clean`).

    byte_accuracy:    share of symbols (bytes and ends) that the decoder finds likeliest, given its latent and
                      the true bytes before in the chunk (and, with a carried state, in the document); where it
                      writes chunks at once, given the true length in place of bytes
    chunk_accuracy:   share of chunks written without a fault
    written_accuracy: the decoder writes each chunk freely and greedily, byte k of it is compared with byte k
                      of the true one, and every byte too few or too many is wrong: one slip costs the rest.
                      None for a decoder that leans on the text before, and is lost without it; its
                      chunk_accuracy is of chunks whose every symbol is likeliest
    Measured on the first windows of all lanes that hold ENOUGH_CHUNKS. The accuracies beside `noisy` and
    `clean` are the noisy ones.
    """
    device = next(autoencoder.parameters()).device
    alpha_0, _ = alpha_sigma(torch.tensor(gamma_0, device=device))
    # (noisy clean) x symbols right, symbols, chunks right, chunks; written: bytes instead of symbols
    read, written = np.zeros((2, 4)), np.zeros((2, 4))
    decoders = [autoencoder.decoder_state(windows.lanes, device) for _ in read]
    for batch, encoding in read_windows(autoencoder, windows):
        latents = (noisy_latents(encoding, gamma_0, batch, generator), alpha_0 * encoding.latents)
        for k, latent in enumerate(latents):
            found, decoders[k] = _read_along(autoencoder, batch, encoding, latent, decoders[k])
            read[k] += found
            if autoencoder.settings.decoder_is_fresh:
                written[k] += _write_freely(autoencoder, windows, batch, latent)
        if read[1, 3] >= ENOUGH_CHUNKS:
            break
    noisy, clean = (_shares(*counts) for counts in zip(read, written, strict=True))
    return {**noisy, "noisy": noisy, "clean": clean, "chunks": int(read[1, 3])}


def _shares(read: np.ndarray, written: np.ndarray) -> dict[str, float | None]:
    """Accuracies by counts (4,); chunks count as they were written, if any was."""
    is_fresh = written[1] > 0
    return {
        "byte_accuracy": float(read[0] / read[1]),
        "chunk_accuracy": float((written if is_fresh else read)[2] / read[3]),
        "written_accuracy": float(written[0] / written[1]) if is_fresh else None,
    }


def _write_freely(autoencoder: Autoencoder, windows: Windows, batch: Batch, latent: Tensor) -> np.ndarray:
    """Bytes right, bytes, chunks right, chunks of a window, every chunk written on its own."""
    is_chunk = batch.is_chunk
    chunks = batch.chunk_index[is_chunk].cpu().numpy()
    text = windows.corpus.text
    border = np.append(np.flatnonzero(windows.chunk_start), len(text))
    pieces = write_chunks(
        autoencoder,
        latent[is_chunk],
        autoencoder.encoder_state(len(chunks), latent.device),
        autoencoder.decoder_state(len(chunks), latent.device),
        [True] * len(chunks),
        GenerationConfig(decoder_temperature=0.0),
        row_generators(0, len(chunks)),  # the likeliest byte is no matter of chance
    ).pieces
    wanted = [text[border[chunk] : border[chunk + 1]].tobytes() for chunk in chunks]
    pairs = [(one, piece.text) for one, piece in zip(wanted, pieces, strict=True)]
    return np.array(
        [
            sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False)),
            sum(max(len(one), len(other)) for one, other in pairs),
            sum(one == other for one, other in pairs),
            len(pairs),
        ]
    )


def _read_along(
    autoencoder: Autoencoder, batch: Batch, encoding: Encoding, latent: Tensor, state: DecoderState
) -> tuple[np.ndarray, DecoderState]:
    """Symbols right, symbols, chunks right, chunks of a window, the true bytes as input."""
    reading, state = read_chunks(autoencoder, batch, latent, state, encoding)
    mask, correct = reading.events.mask, reading.correct
    wrong = sum_by_chunk((mask & ~correct).long(), reading.events, batch.chunks)  # (b n)
    found = [correct.sum(), mask.sum(), ((wrong == 0) & batch.is_chunk).sum(), batch.is_chunk.sum()]
    return torch.stack(found).cpu().numpy(), state


@torch.no_grad()
def bits_of_ends(autoencoder: Autoencoder, windows: Windows, generator: torch.Generator) -> float:
    """What of the decoder's bits a character says where chunks end: -log2 of ending, or of going on, at each symbol.

    Nothing for ends that are known beforehand; a strategy whose cuts nothing but itself can tell pays here.
    """
    decoder = autoencoder.decoder_state(windows.lanes, next(autoencoder.parameters()).device)
    nats = 0.0
    for batch, encoding in read_windows(autoencoder, windows):
        latent = noisy_latents(encoding, autoencoder.config["gamma_0"], batch, generator)
        reading, decoder = read_chunks(autoencoder, batch, latent, decoder, encoding)
        log_p = reading.logits.float().log_softmax(dim=-1)
        ending = log_p[..., END_OF_CHUNK : END_OF_DOCUMENT + 1].logsumexp(dim=-1)
        going_on = log_p[..., :END_OF_CHUNK].logsumexp(dim=-1)
        told = torch.where(reading.events.target >= END_OF_CHUNK, ending, going_on)
        nats -= float((told * reading.events.mask).sum())
    return nats / math.log(2) / count_characters(windows.corpus.text.tobytes())
