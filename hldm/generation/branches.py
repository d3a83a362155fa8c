"""Several continuations of one text side by side: a writer copied into rows, and chunks written in all of them.

What edits, fills and steers builds on: rows may be copied and dropped between chunks, latents may be held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hldm.config import GenerationConfig
from hldm.generation.writer import LatentWriter, make_writer, row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior


class Branch(NamedTuple):
    """What one row wrote."""

    chunks: list[bytes]
    ends_document: bool  # the last chunk closed the document

    @property
    def text(self) -> bytes:
        """The chunks in one."""
        return b"".join(self.chunks)


def make_branches(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    seeds: Sequence[Sequence[int]],
) -> LatentWriter:
    """A writer with len(seeds[i]) rows after prompts[i], each drawing from its own seed; prompts are read once.

    Raises ValueError for a twin, which writes no chunks.
    """
    if prior is None:
        raise ValueError("the twin has no latents and writes no chunks: take the run with latents")
    writer = make_writer(autoencoder, prior, prompts, settings, row_generators(0, len(prompts)))
    assert isinstance(writer, LatentWriter)
    rows = [row for row, each in enumerate(seeds) for _ in each]
    return writer.pick(rows, row_generators([seed for each in seeds for seed in each], len(rows)))


def write_branches(writer: LatentWriter, chunks: int, held: Tensor | None = None) -> list[Branch]:
    """Write `chunks` chunks on in every row, from the writer's state; fewer where a row closes its document.

    held: (chunks z) or (b chunks z) z_0 of the chunks to come, in place of drawn ones
    """
    rows = len(writer.opens)
    written: list[list[bytes]] = [[] for _ in range(rows)]
    ended = [False] * rows
    for place in range(chunks):
        if held is None:
            pieces = writer.write()
        else:
            latents = held[..., place, :]
            pieces = writer.write(latents.expand(rows, -1).contiguous())
        for row, piece in enumerate(pieces):
            if not ended[row]:
                written[row].append(piece.text)
                ended[row] = piece.ends_document
        if all(ended):
            break
    return [Branch(*each) for each in zip(written, ended, strict=True)]
