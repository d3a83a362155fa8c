"""The context of one chunk more, in a single call of C++: contextualiser, and what the denoiser is told of it.

What `hldm.model.contextualiser` and `Prior.tell` do for a window of one chunk, to rounding. Weights do not change while
a text is written, so an entry's keys and values are worked out once, when it is born, and kept instead of it.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hldm.kernels.structs import run, struct, weights_of
from hldm.model.denoiser import BlockContext, Told
from hldm.model.prior import Prior
from hldm.model.state import ContextState

MOST_CHUNKS = 2**40  # that a summary may stand for
_BY_ROW = (
    "level",
    "end",
    "written",
    "partial",
    "latest",
    "feature",
    "log_weights",
)  # of `KeptContext`, beside lists


def _parameters(prior: Any) -> dict[str, list[Tensor | None]]:
    """What the kernel reads, by the names in `Contexting` of hldm/kernels/cpp/context.cpp; None: no such part."""
    context, mixture = prior.contextualiser, prior.mixture
    layers: list[Tensor | None] = []
    blocks: list[Tensor | None] = []
    for layer in context.layers:
        attention = (layer.norm, layer.query, layer.key_value, layer.out)
        layers += [*weights_of(*attention, layer.mlp[0], layer.mlp[1], layer.mlp[3]), layer.bias.table]
    for block in prior.denoiser.blocks:
        blocks += [*weights_of(block.key_value, block.from_context), block.bias.table]
    feature = None if context.embed_feature is None else context.embed_feature.weight
    return {
        "ends": [*weights_of(context.embed), context.level.weight, *weights_of(context.norm), feature],
        "layer": layers,
        "block": blocks,
        "mixture": []
        if mixture is None
        else weights_of(mixture.weigh[0], mixture.weigh[1], mixture.weigh[3]),
    }


class KeptContext:
    """The past of a batch of documents as the denoiser and the next chunk see it, in places that are written over.

    Not a value as other states are: with many rows, to copy it would take longer than the step.
    """

    def __init__(self, prior: Prior, memory: ContextState):
        """memory: where `Contextualiser` left off, left as it is."""
        context: Any = prior.contextualiser  # Any: modules in lists have no type of their own
        denoiser: Any = prior.denoiser
        rows, heads, d = len(memory.written), prior.settings.heads, prior.settings.width
        start = _start(context)
        kept = torch.cat([start.expand(rows, 1, -1, -1), memory.hidden], dim=1)  # (b places layers+1 d)
        pairs = [layer.key_value(layer.norm(kept[:, :, i])) for i, layer in enumerate(context.layers)]
        pairs += [block.key_value(kept[:, :, -1]) for block in denoiser.blocks]
        parts = [
            rearrange(pair, "b c (two h e) -> two b h c e", two=2, h=heads).contiguous() for pair in pairs
        ]
        places, blocks = kept.shape[1], len(denoiser.blocks)
        zero = torch.zeros(rows, 1, dtype=torch.long)
        opening = start[0, -1].contiguous()
        is_empty = memory.entries.document < 0
        tensors = {
            "opening": opening,
            "level": torch.cat([zero, memory.entries.level], dim=1),
            "end": torch.cat([zero, memory.entries.end.masked_fill(is_empty, -1)], dim=1),
            "written": memory.written.clone(),
            "partial": memory.partial.clone(memory_format=torch.contiguous_format),
            "latest": torch.where((memory.written > 0)[:, None], memory.latest, opening),
            "feature": memory.feature.clone(memory_format=torch.contiguous_format),
            "log_weights": torch.zeros(rows, 0 if prior.mixture is None else len(prior.mixture.prototypes)),
        }
        width = prior.settings.denoiser_width
        empty = (torch.zeros(rows, 4 * width), torch.zeros(rows, 2 * width), torch.zeros(rows, heads, places))
        told = [[part.clone() for part in empty] for _ in range(blocks)]
        self._call = struct("context.cpp", "Contexting")(
            rows=rows,
            z=prior.latent_dim,
            d=d,
            heads=heads,
            features=context.feature_dim,
            levels=prior.hierarchy.levels,
            ratio=prior.hierarchy.ratio,
            window=prior.hierarchy.window,
            places=places,
            layers=len(context.layers),
            blocks=blocks,
            denoiser_width=width,
            components=tensors["log_weights"].shape[1],
            logit_cap=0.0 if prior.mixture is None else prior.mixture.logit_cap,
            pairs=[half for pair in parts for half in pair],
            told=[part for block in told for part in block],
            **tensors,
            **_parameters(prior),
        )
        self.layers = len(context.layers)
        self.told = self._as_told()

    def _as_told(self) -> Told:
        """What the kernel writes, as `Prior.tell` would give it: views, which change with every chunk."""
        kept = self._call.kept
        pairs, told, log_weights = kept["pairs"][2 * self.layers :], kept["told"], kept["log_weights"]
        blocks = [
            BlockContext(shared[:, None, None], gates[:, None, None], key, value, bias[:, :, None])
            for shared, gates, bias, key, value in zip(
                told[::3], told[1::3], told[2::3], pairs[::2], pairs[1::2], strict=True
            )
        ]
        return Told(log_weights[:, None, None] if log_weights.shape[1] else None, tuple(blocks))

    def pick(self, index: Tensor) -> None:
        """Go on with these rows in place of all, a row as often as it is named. index: (b')"""
        kept = self._call.kept
        rows = {name: kept[name][index] for name in _BY_ROW}
        lists = {name: [part[index] for part in kept[name]] for name in ("pairs", "told")}
        self._call.fill(rows=len(index), **rows, **lists)
        self.told = self._as_told()

    def add(self, latents: Tensor, after: Tensor, closed: Tensor) -> Told:
        """What the denoiser is told of the next chunk's past, in the memory of what it was told before.

        latents: (b z) of the chunks just written;  after: (b f) of the text up to their ends, where it is read
        closed: (b) whether a chunk was its document's last, so that the next chunk has no past
        """
        call = self._call
        assert latents.shape == (call.rows, call.z) and closed.shape == (call.rows,)
        assert not call.features or after.shape == (call.rows, call.features)
        call.fill(
            latents=latents.float().contiguous(), after=after.float().contiguous(), closed=closed.contiguous()
        )
        run("hldm_context", call)
        return self.told


def _start(context: Any) -> Tensor:
    """What every layer, and the output, make of a document's start. (1 layers+1 d)."""
    x, zero = context.start[None, None], torch.zeros(1, 1, dtype=torch.long)
    itself, nothing = torch.ones(1, 1, 1, dtype=torch.bool), x[:, :0]
    hidden = [x]
    for layer in context.layers:
        x = layer(x, nothing, itself, zero, zero[None])
        hidden.append(x)
    hidden[-1] = context.norm(x)
    return torch.cat(hidden, dim=1)
