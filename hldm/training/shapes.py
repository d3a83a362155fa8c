"""The shapes that a config's modules, states and activations will have, in arithmetic alone.

A second description of hldm.model.griffin, hldm.model.autoencoder, hldm.model.mixture and hldm.model.prior, held
equal to them by tests/training/test_sizes.py: weights and states to the number, activations as an estimate. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isqrt, prod
from typing import NamedTuple

from hldm.config import ChunkingConfig, Config, GriffinConfig, HierarchyConfig
from hldm.text.bytes import VOCABULARY

FLOAT = 4  # bytes of a float32
INTEGER = 8  # bytes of an int64
OUTPUTS = 258  # of the decoder: bytes and the two ends
TIME_WIDTH = 32  # of the denoiser's embedding of gamma
MUON_WIDTH = 32  # narrower matrices are AdamW's (hldm.training.trainer)


class Weight(NamedTuple):
    """A parameter of the model; embeddings are AdamW's, whatever the optimizer."""

    shape: tuple[int, ...]
    is_embedding: bool = False

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return prod(self.shape)


# ---- weights


def count(weights: Iterable[Weight]) -> int:
    return sum(weight.numbers for weight in weights)


def _linear(inputs: int, outputs: int, bias: bool = True) -> list[Weight]:
    return [Weight((outputs, inputs)), *([Weight((outputs,))] if bias else [])]


def _embedding(rows: int, width: int) -> Weight:
    return Weight((rows, width), is_embedding=True)


def _griffin(config: GriffinConfig) -> Iterator[Weight]:
    """hldm.model.griffin.Griffin."""
    d, k, w = config.width, config.conv_width, config.width // config.heads
    hidden = round(d * config.mlp_ratio)
    for kind in config.blocks:
        if kind == "recurrent":
            yield from _linear(d, d) * 3
            yield from (Weight((k, d)), Weight((d,)))
            yield from (Weight((config.heads, w, 2 * w)), Weight((2, config.heads, w)), Weight((d,)))
        else:
            yield from [*_linear(d, d, bias=False) * 3, *_linear(d, d)]
        yield from [Weight((d,))] * 2
        yield from [*_linear(d, hidden, bias=False) * 2, *_linear(hidden, d, bias=False)]
    yield Weight((d,))


def _placed_readout(inputs: int, outputs: int, places: int) -> Iterator[Weight]:
    hidden = 2 * max(inputs, outputs)
    yield from (*_linear(inputs, hidden), _embedding(places, hidden), *_linear(hidden, outputs))


def autoencoder_weights(config: Config) -> list[Weight]:
    """Parameters of hldm.model.autoencoder.Autoencoder."""
    settings, chunking = config.autoencoder, config.chunking
    encoder, decoder, z = settings.encoder, settings.decoder, settings.latent_dim
    weights = [_embedding(VOCABULARY, decoder.width), *_griffin(decoder), *_linear(decoder.width, OUTPUTS)]
    if z:
        weights += [_embedding(VOCABULARY, encoder.width), *_griffin(encoder)]
        if settings.pooling == "strided":
            weights += _linear(encoder.width * chunking.max_bytes, z)
        else:
            weights += _placed_readout(encoder.width, z, chunking.max_bytes)
        weights += _placed_readout(z, decoder.width, chunking.max_bytes + 1)
        if settings.reads_text:
            weights += _linear(encoder.width, decoder.width)
        if settings.trunk_layers:
            wide = settings.trunk_width
            weights += [*_linear(2 * encoder.width, wide), *_griffin(settings.trunk)]
            weights += _linear(wide, decoder.width)
    return weights


def prior_weights(config: Config) -> list[Weight]:
    """Parameters of hldm.model.prior.Prior."""
    prior, z = config.prior, config.autoencoder.latent_dim
    d, wide = prior.width, prior.denoiser_width
    entries = (config.hierarchy.levels + 1) * (capacity(config.hierarchy) + 1)
    bias = Weight((entries, prior.heads))
    norm = [Weight((d,))] * 2
    weights = [*_linear(z, d), _embedding(config.hierarchy.levels + 1, d), Weight((d,)), *norm]
    if prior.reads_text:
        weights += _linear(config.autoencoder.known_width, d, bias=False)
    weights += mixture_weights(config)
    layer = [*norm, *_linear(d, d), *_linear(d, 2 * d), *_linear(d, d), bias, *norm]
    weights += [*layer, *_linear(d, 4 * d), *_linear(4 * d, d)] * prior.layers
    block = [*_linear(wide, d), *_linear(d, 2 * d), *_linear(d, wide), bias]
    block += [*_linear(wide, 3 * wide), *_linear(3 * wide, wide)]
    block += [*_linear(d, 6 * wide), *_linear(TIME_WIDTH, 4 * wide, bias=False)]
    weights += [*_linear(2 * z, wide), *_linear(TIME_WIDTH, TIME_WIDTH), *block * prior.denoiser_layers]
    return [*weights, *_linear(wide, z), Weight((d,))]


def mixture_weights(config: Config) -> list[Weight]:
    """Parameters of hldm.model.mixture.MixturePredictor, which prices latents in stage one; none without latents."""
    settings = config.autoencoder
    if config.is_twin or not settings.components:
        return []
    d, k, z = settings.known_width, settings.components, settings.latent_dim
    return [*[Weight((d,))] * 2, *_linear(d, 2 * d), *_linear(2 * d, k), Weight((k, z)), Weight((z,))]


