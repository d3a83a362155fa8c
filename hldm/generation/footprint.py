"""What a model takes in memory as it reads and writes: carried states, one pass over a window, a text written.

Worked out from the settings alone, without torch, so that what cannot fit is refused at once. States are exact
(tests/training/test_sizes.py holds them to those of the modules), passes are an estimate.
"""

from __future__ import annotations

import json
from math import isqrt
from pathlib import Path
from typing import Any

from hldm.config import ChunkingConfig, Config, ConfigError, GriffinConfig, changed, config_from_dict
from hldm.runs.machine import available_memory, human
from hldm.text.bytes import PROMPT_WINDOW

FLOAT = 4  # bytes of a float32
INTEGER = 8  # bytes of an int64
RUNTIME = 400 * 2**20  # Python with torch, diffusers and transformers imported: 362 MiB measured, torch 2.13
GENERATOR_BYTES = 5_100  # of a torch.Generator on the CPU: a Mersenne twister's 624 words as int64
CHUNK_BYTES = 100  # Python's own of a chunk written: a bytes object, its place in lists


# ---- carried states


def _griffin_state(config: GriffinConfig, window: int) -> int:
    """Bytes of a row's state."""
    recurrent = config.width * config.conv_width * FLOAT
    attention = window * (2 * config.width * FLOAT + 1)
    return sum(recurrent if kind == "recurrent" else attention for kind in config.blocks)


def state_parts(config: Config) -> dict[str, int]:
    """Bytes of a row's state by part, as Carry in hldm.training.objectives names them."""
    settings, prior, hierarchy = config.autoencoder, config.prior, config.hierarchy
    window = config.chunking.max_bytes
    decoder = INTEGER + _griffin_state(settings.decoder, window + 1)
    if config.is_twin:
        return {"decoder": decoder}
    context = hierarchy.capacity * ((prior.layers + 1) * prior.width * FLOAT + 3 * INTEGER) + INTEGER
    context += (hierarchy.levels * settings.latent_dim + prior.width) * FLOAT
    context += settings.known_width * FLOAT if prior.reads_text or settings.components else 0
    encoder = _griffin_state(settings.encoder, window)
    encoder += (settings.encoder.width + settings.known_width) * FLOAT
    encoder += _griffin_state(settings.trunk, 1) if settings.trunk_layers else 0
    return {"encoder": encoder, "decoder": decoder, "context": context}


def kept_bytes(config: Config) -> int:
    """A row's past while it is written on: keys and values of `hldm.kernels.context`."""
    prior = config.prior
    if config.is_twin:
        return 0
    pairs = 2 * (prior.layers + prior.denoiser_layers) * prior.width
    return (config.hierarchy.capacity + 1) * (pairs * FLOAT + 2 * INTEGER)


# ---- one pass


def chunk_bytes(chunking: ChunkingConfig) -> int:
    """A typical chunk's length; texts decide, so between the least and the most."""
    if chunking.strategy == "fixed":
        return chunking.max_bytes
    if chunking.needs_segmenter:
        return max(int(chunking.target_bytes), 1)
    return max(isqrt(chunking.min_bytes * chunking.max_bytes), 1)


def stack_numbers(config: GriffinConfig, positions: int, window: int, recompute: bool) -> int:
    """Numbers that the backward pass of a Griffin stack needs, its own temporaries included."""
    d, m = config.width, round(config.width * config.mlp_ratio)
    block = max(window, 32)  # hldm.model.griffin.ATTENTION_BLOCK
    keys = window + block
    each = {
        # norm, gates, decay, multiplier, convolution, states, products, MLP
        "recurrent": 14 * d + 4 * m,
        # norm, queries, keys and values met again by the next block, output; mask; MLP
        "attention": 7 * d + 4 * d * keys // block + 2 * keys + 4 * m,
    }
    numbers = [each[kind] for kind in config.blocks]
    kept = len(numbers) * d + max(numbers) if recompute else sum(numbers)
    return positions * kept


def prior_numbers(config: Config, rows: int, chunks: int) -> int:
    """The same of both towers, over so many chunks a row."""
    prior, hierarchy = config.prior, config.hierarchy
    d, wide, draws = prior.width, prior.denoiser_width, prior.draws
    queries = 1 + chunks + sum(chunks // hierarchy.ratio**n + 1 for n in range(1, hierarchy.levels + 1))
    keys = hierarchy.capacity + queries
    pairs = queries * keys
    layer = 15 * queries * d + 6 * keys * d + 4 * prior.heads * pairs
    context = prior.layers * layer + 8 * pairs
    pairs = chunks * draws * keys
    block = chunks * draws * (22 * wide + 3 * d) + 6 * chunks * wide + 4 * keys * d + 4 * prior.heads * pairs
    settings = config.autoencoder
    ends = chunks * draws * 8 * settings.latent_dim
    mixture = 6 * chunks * draws * settings.components
    return rows * (context + prior.denoiser_layers * block + ends + mixture)


# ---- writing


def writing_bytes(config: Config, rows: int, characters: int, prompt_bytes: int) -> int:
    """Memory to continue `rows` prompts, the longest of so many bytes, by `characters` each. A rough estimate."""
    read = min(prompt_bytes, PROMPT_WINDOW // max(rows, 1) + config.chunking.max_bytes)
    stack = config.autoencoder.decoder if config.is_twin else config.autoencoder.encoder
    # nothing is kept for a backward pass: one block's, and one layer's
    numbers = stack_numbers(changed(stack, blocks=stack.blocks[:1]), read, config.chunking.max_bytes, False)
    if not config.is_twin:
        once = changed(config.prior, layers=1, denoiser_layers=1, draws=1)
        numbers += prior_numbers(changed(config, prior=once), 1, read // chunk_bytes(config.chunking))
    written = characters + characters // chunk_bytes(config.chunking) * CHUNK_BYTES
    states = 2 * sum(state_parts(config).values()) + kept_bytes(config)
    row = states + GENERATOR_BYTES + FLOAT * numbers + 2 * prompt_bytes + written
    return RUNTIME + rows * row


def require_room_to_write(config: Config, rows: int, characters: int, prompt_bytes: int) -> None:
    """Raise ConfigError unless the memory suffices; see `writing_bytes`."""
    needed = writing_bytes(config, rows, characters, prompt_bytes)
    available, where = available_memory()
    if needed > available:
        raise ConfigError(
            f"writing {characters:,} characters on from {rows:,} prompts of up to {prompt_bytes:,} bytes needs about "
            f"{human(needed)} of memory, {human(available)} available {where}: ask for fewer or shorter ones"
        )


def read_model_settings(pipeline: Path) -> Config | None:
    """The settings that a saved pipeline was built from, its JSON alone; None where they cannot be read."""
    found: dict[str, Any] = {}
    sections = {"autoencoder": ("autoencoder", "chunking"), "prior": ("prior", "hierarchy")}
    try:
        for part, names in sections.items():
            path = pipeline / part / "config.json"
            if part == "autoencoder" or path.is_file():  # a twin has no prior
                saved = json.loads(path.read_text(encoding="utf-8"))
                found |= {name: saved[name] for name in names}
        return config_from_dict(found)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # loading the model will say what is wrong
