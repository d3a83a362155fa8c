"""Held-out text chunk by chunk: what each costs, its latent, which other chunks lie near, all of them on a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hldm.app.page import marked, shown
from hldm.evaluation.bound import held_out_windows
from hldm.evaluation.reconstruction import read_windows
from hldm.model.autoencoder import Autoencoder
from hldm.model.likelihood import noisy_latents, read_chunks
from hldm.model.prior import Prior, price_latents
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus, make_corpus

READ_BYTES = 24_000  # of held-out text: some 4,000 chunks, seconds of reading
SHOWN_BYTES = 900  # of the passage: what fits on a screen
MAP_POINTS = 1200  # more hide one another
NEIGHBOURS = 6
PASSES, DRAWS = 4, 16  # samples of a chunk's latent, and noise levels in each: costs to some 5 %


class Chunks(NamedTuple):
    """Every chunk of a text, in the text's order."""

    texts: list[bytes]
    opens: np.ndarray  # (n,) bool: the first of its document
    decoder: np.ndarray  # (n,) bits of its bytes and its end, given latent and text before
    latent: np.ndarray  # (n,) bits of its latent, end term included; 0 for the twin
    latents: np.ndarray  # (n z) mu; (n 0) for the twin
    starts: np.ndarray  # (t,) bool over the bytes

    @property
    def bits(self) -> np.ndarray:
        """(n,) all bits of each."""
        return self.decoder + self.latent


def opening_of(corpus: Corpus, limit: int = READ_BYTES) -> Corpus:
    """The first documents of a corpus up to about `limit` bytes, whole ones but for a first that is longer."""
    count = max(int(np.searchsorted(corpus.offsets, limit, side="right")) - 1, 1)
    documents = [corpus.document(index).tobytes() for index in range(count)]
    return make_corpus(corpus.name, [text[:limit] for text in documents])


@torch.no_grad()
def read_text(
    autoencoder: Autoencoder,
    prior: Prior | None,
    corpus: Corpus,
    *,
    starts: np.ndarray | None = None,
    seed: int = 0,
) -> Chunks:
    """Costs and latents of the chunks of a corpus, read from its beginning.

    starts: (t,) bool, other chunks that the twin's costs are summed over
    The mean of PASSES draws of each latent, and of DRAWS noise levels each.
    """
    windows = held_out_windows(autoencoder, corpus, starts)
    device = next(autoencoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    decoder_nats, latent_nats = np.zeros(windows.chunks), np.zeros(windows.chunks)
    latents = np.zeros((windows.chunks, autoencoder.latent_dim))
    passes = 1 if prior is None else PASSES
    states = [autoencoder.decoder_state(windows.lanes, device) for _ in range(passes)]
    if prior is None:
        for step in range(windows.windows_per_epoch):
            batch = windows.batch(step).to(device)
            reading, states[0] = read_chunks(autoencoder, batch, None, states[0])
            decoder_nats[batch.chunk_index[batch.is_chunk].numpy()] = reading.nats[batch.is_chunk].cpu()
    else:
        memory = prior.initial_state(windows.lanes, device)
        for batch, encoding in read_windows(autoencoder, windows):
            index = batch.chunk_index[batch.is_chunk].cpu().numpy()
            latents[index] = encoding.latents[batch.is_chunk].cpu()
            context, memory = prior.contextualiser(
                encoding.latents, encoding.mask, encoding.doc_start, memory, encoding.after
            )
            for k in range(passes):
                paid = price_latents(prior, encoding, context, batch, generator, DRAWS)
                z_0 = noisy_latents(encoding, prior.diffusion.gamma_0, batch, generator)
                reading, states[k] = read_chunks(autoencoder, batch, z_0, states[k], encoding)
                decoder_nats[index] += (reading.nats[batch.is_chunk] / passes).cpu().numpy()
                latent_nats[index] += ((paid.latent + paid.end)[batch.is_chunk] / passes).cpu().numpy()
    first = np.flatnonzero(windows.chunk_start)
    borders = [*first.tolist(), len(corpus.text)]
    texts = [corpus.text[a:b].tobytes() for a, b in zip(borders, borders[1:], strict=False)]
    opens = np.isin(first, corpus.offsets[:-1])
    unit = math.log(2)
    return Chunks(texts, opens, decoder_nats / unit, latent_nats / unit, latents, windows.chunk_start)


def principal_axes(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (z), the two directions of most variance (z 2), and the share of the variance of each (2).

    Latents of one dimension have a second direction of zeros.
    """
    mean = latents.mean(axis=0)
    _, values, directions = np.linalg.svd(latents - mean, full_matrices=False)
    share = values**2 / max(float((values**2).sum()), 1e-12)
    axes = np.zeros((latents.shape[1], 2))
    count = min(2, len(directions))
    axes[:, :count] = directions[:count].T
    return mean, axes, np.pad(share[:2], (0, 2 - count))


def nearest(chunks: Chunks, index: int) -> list[tuple[int, float]]:
    """Chunks with other texts whose latents lie nearest, with their Euclidean distances."""
    distance = np.linalg.norm(chunks.latents - chunks.latents[index], axis=1)
    found: dict[bytes, tuple[int, float]] = {}
    for other in np.argsort(distance, kind="stable").tolist():
        text = chunks.texts[other]
        if text != chunks.texts[index] and text not in found:
            found[text] = (other, float(distance[other]))
        if len(found) == NEIGHBOURS:
            break
    return list(found.values())


def describe_passage(chunks: Chunks, other: Sequence[float] | None = None) -> list[dict[str, object]]:
    """The first SHOWN_BYTES of the text: for each chunk its string, bits, latent and neighbours.

    other: (n,) bits of the same chunks under the run that is compared with
    """
    lengths = np.cumsum([len(text) for text in chunks.texts])
    count = max(1, int(np.searchsorted(lengths, SHOWN_BYTES, side="right")))
    found: list[dict[str, object]] = []
    for index, text in enumerate(chunks.texts[:count]):
        latent = chunks.latents[index]
        entry: dict[str, object] = {
            "text": shown(text),
            "label": marked(text),
            "opens": bool(chunks.opens[index]),
            "characters": count_characters(text),
            "latent": round(float(chunks.latent[index]), 2),
            "decoder": round(float(chunks.decoder[index]), 2),
            "mu": [round(float(x), 3) for x in latent],
            "near": [
                {"text": marked(chunks.texts[k]), "distance": round(distance, 2)}
                for k, distance in (nearest(chunks, index) if len(latent) else [])
            ],
        }
        if other is not None:
            entry["other"] = round(float(other[index]), 2)
        found.append(entry)
    return found


def latent_map(chunks: Chunks) -> dict[str, Any]:
    """Points of chunks on the plane of the latents' two principal axes, and how to get there.

    Every text stands once, where it first comes. The passage's own chunks come first, so that they are on the map.
    """
    mean, axes, share = principal_axes(chunks.latents)
    first: dict[bytes, int] = {}
    for index, text in enumerate(chunks.texts):
        first.setdefault(text, index)
    kept = list(first.values())[:MAP_POINTS]
    places = (chunks.latents - mean) @ axes
    return {
        "mean": [round(float(x), 5) for x in mean],
        "axes": [[round(float(x), 5) for x in row] for row in axes.T],
        "share": [float(x) for x in share],
        "points": [
            {
                "text": marked(chunks.texts[k]),
                "x": round(float(places[k, 0]), 3),
                "y": round(float(places[k, 1]), 3),
                "bits": round(float(chunks.latent[k]), 2),
            }
            for k in kept
        ],
    }
