"""Recurrent state is a value: nested tuples of tensors, rows first.

What every part carries from chunk to chunk: stacks, encoder, decoder, the context's pyramid; what the encoder makes of
a window; and what can be done to any such value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from hldm.model.hierarchy import Entries


class RecurrentState(NamedTuple):
    """What a recurrent block carries on."""

    hidden: Tensor  # (b d) float32, last state of the recurrence
    taps: Tensor  # (b k-1 d) float32, last inputs of the convolution; zeros before the document's start


class AttentionState(NamedTuple):
    """What an attention block carries on: the last s = window positions."""

    keys: Tensor  # (b s h e), not yet rotated: positions are relative to the call
    values: Tensor  # (b s h e)
    live: Tensor  # (b s) bool, whether the position belongs to the still open chunk


GriffinState = tuple[RecurrentState | AttentionState, ...]


class EncoderState(NamedTuple):
    """What the encoder carries from one stretch of text to the next."""

    griffin: GriffinState
    feature: Tensor  # (b d) at the last byte
    trunk: GriffinState  # one step a chunk; () without a trunk
    known: Tensor  # (b w) the summary before the next chunk: the trunk's output, without one the feature


class DecoderState(NamedTuple):
    """What the decoder carries from one stretch to the next."""

    griffin: GriffinState
    symbol: Tensor  # (b) last symbol written, the next step's input unless a unit starts


class ContextState(NamedTuple):
    """What generation remembers of the chunks written so far: O(log n) entries."""

    hidden: Tensor  # (b c layers+1 d) input of each layer, and the output, of every kept entry
    entries: Entries  # where the kept entries stand
    written: Tensor  # (b) chunks of the open document
    partial: Tensor  # (b levels z) sums of the blocks still open
    latest: Tensor  # (b d) output at the newest chunk
    feature: Tensor  # (b f) of the text so far, if it is read


class Encoding(NamedTuple):
    """One latent a chunk, and what the encoder knows of the text before and after each."""

    latents: Tensor  # (b n z) mu, normalised
    mask: Tensor  # (b n) bool, real chunks
    doc_start: Tensor  # (b n) bool, first chunk of a document
    after: Tensor  # (b n w) the summary after the chunk: the trunk's output there, or the encoder's
    before: Tensor  # (b n w) the summary before it; 0 at a document start
    features: Tensor  # (b t+1 d) encoder feature at the byte before the window, then at each of its bytes


def map_carry(fn: Callable[..., Tensor], *carries: Any) -> Any:
    """Apply fn to the tensors that share a place in carries of one shape; None stays None."""
    first = carries[0]
    if isinstance(first, Tensor):
        return fn(*carries)
    if first is None:
        return None
    parts = [map_carry(fn, *group) for group in zip(*carries, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def named_tensors(carry: Any, prefix: str = "carry") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a carry with its path, in the order that `map_carry` visits them."""
    if isinstance(carry, Tensor):
        yield prefix, carry
    elif carry is not None:
        names = getattr(carry, "_fields", range(len(carry)))
        for name, part in zip(names, carry, strict=True):
            yield from named_tensors(part, f"{prefix}.{name}")


def select_rows(condition: Tensor, yes: Any, no: Any) -> Any:
    """Row by row, one carry or the other. condition: (b) bool."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return a.where(condition.view(-1, *[1] * (a.ndim - 1)), b)

    return map_carry(choose, yes, no)


def pick_rows(carry: Any, index: Tensor) -> Any:
    """Some rows only, in this order. index: (k), or (b) bool."""
    return map_carry(lambda x: x[index], carry)


def put_rows(carry: Any, index: Tensor, rows: Any) -> Any:
    """The carry with some of its rows replaced. index: (k)."""
    return map_carry(lambda x, y: x.index_copy(0, index, y), carry, rows)
