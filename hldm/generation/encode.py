"""Vectors of texts: what the encoder makes of them, by chunk or in the mean over their chunks."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.chunking.reading import held_out_windows, read_windows
from hldm.generation.score import Texts, as_documents, as_list
from hldm.model.autoencoder import Autoencoder
from hldm.model.readouts import pool_by_chunk
from hldm.text.corpus import make_corpus

Kind = Literal["latents", "summaries", "features"]


@torch.no_grad()
def encode_texts(
    autoencoder: Autoencoder,
    texts: Texts,
    *,
    kind: Kind = "latents",
    pooled: bool = True,
    normalize: bool = False,
    batch_size: int = 32,
) -> Tensor | list[Tensor]:
    """A vector of each text (texts width), or not pooled one of each chunk, a tensor (n width) a text.

    float32, on the CPU, for one text as for several.

    kind: latents: mu of each chunk, what the prior denoises;  summaries: what the trunk knows after each chunk;
          features: the mean over each chunk of the encoder's outputs at its bytes
    pooled: the mean over chunks;  normalize: to length 1
    batch_size: how many texts are read side by side, which changes nothing but speed and memory
    Raises ValueError, one line: also for the twin, which has no encoder.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r:.40}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not autoencoder.latent_dim:
        raise ValueError("the twin has no encoder, so no vectors of texts: take the run with latents")
    if kind == "summaries" and not autoencoder.settings.trunk_layers:
        raise ValueError("this model has no trunk (autoencoder.trunk_layers=0): take kind='features'")
    documents = as_documents(as_list(texts))
    if not documents:
        raise ValueError("no text given: pass at least one")
    corpus = make_corpus("texts", documents)
    windows = held_out_windows(autoencoder, corpus, lanes=batch_size)
    found: list[tuple[np.ndarray, Tensor]] = []
    for batch, encoding in read_windows(autoencoder, windows):
        if kind == "features":
            vectors = pool_by_chunk(encoding.features[:, 1:], batch)  # (b n d)
        else:
            vectors = encoding.latents if kind == "latents" else encoding.after
        is_chunk = batch.is_chunk
        found.append((batch.chunk_index[is_chunk].cpu().numpy(), vectors[is_chunk].float().cpu()))
    index = torch.from_numpy(np.concatenate([at for at, _ in found]))
    chunks = torch.cat([vectors for _, vectors in found])[index.argsort()]  # (chunks width)
    if not bool(chunks.isfinite().all()):
        raise ValueError("the model makes vectors of this text that are not finite: train it again")
    first = np.searchsorted(np.flatnonzero(windows.chunk_start), corpus.offsets)  # (texts + 1,)
    of_text = chunks.split(np.diff(first).tolist())
    if pooled:
        means = torch.stack([part.mean(dim=0) for part in of_text])
        return F.normalize(means, dim=-1) if normalize else means
    return [F.normalize(part, dim=-1) if normalize else part for part in of_text]
