"""The context encoder, one vector a chunk, and the target encoder that follows it as a moving average.

    x (bytes) -- Griffin, attention inside the chunk, state carried --> y (b t d) -- mean over the chunk --> c (b n z)

Names and shapes of `read` and `encoder` are those of hldm.model.autoencoder, so that a stage one can start from them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hldm.chunking.chunker import Chunker
from hldm.config import ChunkingConfig, StackConfig, section_from_dict, to_dict
from hldm.model.griffin import Griffin
from hldm.model.readouts import MeanReadout
from hldm.model.state import GriffinState
from hldm.runs.saved_model import SavedModel
from hldm.text.bytes import VOCABULARY
from hldm.text.windows import Window, window_of

NULL = VOCABULARY - 1  # the symbol that stands for a hidden byte; no text holds it


class Encoded(NamedTuple):
    """What the encoder makes of a window."""

    vectors: Tensor  # (b n z) of each chunk, 0 where there is none
    features: Tensor  # (b t d) after each byte
    state: GriffinState  # after the window


class JepaEncoder(SavedModel):
    """Bytes to one wide vector a chunk."""

    @register_to_config
    def __init__(self, griffin: dict, chunking: dict, vector: int, segmenter: str = ""):
        """segmenter: fingerprint of what cuts its text, for strategies that ask a model"""
        super().__init__()
        self.settings = section_from_dict(StackConfig, griffin)
        self.chunking = section_from_dict(ChunkingConfig, chunking)
        self.vector = vector
        self.read = nn.Embedding(VOCABULARY, self.settings.width)
        self.encoder = Griffin(self.settings, window=self.chunking.max_bytes)
        self.readout = MeanReadout(self.settings.width, vector, self.chunking.max_bytes)
        for embedding in (self.read, self.readout.place):
            nn.init.normal_(embedding.weight, std=0.5)

    @classmethod
    def from_settings(cls, encoder: StackConfig, chunking: ChunkingConfig, vector: int) -> JepaEncoder:
        """Build from config sections."""
        return cls(to_dict(encoder), to_dict(chunking), vector)

    def initial_state(self, batch: int, device: torch.device | None = None) -> GriffinState:
        """State before the first byte."""
        return self.encoder.initial_state(batch, device)

    def forward(self, window: Window, state: GriffinState) -> Encoded:
        """Vectors of a window's chunks. state: after the text before the window."""
        features, state = self.encoder(
            self.read(window.bytes), state, window.doc_start, window.chunk_start, window.length
        )
        vectors = self.readout.of_chunks(features, window) * window.is_chunk[..., None]
        return Encoded(vectors, features, state)


def follower_of(model: nn.Module) -> nn.Module:
    """A copy whose weights are buffers: saved and restored with the rest, out of reach of optimizers and gradients.

    Frozen parameters would not do: the average that `Trainer` keeps follows parameters by their gradients, and leaves
    frozen ones as they were when training began. Buffers it copies.
    """
    follower = copy.deepcopy(model).requires_grad_(False).eval()
    for module in follower.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if parameter is None else parameter.data)
    return follower


@torch.no_grad()
def follow(follower: nn.Module, model: nn.Module, momentum: float) -> None:
    """follower <- momentum follower + (1 - momentum) model."""
    weights = dict(model.named_parameters())
    followers = [buffer for name, buffer in follower.named_buffers() if name in weights]
    torch._foreach_lerp_(followers, [weight.data for weight in weights.values()], 1 - momentum)


def momentum_at(start: float, progress: float) -> float:
    """A cosine from `start` at progress 0 to 1 at its end (BYOL, arXiv 2006.07733, section 3.2)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2


class TextVectors(NamedTuple):
    """Of each text, a vector by mean pooling."""

    latents: Tensor  # (k z) mean of its chunks' vectors
    features: Tensor  # (k d) mean of its bytes' features


BATCH_BYTES = 16_384  # of texts read at a time, padding included


def encode_texts(encoder: JepaEncoder, texts: Sequence[bytes], chunker: Chunker) -> TextVectors:
    """Vectors of texts, each read from a fresh state; a text's do not depend on what else is in the list.

    Raises ValueError for an empty text.
    """

    def read(window: Window) -> dict[str, Tensor]:
        encoded = encoder(window, encoder.initial_state(len(window.bytes), window.bytes.device))
        latents = mean_over(encoded.vectors, window.is_chunk)
        return {"latents": latents, "features": mean_over(encoded.features, window.is_real)}

    return TextVectors(**read_texts(texts, chunker, read, encoder.read.weight.device))


@torch.no_grad()
def read_texts(
    texts: Sequence[bytes],
    chunker: Chunker,
    read: Callable[[Window], dict[str, Tensor]],
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """What `read` makes of windows of texts, a row each, by name, in the order of the texts; float32 on the CPU.

    Raises ValueError for an empty text.
    """
    if not all(texts):
        raise ValueError(f"text {list(map(bool, texts)).index(False)} is empty: there is nothing to encode")
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    parts: list[dict[str, Tensor]] = []
    done = 0
    while done < len(order):
        rows = max(1, BATCH_BYTES // len(texts[order[done]]))
        chosen = [texts[index] for index in order[done : done + rows]]
        starts = [chunker.chunk_start(text) for text in chosen]
        window = window_of(chosen, starts, [True] * len(chosen), device)
        parts.append({name: value.float().cpu() for name, value in read(window).items()})
        done += rows
    back = torch.tensor(order).argsort()
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions of a mask (b t). (b t d) -> (b d)."""
    return (values * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
