"""How much of a text comes back from its latents: what the decoder writes, against what was there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.chunk import write_chunks
from hldm.generation.writer import row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.decoder import noisy_latents, read_chunks, sum_by_chunk
from hldm.model.diffusion import alpha_sigma
from hldm.model.state import DecoderState, Encoding
from hldm.text.windows import Batch, Windows

ENOUGH_CHUNKS = 4096  # the standard error of a share is then below 0.8 points: 0.5 / sqrt(4096)


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
    read = {"noisy": np.zeros(4), "clean": np.zeros(4)}  # symbols right, symbols, chunks right, chunks
    written = {"noisy": np.zeros(4), "clean": np.zeros(4)}  # bytes right, bytes, chunks right, chunks
    decoders = {name: autoencoder.decoder_state(windows.lanes, device) for name in read}
    encoder = autoencoder.encoder_state(windows.lanes, device)
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step).to(device)
        encoding, encoder = autoencoder.encode(batch, encoder)
        noisy = noisy_latents(encoding, gamma_0, batch, generator)
        for name, latent in (("noisy", noisy), ("clean", alpha_0 * encoding.latents)):
            found, decoders[name] = _read_along(autoencoder, batch, encoding, latent, decoders[name])
            read[name] += found
            if autoencoder.settings.decoder_is_fresh:
                written[name] += _write_freely(autoencoder, windows, batch, latent)
        if read["clean"][3] >= ENOUGH_CHUNKS:
            break
    accuracies = {}
    for name, (right, symbols, chunks_right, chunks) in read.items():
        bytes_right, bytes_in_all, whole, _ = written[name]
        fresh = bytes_in_all > 0
        accuracies[name] = {
            "byte_accuracy": float(right / symbols),
            "chunk_accuracy": float((whole if fresh else chunks_right) / chunks),
            "written_accuracy": float(bytes_right / bytes_in_all) if fresh else None,
        }
    return {**accuracies["noisy"], **accuracies, "chunks": int(read["clean"][3])}


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
