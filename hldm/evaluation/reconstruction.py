"""How much of a text comes back from its latents: what the decoder finds likeliest, against what was there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from hldm.chunking.reading import read_windows as read_windows
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import alpha_sigma
from hldm.model.likelihood import noisy_latents, read_chunks, sum_by_chunk
from hldm.runs.doing import reached
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, count_characters
from hldm.text.windows import Windows

ENOUGH_CHUNKS = 4096  # the standard error of a share is then below 0.8 points: 0.5 / sqrt(4096)


@torch.no_grad()
def reconstruct(
    autoencoder: Autoencoder, windows: Windows, gamma_0: float, generator: torch.Generator
) -> dict[str, Any]:
    """Accuracy from latents as the decoder gets them (`noisy`, at gamma_0) and without noise (`clean`).

    byte_accuracy:  share of symbols (bytes and ends) that the decoder finds likeliest, given its latent and its
                    conditioning, the true bytes before among it
    chunk_accuracy: share of chunks whose every symbol is likeliest
    Measured on the first windows of all streams that hold ENOUGH_CHUNKS. The accuracies beside `noisy` and
    `clean` are the noisy ones.
    """
    device = next(autoencoder.parameters()).device
    alpha_0, _ = alpha_sigma(torch.tensor(gamma_0, device=device))
    counts = np.zeros((2, 4))  # (noisy clean) x symbols right, symbols, chunks right, chunks
    decoders = [autoencoder.decoder_state(windows.lanes, device) for _ in counts]
    for batch, encoding in read_windows(autoencoder, windows):
        latents = (noisy_latents(encoding, gamma_0, batch, generator), alpha_0 * encoding.latents)
        for k, latent in enumerate(latents):
            reading, decoders[k] = read_chunks(autoencoder, batch, latent, decoders[k], encoding)
            mask, correct = reading.events.mask, reading.correct
            wrong = sum_by_chunk((mask & ~correct).long(), reading.events, batch.chunks)  # (b n)
            right = (wrong == 0) & batch.is_chunk
            counts[k] += [int(flags.sum()) for flags in (correct, mask, right, batch.is_chunk)]
        reached(counts[1, 3], min(ENOUGH_CHUNKS, windows.chunks))
        if counts[1, 3] >= ENOUGH_CHUNKS:
            break
    noisy, clean = ({"byte_accuracy": float(a / b), "chunk_accuracy": float(c / d)} for a, b, c, d in counts)
    return {**noisy, "noisy": noisy, "clean": clean, "chunks": int(counts[1, 3])}


@torch.no_grad()
def bits_of_ends(autoencoder: Autoencoder, windows: Windows, generator: torch.Generator) -> float:
    """The share of ends in the decoder's bits a character: -log2 of ending, or of going on, at each symbol.

    0 for ends that are certain; high for a strategy whose cuts only it can predict.
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
