"""The prior's first tower: latents and means of them, to the context of each chunk.

It reads the pyramid of `hldm.model.hierarchy` once per chunk, causally, by attention over the visible entries. In
generation it is called for one chunk at a time, with a state of O(log n) entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hldm.config import HierarchyConfig, PriorConfig
from hldm.model.hierarchy import (
    Entries,
    Walk,
    distance_in_blocks,
    still_needed,
    summaries,
    visible,
    walk,
)
from hldm.model.ops import take_rows
from hldm.model.state import ContextState


class Context(NamedTuple):
    """What the denoiser gets of the past of each chunk."""

    summary: Tensor  # (b n d) output at the chunk before
    memory: Tensor  # (b c d) outputs of all entries; the first is the document start
    visible: Tensor  # (b n c) bool
    level: Tensor  # (b c) of each entry
    distance: Tensor  # (b n c) in blocks of the entry's own size
    feature: Tensor  # (b n f) of the text before the chunk, if it is read

    def of(self, chunk: Tensor) -> Context:
        """The context of some chunks only. chunk: (b k) positions in the window."""
        return self._by_chunk(lambda x: take_rows(x, chunk))

    def first(self, chunks: int) -> Context:
        """The context of the first chunks of the window."""
        return self._by_chunk(lambda x: x[:, :chunks])

    def _by_chunk(self, select: Callable[[Tensor], Tensor]) -> Context:
        fields = ("summary", "visible", "distance", "feature")  # those of a chunk, not of an entry
        return self._replace(**{name: select(getattr(self, name)) for name in fields})


class RelativeBias(nn.Module):
    """A learned bias for each (head, level, distance in blocks): exact near, bounded far."""

    def __init__(self, heads: int, hierarchy: HierarchyConfig):
        super().__init__()
        self.distances = hierarchy.capacity + 1
        self.table = nn.Parameter(torch.zeros((hierarchy.levels + 1) * self.distances, heads))

    def forward(self, level: Tensor, distance: Tensor) -> Tensor:
        """level (b c), distance (b q c) -> (b h q c)."""
        index = level[:, None, :] * self.distances + distance.clamp(max=self.distances - 1)
        return rearrange(F.embedding(index, self.table), "b q c h -> b h q c")


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(e) + bias) v over the visible entries. (b q d), (b c d) -> (b q d)."""
    q, k, v = (rearrange(x, "b t (h e) -> b h t e", h=heads) for x in (query, key, value))
    bias = bias.masked_fill(~mask[:, None], float("-inf"))
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), "b h t e -> b t (h e)")


def after_start(kept: Tensor, new: Tensor) -> Tensor:
    """Order entries as [document start, kept ones, new ones]; `new` holds the start first."""
    return torch.cat([new[:, :1], kept, new[:, 1:]], dim=1)


class ContextLayer(nn.Module):
    """Pre-norm attention over the visible entries and itself, then a GELU MLP."""

    def __init__(self, config: PriorConfig, hierarchy: HierarchyConfig):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm = nn.LayerNorm(d)
        self.query, self.key_value = nn.Linear(d, d), nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, d)
        self.bias = RelativeBias(config.heads, hierarchy)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, kept: Tensor, mask: Tensor, level: Tensor, distance: Tensor) -> Tensor:
        """x: (b q d) new entries; kept: (b c d) older ones; mask, distance: (b q c+q)."""
        new = self.norm(x)
        key, value = self.key_value(after_start(self.norm(kept), new)).chunk(2, dim=-1)
        attended = attend(self.query(new), key, value, self.bias(level, distance), mask, self.heads)
        x = x + self.out(attended)
        return x + self.mlp(x)


