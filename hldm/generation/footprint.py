"""What a model takes in memory as it reads and writes: carried states, one pass over a window, a text written.

States are counted exactly, on torch's meta device; passes are an estimate, from the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch

from hldm.config import ChunkingConfig, ConfigError
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.model.state import named_tensors
from hldm.runs.machine import available_memory, human
from hldm.text.bytes import PROMPT_WINDOW

FLOAT = 4  # bytes of a float32
INTEGER = 8  # bytes of an int64
RUNTIME = 400 * 2**20  # Python with torch, diffusers and transformers imported: 362 MiB measured, torch 2.13
GENERATOR_BYTES = 5_100  # of a torch.Generator on the CPU: a Mersenne twister's 624 words as int64
CHUNK_BYTES = 100  # Python's own of a chunk written: a bytes object, its place in lists


def state_bytes(carry: Any) -> int:
    """Bytes of the tensors of a carried state, a tuple of any depth; meta tensors count in full."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(carry))


def chunk_bytes(chunking: ChunkingConfig) -> int:
    """A typical chunk's length; texts decide, so between the least and the most."""
    if chunking.strategy == "fixed":
        return chunking.max_bytes
    if chunking.needs_segmenter:
        return max(int(chunking.target_bytes), 1)
    return max(isqrt(chunking.min_bytes * chunking.max_bytes), 1)


def kept_bytes(prior: Prior) -> int:
    """A row's past while it is written on by the faster form: keys and values of every layer."""
    settings = prior.settings
    pairs = 2 * (settings.layers + settings.denoiser_layers) * settings.width
    return (prior.hierarchy.capacity + 1) * (pairs * FLOAT + 2 * INTEGER)


def pass_numbers(autoencoder: Autoencoder, prior: Prior | None, read: int) -> int:
    """Numbers that one row's pass over `read` bytes holds at a time: one block's, and above one layer's of each tower.

    With the rest of a row 0.9 to 1.6 times what writing takes: the shipped models, 500 and 2000 rows, plain torch.
    """
    chunks = read // chunk_bytes(autoencoder.chunking)
    stack = autoencoder.settings.decoder if prior is None else autoencoder.settings.encoder
    # norm, gates, decay, convolution, states or keys met twice, products; gate and product of the MLP
    numbers = read * 15 * stack.width + 4 * stack.hidden
    if prior is not None:
        settings, hierarchy = prior.settings, prior.hierarchy
        entries = hierarchy.capacity + hierarchy.levels + 1 + 2 * chunks
        # normed, keys and values in either tower; then a chunk's own, and its scores of all entries
        numbers += 10 * entries * settings.width
        own = 18 * settings.width + 28 * settings.width + 8 * (settings.heads + 1) * entries
        numbers += (chunks + hierarchy.levels + 1) * own
    return numbers


def require_room_to_write(
    autoencoder: Autoencoder, prior: Prior | None, prompts: Sequence[bytes], samples: int, characters: int
) -> None:
    """Raise ConfigError unless memory suffices to continue each prompt `samples` times. A rough estimate."""
    chunking = autoencoder.chunking
    rows, longest = samples * len(prompts), max(map(len, prompts), default=0)
    read = min(longest, PROMPT_WINDOW // max(rows, 1) + chunking.max_bytes)
    meta = torch.device("meta")
    states: list[Any] = [autoencoder.decoder_state(1, meta)]
    if prior is not None:
        states += [autoencoder.encoder_state(1, meta), prior.initial_state(1, meta)]
    row = 2 * state_bytes(states) + (0 if prior is None else kept_bytes(prior)) + GENERATOR_BYTES
    row += FLOAT * pass_numbers(autoencoder, prior, read) + 2 * longest
    row += characters + characters // chunk_bytes(chunking) * CHUNK_BYTES
    needed = RUNTIME + rows * row
    available, where = available_memory()
    if needed > available:
        raise ConfigError(
            f"writing {characters:,} characters on from {rows:,} prompts of up to {longest:,} bytes needs about "
            f"{human(needed)} of memory, {human(available)} available {where}: ask for fewer or shorter ones"
        )
