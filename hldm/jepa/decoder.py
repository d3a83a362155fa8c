"""The decoder of chunk vectors: the bytes of a chunk from its vector alone.

It starts afresh at every chunk and sees neither the text before nor the trunk: a decoder that did would write from
those and leave the vector unread. Parts and events are those of hldm.model.autoencoder's decoder.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hldm.config import ChunkingConfig, StackConfig, section_from_dict, to_dict
from hldm.model.griffin import Griffin
from hldm.model.ops import softmax_nats
from hldm.model.readouts import PlacedReadout
from hldm.model.state import GriffinState
from hldm.runs.saved_model import SavedModel
from hldm.text.bytes import END_OF_CHUNK, OUTPUTS, START, VOCABULARY
from hldm.text.windows import Window


def chunk_bytes(window: Window, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes (k l) and lengths (k) of the chosen chunks, (b n) bool, row by row; 0 where padded."""
    row, chunk = chosen.nonzero(as_tuple=True)
    first, last = window.first_byte[row, chunk], window.last_byte[row, chunk]
    length = last - first + 1
    place = torch.arange(int(length.max()) if len(row) else 1, device=row.device)
    at = (first[:, None] + place).clamp(max=window.bytes.shape[1] - 1)
    return window.bytes[row[:, None], at] * (place < length[:, None]), length


class ChunkDecoder(SavedModel):
    """One vector to the bytes of a chunk and its end."""

    @register_to_config
    def __init__(self, griffin: dict, chunking: dict, vector: int):
        super().__init__()
        self.settings = section_from_dict(StackConfig, griffin)
        self.chunking = section_from_dict(ChunkingConfig, chunking)
        places = self.chunking.max_bytes + 1  # one more than bytes: the event that ends the chunk
        self.write = nn.Embedding(VOCABULARY, self.settings.width)
        self.from_vector = PlacedReadout(vector, self.settings.width, places)
        self.decoder = Griffin(self.settings, window=places)
        self.outputs = nn.Linear(self.settings.width, OUTPUTS)
        for embedding in (self.write, self.from_vector.place):
            nn.init.normal_(embedding.weight, std=0.5)
        nn.init.normal_(self.outputs.weight, std=0.5 * self.settings.width**-0.5)
        nn.init.zeros_(self.outputs.bias)

    @classmethod
    def from_settings(cls, decoder: StackConfig, chunking: ChunkingConfig, vector: int) -> ChunkDecoder:
        """Build from config sections."""
        return cls(to_dict(decoder), to_dict(chunking), vector)

    def logits(self, vectors: Tensor, symbols: Tensor, length: Tensor | None = None) -> Tensor:
        """Of the next symbol (k l 258), from vectors (k z) and the symbols before (k l), START first."""
        state = self.decoder.initial_state(len(symbols), symbols.device)
        return self._go_on(vectors, symbols, 0, state, length)[0]

    def _go_on(
        self, vectors: Tensor, symbols: Tensor, first: int, state: GriffinState, length: Tensor | None = None
    ) -> tuple[Tensor, GriffinState]:
        """The same from the state after `first` symbols, and the state after these."""
        place = first + torch.arange(symbols.shape[1], device=symbols.device).expand_as(symbols)
        conditioning = self.from_vector.features(
            self.from_vector.inner(vectors)[:, None], torch.zeros_like(place), place
        )
        opens = place == 0
        x = self.write(symbols) + self.from_vector.outer(conditioning)
        y, state = self.decoder(x, state, opens, opens, length)
        return self.outputs(y), state

    def nats(self, vectors: Tensor, text: Tensor, length: Tensor) -> Tensor:
        """-log p of each chunk's bytes and its end (k), from vectors (k z), bytes (k l) and lengths (k)."""
        if not len(text):
            return vectors.sum(dim=1)  # of nothing, but a part of the graph
        column = torch.arange(text.shape[1] + 1, device=text.device)
        ended = nn.functional.pad(text, (0, 1))
        target = torch.where(column == length[:, None], END_OF_CHUNK, ended)
        symbols = nn.functional.pad(text, (1, 0), value=START)
        logits = self.logits(vectors, symbols, length + 1)
        nats = softmax_nats(logits.float().flatten(0, 1), target.flatten()).view_as(target)
        return (nats * (column <= length[:, None])).sum(dim=1)

    @torch.no_grad()
    def write_chunks(self, vectors: Tensor) -> list[bytes]:
        """The likeliest bytes of each vector (k z), one by one, until the end or the longest chunk."""
        if not len(vectors):
            return []
        symbol = torch.full((len(vectors), 1), START, device=vectors.device)
        state = self.decoder.initial_state(len(vectors), vectors.device)
        written: list[Tensor] = []
        has_ended = torch.zeros_like(symbol, dtype=torch.bool)
        while len(written) < self.chunking.max_bytes and not has_ended.all():
            logits, state = self._go_on(vectors, symbol, len(written), state)
            symbol = logits.argmax(dim=-1)
            has_ended |= symbol >= END_OF_CHUNK
            written.append(symbol)
        rows = torch.cat(written, dim=1).tolist()
        ends = (next((i for i, s in enumerate(row) if s >= END_OF_CHUNK), len(row)) for row in rows)
        return [bytes(row[:end]) for row, end in zip(rows, ends, strict=True)]