def segmenter_weights(chunking: ChunkingConfig) -> list[Weight]:
    """Parameters of the segmenter that the strategy asks (hldm.training.segmenters), none where it asks none."""
    if not chunking.needs_segmenter:
        return []
    d = chunking.segmenter.width
    weights = [_embedding(256, d), *_griffin(segmenter_trunk(chunking)), *_linear(d, 256)]
    perceptron = [*_linear(d, 2 * d), *_linear(2 * d, d)]
    if chunking.strategy in ("learned", "reinforce"):  # hldm.chunking.scorer
        layer = [*[Weight((d,))] * 2, *_linear(d, 2 * d), *_linear(d, d), *perceptron]
        weights += [_embedding(257, d), *layer * 2, *_linear(d, 256)]
    if chunking.strategy == "learned":
        weights += [*_linear(d, d, bias=False) * 2, *perceptron]
    elif chunking.strategy == "reinforce":
        weights += [*_linear(d, d), *_linear(d, 1)] * 2
    elif chunking.strategy == "select":
        weights += [*_linear(d, d), *_linear(d, 1), *[_embedding(257, d)] * 2]
        weights += [*_linear(2 * d, 2 * d), *_linear(2 * d, 256)]
    return weights


def segmenter_trunk(chunking: ChunkingConfig) -> GriffinConfig:
    """The byte model inside of a segmenter."""
    settings = chunking.segmenter
    return GriffinConfig(width=settings.width, blocks=("recurrent",) * settings.layers)


def capacity(hierarchy: HierarchyConfig) -> int:
    """Entries of the pyramid that a state holds (hldm.model.hierarchy.capacity, which imports torch)."""
    total = level = 0
    for _ in range(hierarchy.levels + 1):
        level = -(-level // hierarchy.ratio) + hierarchy.window + hierarchy.ratio
        total += level
    return total


def optimizer_numbers(weights: Iterable[Weight], optimizer: str) -> int:
    """Two moments for AdamW's, one for Muon's: matrices but embeddings, MUON_WIDTH wide or more."""
    total = 0
    for weight in weights:
        shape = weight.shape
        inner = len(shape) == 2 and not weight.is_embedding and min(shape) >= MUON_WIDTH
        total += weight.numbers * (1 if optimizer == "muon" and inner else 2)
    return total


# ---- states and activations


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
    context = capacity(hierarchy) * ((prior.layers + 1) * prior.width * FLOAT + 3 * INTEGER) + INTEGER
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
    return (capacity(config.hierarchy) + 1) * (pairs * FLOAT + 2 * INTEGER)


def state_bytes(config: Config, stage: str) -> int:
    """What a stage carries from window to window for each row."""
    states = state_parts(config)
    if stage == "autoencoder":
        states.pop("context", None)
    if stage == "prior" and config.data.cache_latents:
        del states["encoder"]
    if stage == "prior" and not config.training.prior.joint:
        del states["decoder"]
    return sum(states.values())


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
    keys = capacity(hierarchy) + queries
    pairs = queries * keys
    layer = 15 * queries * d + 6 * keys * d + 4 * prior.heads * pairs
    context = prior.layers * layer + 8 * pairs
    pairs = chunks * draws * keys
    block = chunks * draws * (22 * wide + 3 * d) + 6 * chunks * wide + 4 * keys * d + 4 * prior.heads * pairs
    settings = config.autoencoder
    ends = chunks * draws * 8 * settings.latent_dim
    mixture = 6 * chunks * draws * settings.components
    return rows * (context + prior.denoiser_layers * block + ends + mixture)


def activation_bytes(config: Config, stage: str, rows: int) -> int:
    """An estimate of what a forward and backward pass over a window of so many rows takes at its peak.

    Measured on a CPU in float32: 0.96 to 1.12 times the peak of a step of configs/tiny.yaml (stage one) and of both
    stages of small.yaml. Not measured on a GPU. bfloat16 counts as float32, which is too much.
    """
    settings, chunking = config.autoencoder, config.chunking
    encoder, decoder, z = settings.encoder, settings.decoder, settings.latent_dim
    recompute = config.training.autoencoder.gradient_checkpointing
    length = config.data.window_bytes + chunking.max_bytes
    chunks = length // chunk_bytes(chunking) + 1
    events = length + (0 if config.is_twin else chunks)
    # a strided readout keeps its input, laid out by chunk, and makes its gradient, twice each
    readout = 4 * encoder.width if settings.pooling == "strided" else 14 * max(encoder.width, z)
    reading = stack_numbers(encoder, length, chunking.max_bytes, recompute) + length * readout
    reading += stack_numbers(settings.trunk, chunks, 1, recompute) if settings.trunk_layers else 0
    writing = stack_numbers(decoder, events, chunking.max_bytes + 1, recompute) + events * 6 * OUTPUTS
    writing += 0 if config.is_twin else events * 14 * max(decoder.width, z)
    if config.is_twin:
        numbers = writing * rows
    elif stage == "autoencoder":
        numbers = (reading + writing) * rows
    else:
        numbers = prior_numbers(config, rows, chunks)
        if config.training.prior.joint:
            numbers += (reading + writing) * rows
    return FLOAT * numbers