class Contextualiser(nn.Module):
    """Latents and their summaries -> one context per chunk, causal, state in and state out."""

    def __init__(
        self, config: PriorConfig, hierarchy: HierarchyConfig, latent_dim: int, feature_dim: int = 0
    ):
        """feature_dim: of what the encoder knows after each chunk; 0: latents are all there is."""
        super().__init__()
        self.config, self.hierarchy, self.feature_dim = config, hierarchy, feature_dim
        d = config.width
        self.embed = nn.Linear(latent_dim, d)
        self.embed_feature = nn.Linear(feature_dim, d, bias=False) if config.reads_text else None
        self.level = nn.Embedding(hierarchy.levels + 1, d)
        self.start = nn.Parameter(torch.randn(d) * 0.02)  # what every document begins with
        self.layers = nn.ModuleList(ContextLayer(config, hierarchy) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)

    def initial_state(self, batch: int, device: torch.device | None = None) -> ContextState:
        """Nothing written yet."""
        c, levels = self.hierarchy.capacity, self.hierarchy.levels
        d, z = self.config.width, self.embed.in_features
        empty = torch.zeros(batch, c, dtype=torch.long, device=device)
        return ContextState(
            hidden=torch.zeros(batch, c, len(self.layers) + 1, d, device=device),
            entries=Entries(empty, empty, empty - 1),
            written=torch.zeros(batch, dtype=torch.long, device=device),
            partial=torch.zeros(batch, levels, z, device=device),
            latest=torch.zeros(batch, d, device=device),
            feature=torch.zeros(batch, self.feature_dim, device=device),
        )

    def forward(
        self,
        latents: Tensor,
        mask: Tensor,
        doc_start: Tensor,
        state: ContextState,
        features: Tensor | None = None,
    ) -> tuple[Context, ContextState]:
        """Context of each chunk of a window, and of the one that follows it.

        latents: (b n z) clean and normalised; mask, doc_start: (b n);
        features: (b n f) of the text up to the end of each chunk, where feature_dim is not 0.
        Context i is a function of latents before i alone; there are n + 1 of them, the last for the
        chunk after the window. Padded chunks get a finite context that means nothing.
        """
        b, n, _ = latents.shape
        if mask.shape != (b, n) or doc_start.shape != (b, n):
            raise ValueError(
                f"mask and doc_start must be (b n) = {(b, n)}, got {tuple(mask.shape)} and {tuple(doc_start.shape)}"
            )
        steps = walk(doc_start, mask, state.written)
        means, blocks, partial = summaries(latents, mask, steps, state.partial, self.hierarchy)
        if features is None or not self.feature_dim:
            features = latents.new_zeros(b, n, self.feature_dim)
        x = self._embed(latents, features, means, blocks)
        new = _new_entries(steps, mask, blocks)
        keys = Entries(*(after_start(kept, born) for kept, born in zip(state.entries, new, strict=True)))
        hidden = self._run_layers(x, new, keys, state)
        context = self._contexts(hidden[:, :, -1], features, keys, mask, doc_start, steps, state)
        newest = context.of(mask.sum(dim=1, keepdim=True))  # of the chunk that follows the window
        kept_hidden, entries = self._keep(after_start(state.hidden, hidden), keys, steps)
        next_state = ContextState(
            hidden=kept_hidden,
            entries=entries,
            written=steps.written,
            partial=partial,
            latest=newest.summary[:, 0],
            feature=newest.feature[:, 0],
        )
        return context, next_state

    def _embed(self, latents: Tensor, features: Tensor, means: Tensor, blocks: Entries) -> Tensor:
        """New entries as the first layer sees them (b q d): [document start, latents, summaries]."""
        x = self.embed(latents) + self.level.weight[0]
        if self.embed_feature is not None:
            x = x + self.embed_feature(features)
        start = self.start.expand(len(latents), 1, -1)
        return torch.cat([start, x, self.embed(means) + self.level(blocks.level)], dim=1)

    def _run_layers(self, x: Tensor, new: Entries, keys: Entries, state: ContextState) -> Tensor:
        """Input of each layer, and the output, of the new entries x (b q d). (b q layers+1 d)."""
        sees = visible(new.end, new.document, keys, self.hierarchy) & (keys.document >= 0)[:, None]
        # Everyone sees itself and the document start, which sees itself alone.
        itself = torch.eye(new.end.shape[1], dtype=torch.bool, device=x.device)
        itself[0, 0] = False  # the start stands in column 0, before the kept entries
        sees[:, :, state.entries.end.shape[1] :] |= itself
        sees[:, :, 0] = True
        distance = distance_in_blocks(new.end, keys, self.hierarchy)
        hidden = [x]
        for index, layer in enumerate(self.layers):
            x = layer(x, state.hidden[:, :, index], sees, keys.level, distance)
            hidden.append(x)
        hidden[-1] = self.norm(x)
        return torch.stack(hidden, dim=2)

    def _contexts(
        self,
        outputs: Tensor,
        features: Tensor,
        keys: Entries,
        mask: Tensor,
        doc_start: Tensor,
        steps: Walk,
        state: ContextState,
    ) -> Context:
        """The n + 1 contexts, from the outputs (b q d) at the new entries.

        That of chunk i has the output at chunk i-1 of its document, or at its start. Slot `count` speaks of the
        chunk that follows the window; beyond it is padding.
        """
        n, opening = mask.shape[1], outputs[:, :1]
        carried = torch.where((state.written > 0)[:, None], state.latest, opening[:, 0])
        before = torch.cat([carried[:, None], outputs[:, 1 : n + 1]], dim=1)
        fresh = F.pad(doc_start & mask, (0, 1))
        text = torch.cat([state.feature[:, None], features], dim=1)
        known = visible(steps.position, steps.document, keys, self.hierarchy)
        known &= (keys.document >= 0)[:, None]
        known[:, :, 0] = True
        return Context(
            summary=torch.where(fresh[..., None], opening, before),
            memory=after_start(state.hidden[:, :, -1], outputs),
            visible=known,
            level=keys.level,
            distance=distance_in_blocks(steps.position, keys, self.hierarchy),
            feature=text * ~fresh[..., None],
        )

    def _keep(self, hidden: Tensor, keys: Entries, steps: Walk) -> tuple[Tensor, Entries]:
        """Of all entries those that may still be looked at, hidden (b c layers+1 d) and where they stand.

        The open document becomes document 0 of the next window.
        """
        needed = still_needed(steps.written, steps.open_document, keys, self.hierarchy)
        needed &= keys.document >= 0
        order = (~needed).to(torch.int8).argsort(dim=1, stable=True)[:, : self.hierarchy.capacity]
        kept = needed.gather(1, order)
        rows = order[..., None, None].expand(-1, -1, *hidden.shape[2:])
        entries = Entries(
            level=keys.level.gather(1, order) * kept,
            end=keys.end.gather(1, order) * kept,
            document=torch.where(kept, 0, -1),
        )
        return hidden.gather(1, rows) * kept[..., None, None], entries


def _new_entries(steps: Walk, mask: Tensor, blocks: Entries) -> Entries:
    """Where new entries stand, in the order of `Contextualiser._embed`; each is born when complete."""
    n = mask.shape[1]
    zero = steps.written.new_zeros(len(mask), 1)
    document = torch.where(mask, steps.document[:, :n], -1)
    return Entries(
        level=torch.cat([zero, torch.zeros_like(document), blocks.level], dim=1),
        end=torch.cat([zero, steps.position[:, :n] + 1, blocks.end], dim=1),
        document=torch.cat([zero - 1, document, blocks.document], dim=1),
    )
