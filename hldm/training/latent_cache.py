"""Latents of a corpus, computed once and kept on disk for stage two: a safetensors file with a checksum.

The file says what it was made for, so that one of another model, corpus or chunking is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hldm.runs.files import naming
from hldm.runs.machine import require_disk
from hldm.text.windows import Batch, Windows

MAX_HEADER_BYTES = 1_000_000  # of a file of one tensor


def cache_latents(
    encode: Callable[[Batch], Tensor], windows: Windows, path: Path | str, binding: dict[str, object]
) -> None:
    """Write the latent of every chunk of a corpus, by chunk_index, to a safetensors file.

    encode: batch -> (b n z), called with the batches of one epoch in order, so it may carry state
    windows: of whole documents (shuffle=False);  path: replaced when complete, never before
    binding: what the latents depend on (autoencoder checksum, corpus fingerprint, chunking), as JSON values
    Raises ValueError for shuffled windows, a latent that is not finite or one of another shape, ConfigError
    when the disk has less room than the file will need.
    """
    if windows.shuffle:
        raise ValueError("cache_latents reads documents whole and in order: pass Windows(..., shuffle=False)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), partial.open("w+b") as file:
            _write_latents(file, encode, windows, binding, path)
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_latents(
    file: BinaryIO,
    encode: Callable[[Batch], Tensor],
    windows: Windows,
    binding: dict[str, object],
    path: Path,
) -> None:
    width = offset = 0
    for step in range(windows.windows_per_epoch):
        batch = windows.batch(step)
        latents = encode(batch).detach().float().cpu().numpy()  # (b n z)
        if step == 0:
            width = latents.shape[-1]
            offset = len(_header(windows.chunks, width, binding))
            require_disk(path, offset + 4 * windows.chunks * width, "set data.cache_latents=false")
        expected = (*batch.chunk_index.shape, width)
        if latents.shape != expected:
            raise ValueError(f"encode must return latents (b n z) = {expected}, got {latents.shape}")
        if not np.isfinite(latents[batch.chunk_index.numpy() >= 0]).all():
            raise ValueError(f"encode gave a latent that is not finite in window {step}")
        for index, row in zip(batch.chunk_index.numpy(), latents, strict=True):
            chunks = int((index >= 0).sum())  # numbered one after the other: lanes are in corpus order
            if chunks:
                file.seek(offset + int(index[0]) * width * 4)
                file.write(row[:chunks].astype("<f4").tobytes())
    head = _header(windows.chunks, width, binding, sha256=_sha256_from(file, offset))
    file.seek(0)
    file.write(head)
    file.flush()


def load_latents(path: Path | str, binding: dict[str, object]) -> np.ndarray:
    """Latents (chunks z) float32 by chunk_index, mapped from disk, read only.

    Raises FileNotFoundError where there are none, ValueError when they are damaged or were made for
    another binding.
    """
    path = Path(path)
    rebuild = "delete the file to have it rebuilt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no cached latents there; make them with cache_latents")
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            latents = file.get_slice("latents")
            (chunks, width), dtype, names = latents.get_shape(), latents.get_dtype(), file.keys()
            if (dtype, list(names)) != ("F32", ["latents"]):
                raise ValueError(f"it holds {', '.join(names)} and latents of {dtype}")
        made_for = dict(json.loads(metadata["binding"]))
        offset = path.stat().st_size - 4 * chunks * width
        with path.open("rb") as file:
            is_whole = metadata["sha256"] == _sha256_from(file, offset)
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of cached latents ({error}); {rebuild}") from None
    if not is_whole:
        raise ValueError(f"{path}: cached latents are damaged (their checksum differs); {rebuild}")
    wanted = json.loads(json.dumps(binding))
    for key in sorted(made_for.keys() | wanted.keys()):
        if made_for.get(key) != wanted.get(key):
            raise ValueError(
                f"{path}: cached latents are stale: made for {key}={made_for.get(key)}, this run has "
                f"{key}={wanted.get(key)}; {rebuild}"
            )
    stored = np.memmap(path, "<f4", mode="c", offset=offset, shape=(chunks, width))
    rows = 2**20 // max(width, 1) + 1  # at a time: the whole may be larger than memory
    if not all(np.isfinite(stored[first : first + rows]).all() for first in range(0, chunks, rows)):
        raise ValueError(f"{path}: not every cached latent is finite; {rebuild}")
    return stored


def _header(chunks: int, width: int, binding: dict[str, object], sha256: str = "0" * 64) -> bytes:
    """The head of a safetensors file that holds latents (chunks z); equally long for every checksum."""
    head = {
        "__metadata__": {"binding": json.dumps(binding, sort_keys=True), "sha256": sha256},
        "latents": {"dtype": "F32", "shape": [chunks, width], "data_offsets": [0, chunks * width * 4]},
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _sha256_from(file: BinaryIO, offset: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


class CachedLatents:
    """mu of every chunk of a corpus, and what a prior reads beside it, on disk; copies of a model share it."""

    def __init__(self, latents: np.ndarray):
        self.latents = latents  # (chunks z) or (chunks z+d) float32, memory-mapped

    def __deepcopy__(self, memo: dict) -> CachedLatents:
        return self

    def of(self, chunk: Tensor, latent_dim: int) -> tuple[Tensor, Tensor]:
        """mu (b n z) and features (b n d) of chunks by their number in the corpus (b n), on its device."""
        row = torch.from_numpy(self.latents[chunk.cpu().numpy()]).to(chunk.device)
        return row[..., :latent_dim], row[..., latent_dim:]
