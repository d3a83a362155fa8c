"""The shapes of a config's weights, in arithmetic alone: a second description of the modules, kept on purpose.

Building the modules on torch's meta device would give the same, but only once torch is imported and layer by layer: a
config that cannot fit is to be refused within two seconds, however large. tests/training/test_sizes.py holds every
shape here equal to the module's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

from hldm.config import ChunkingConfig, Config, GriffinConfig
from hldm.text.bytes import OUTPUTS, VOCABULARY

TIME_WIDTH = 32  # of the denoiser's embedding of gamma
MUON_WIDTH = 32  # narrower matrices are AdamW's (hldm.training.optimizers)


class Weight(NamedTuple):
    """A parameter of the model; embeddings are AdamW's, whatever the optimizer."""

    shape: tuple[int, ...]
    is_embedding: bool = False

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return prod(self.shape)


def count(weights: Iterable[Weight]) -> int:
    """Numbers that all of them hold."""
    return sum(weight.numbers for weight in weights)


def _linear(inputs: int, outputs: int, bias: bool = True) -> list[Weight]:
    return [Weight((outputs, inputs)), *([Weight((outputs,))] if bias else [])]


def _norm(width: int) -> list[Weight]:
    """A LayerNorm's gain and bias."""
    return [Weight((width,))] * 2


def _perceptron(inputs: int, hidden: int, outputs: int) -> list[Weight]:
    return [*_linear(inputs, hidden), *_linear(hidden, outputs)]


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
        yield from [Weight((d,))] * 2  # the gains of two RMSNorms
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
    entries = (config.hierarchy.levels + 1) * (config.hierarchy.capacity + 1)
    bias = Weight((entries, prior.heads))
    weights = [*_linear(z, d), _embedding(config.hierarchy.levels + 1, d), Weight((d,)), *_norm(d)]
    if prior.reads_text:
        weights += _linear(config.autoencoder.known_width, d, bias=False)
    weights += mixture_weights(config)
    layer = [*_norm(d), *_linear(d, d), *_linear(d, 2 * d), *_linear(d, d), bias, *_norm(d)]
    weights += [*layer, *_perceptron(d, 4 * d, d)] * prior.layers
    block = [*_linear(wide, d), *_linear(d, 2 * d), *_linear(d, wide), bias]
    block += _perceptron(wide, 3 * wide, wide)
    block += [*_linear(d, 6 * wide), *_linear(TIME_WIDTH, 4 * wide, bias=False)]
    weights += [*_linear(2 * z, wide), *_linear(TIME_WIDTH, TIME_WIDTH), *block * prior.denoiser_layers]
    return [*weights, *_linear(wide, z), Weight((d,))]


def mixture_weights(config: Config) -> list[Weight]:
    """Parameters of hldm.model.mixture.MixturePredictor, which prices latents in stage one; none without latents."""
    settings = config.autoencoder
    if config.is_twin or not settings.components:
        return []
    d, k, z = settings.known_width, settings.components, settings.latent_dim
    return [*_norm(d), *_perceptron(d, 2 * d, k), Weight((k, z)), Weight((z,))]


def segmenter_weights(chunking: ChunkingConfig) -> list[Weight]:
    """Parameters of the segmenter that the strategy asks (hldm.chunking.strategies), none where it asks none."""
    if not chunking.needs_segmenter:
        return []
    d = chunking.segmenter.width
    weights = [_embedding(256, d), *_griffin(chunking.segmenter.trunk), *_linear(d, 256)]
    perceptron = _perceptron(d, 2 * d, d)
    if chunking.strategy in ("learned", "reinforce"):  # hldm.chunking.scorer
        layer = [*_norm(d), *_linear(d, 2 * d), *_linear(d, d), *perceptron]
        weights += [_embedding(257, d), *layer * 2, *_linear(d, 256)]
    if chunking.strategy == "learned":
        weights += [*_linear(d, d, bias=False) * 2, *perceptron]
    elif chunking.strategy == "reinforce":
        weights += _perceptron(d, d, 1) * 2
    elif chunking.strategy == "select":
        weights += [*_perceptron(d, d, 1), *[_embedding(257, d)] * 2]
        weights += _perceptron(2 * d, 2 * d, 256)
    return weights


def optimizer_numbers(weights: Iterable[Weight], optimizer: str) -> int:
    """Two moments for AdamW's, one for Muon's: matrices but embeddings, MUON_WIDTH wide or more."""
    total = 0
    for weight in weights:
        shape = weight.shape
        inner = len(shape) == 2 and not weight.is_embedding and min(shape) >= MUON_WIDTH
        total += weight.numbers * (1 if optimizer == "muon" and inner else 2)
    return total
