"""Writing on from a draft: a prompt and the chunks written so far, whose borders stay where they were put.

Nothing is kept between calls: a draft is read again whenever it is written on from, as a prompt is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.chunking.strategies import chunker_of
from hldm.config import GenerationConfig
from hldm.generation.writer import ByteWriter, LatentWriter, make_writer, next_context, row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.text.bytes import PROMPT_WINDOW
from hldm.text.windows import Window, window_of


class Chunk(NamedTuple):
    """One chunk as written."""

    text: bytes
    latent: list[float]  # z_0 that it was expanded from; [] from the twin
    draw: int  # which of the draws for its place
    ends: bool  # whether the document ends with it


def chunk_generator(seed: int, place: int, draw: int) -> torch.Generator:
    """What the chunk at a place of a draft draws from, the draw-th time.

    So a text that is stopped and gone on with is the same.
    """
    return torch.Generator().manual_seed((seed + 1_000_003 * place + 7_919 * draw) % 2**32)


class DraftWriter(LatentWriter):
    """The latent model, after a draft. All rows are the same draft."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior,
        prompt: bytes,
        chunks: Sequence[bytes],
        settings: GenerationConfig,
        rows: int,
    ):
        generators = row_generators(0, rows)
        super().__init__(autoencoder, prior, [b""] * rows, settings, generators)
        # the faster way to write a chunk, where there is one
        fastest = make_writer(autoencoder, prior, [b""], settings, generators[:1])
        assert isinstance(fastest, LatentWriter)
        self.write_chunks = fastest.write_chunks
        self.held: Tensor | None = None  # (z) to write next, in place of a drawn one
        self.drawn = torch.zeros(rows, prior.latent_dim)  # (b z) what the last chunks were expanded from
        text = prompt + b"".join(chunks)
        for window in _windows(text, _starts(autoencoder, prompt, chunks), rows, self.device):
            self._read(window)
        self.conditioning = prior.condition(next_context(prior, self.memory))
        self.opens = [not text] * rows

    def sample_latents(self) -> Tensor:
        """z_0 of the next chunks (b z): the one that is held, or drawn ones."""
        self.drawn = super().sample_latents() if self.held is None else self.held.expand_as(self.drawn)
        return self.drawn


def _starts(autoencoder: Autoencoder, prompt: bytes, chunks: Sequence[bytes]) -> np.ndarray:
    """(t,) bool: where the chunks of a draft start. The prompt's end is a border, as always."""
    starts = [chunker_of(autoencoder).chunk_start(prompt)] if prompt else []
    starts += [np.arange(len(chunk)) == 0 for chunk in chunks]
    return np.concatenate(starts) if starts else np.zeros(0, dtype=bool)


def _windows(text: bytes, starts: np.ndarray, rows: int, device: torch.device) -> Iterator[Window]:
    """A text as windows of whole chunks, about PROMPT_WINDOW bytes in all rows together."""
    borders = np.append(np.flatnonzero(starts), len(text))
    begin = 0
    while begin < len(text):
        later = borders[borders > begin]
        fitting = later[later <= begin + PROMPT_WINDOW // rows]
        end = int(fitting[-1] if len(fitting) else later[0])
        yield window_of([text[begin:end]] * rows, [starts[begin:end]] * rows, [begin == 0] * rows, device)
        begin = end


class Draft:
    """A prompt and chunks, and the writer that goes on from them."""

    @torch.no_grad()
    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior | None,
        prompt: bytes,
        chunks: Sequence[bytes],
        settings: GenerationConfig,
        rows: int = 1,
    ):
        """Reads them. rows: chunks to write side by side, each after the same text."""
        self.writer: DraftWriter | ByteWriter
        if prior is None:
            prompts = [prompt + b"".join(chunks)] * rows
            writer = make_writer(autoencoder, None, prompts, settings, row_generators(0, rows))
            assert isinstance(writer, ByteWriter)
            self.writer = writer
        else:
            self.writer = DraftWriter(autoencoder, prior, prompt, chunks, settings, rows)
        self.place = len(chunks)  # of the next chunk

    @torch.no_grad()
    def write(self, seed: int, draws: Sequence[int], latent: Sequence[float] | None = None) -> list[Chunk]:
        """The next chunk of each row. latent: z_0 to write again, the same for all; None: each row draws one.

        Raises ValueError when numbers run away, or the twin is given a latent.
        """
        writer = self.writer
        writer.generators = [chunk_generator(seed, self.place, draw) for draw in draws]
        latents: list[list[float]] = [[] for _ in draws]
        if isinstance(writer, DraftWriter):
            writer.held = None if latent is None else torch.tensor(latent, dtype=torch.float32)
            pieces = writer.write()
            latents = writer.drawn.tolist()
        else:
            if latent is not None:
                raise ValueError("the twin has no latents to hold")
            pieces = writer.write()
        self.place += 1
        return [
            Chunk(piece.text, [round(x, 6) for x in z], draw, piece.ends_document)
            for piece, z, draw in zip(pieces, latents, draws, strict=True)
        ]
