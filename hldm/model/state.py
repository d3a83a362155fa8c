"""Recurrent state is a value: nested tuples of tensors, rows first. What can be done to any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


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


def take_rows(carry: Any, index: Tensor) -> Any:
    """Some rows only, in this order. index: (k), or (b) bool."""
    return map_carry(lambda x: x[index], carry)


def put_rows(carry: Any, index: Tensor, rows: Any) -> Any:
    """The carry with some of its rows replaced. index: (k)."""
    return map_carry(lambda x, y: x.index_copy(0, index, y), carry, rows)
