"""The context of one chunk more, in a single call of C++: contextualiser, and the denoiser's conditioning on it.

The same as `hldm.model.contextualiser` and `Prior.condition` for a window of one chunk, up to rounding. Weights do not
change while a text is written, so an entry's keys and values are computed once, when it is made, and kept in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hldm.kernels.structs import run, struct, weights_of
from hldm.model.denoiser import BlockContext, Conditioning
from hldm.model.prior import Prior
from hldm.model.state import ContextState

MOST_CHUNKS = 2**40  # that a summary may stand for


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
        rows, heads = len(memory.written), prior.settings.heads
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
        width = prior.settings.width
        empty = (torch.zeros(rows, 4 * width), torch.zeros(rows, 2 * width), torch.zeros(rows, heads, places))
        conditioning = [part.clone() for _ in range(blocks) for part in empty]
        self._hold(prior, [half for pair in parts for half in pair], conditioning, tensors)

    def pick(self, rows: Tensor) -> KeptContext:
        """The past of some of these documents, in this order, each as often as named. rows: (k)."""
        other = object.__new__(KeptContext)
        pairs, conditioning, tensors = self._held
        picked = {name: x if name == "opening" else x[rows] for name, x in tensors.items()}
        other._hold(self.prior, [x[rows] for x in pairs], [x[rows] for x in conditioning], picked)
        return other

    def _hold(
        self, prior: Prior, pairs: list[Tensor], conditioning: list[Tensor], tensors: dict[str, Tensor]
    ) -> None:
        """What the kernel reads and writes over.

        pairs: keys and values (b heads places e) of each layer, then of each block; conditioning: three for each block
        """
        self.prior, self._held = prior, (pairs, conditioning, tensors)
        context: Any = prior.contextualiser
        denoiser: Any = prior.denoiser
        blocks, width = len(denoiser.blocks), prior.settings.width
        rows, heads, places, _ = pairs[0].shape
        self.conditioning = Conditioning(
            None if prior.mixture is None else tensors["log_weights"][:, None, None],
            tuple(
                BlockContext(shared[:, None, None], gates[:, None, None], key, value, bias[:, :, None])
                for shared, gates, bias, key, value in zip(
                    conditioning[::3],
                    conditioning[1::3],
                    conditioning[2::3],
                    pairs[2 * len(context.layers) :: 2],
                    pairs[2 * len(context.layers) + 1 :: 2],
                    strict=True,
                )
            ),
        )
        self._call = struct("context.cpp", "Contexting")(
            rows=rows,
            z=prior.latent_dim,
            d=prior.settings.width,
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
            pairs=pairs,
            conditioning=conditioning,
            **tensors,
            **_parameters(prior),
        )

    def add(self, latents: Tensor, after: Tensor, closed: Tensor) -> Conditioning:
        """The denoiser's conditioning for the next chunk, in the memory of the one before.

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
        return self.conditioning


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
