"""The seed of every row that is written, from a number or from generators of the caller."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch

MAX_SEED = 2**31  # torch's generator keeps 32 bits on a CPU, silently, and each of several texts adds one


def row_seeds(
    seed: int, generator: torch.Generator | Sequence[torch.Generator] | None, rows: int
) -> list[int]:
    """The seed of every row: seed + row, seed drawn by a generator if there is one; each of several draws its row's.

    Raises ValueError for a seed out of range, or another number of generators than rows.
    """
    if generator is None or isinstance(generator, torch.Generator):
        first = index(seed) if generator is None else _drawn_seed(generator)
        if not 0 <= first < MAX_SEED:
            raise ValueError(f"seed must lie in 0..2^31-1, got {first}")
        return [first + row for row in range(rows)]
    if len(generator) != rows:
        raise ValueError(f"a list of generators holds one for each text, got {len(generator)} for {rows}")
    return [_drawn_seed(each) for each in generator]


def _drawn_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))
