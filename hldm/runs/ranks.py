"""The processes of a run: what they agree on, and which of them hangs or has died."""

from __future__ import annotations

import re
from datetime import timedelta

import torch
import torch.distributed as dist

from hldm.runs.exits import RunEnded

# Ranks that time out together do so within the difference of their steps.
ROLL_CALL = timedelta(seconds=2)

# In what gloo says: mostly the path of its source, but from within a backward pass without it.
GLOO_WORDS = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer")


class RankLost(RunEnded):
    """Another process of the run does not answer; this one cannot go on without it."""

    exit_code = 5
    is_agreed = False


def largest_of_ranks(value: int, device: torch.device) -> int:
    """The largest of the ranks' values, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def is_rank_failure(error: RuntimeError) -> bool:
    """Whether an error comes from a collective operation. Gloo's have no class of their own."""
    is_gloo = type(error) is RuntimeError and any(word in str(error) for word in GLOO_WORDS)
    return is_gloo or isinstance(error, dist.DistError)


def make_roll_call() -> dist.ProcessGroup | None:
    """A group of all ranks beside the one that trains, whose connections survive that one's failure."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo")


def missing_ranks(group: dist.ProcessGroup) -> str:
    """Which rank does not answer, e.g. "rank 1": rank 0 sees them all; the others see rank 0 or "another rank"."""
    try:
        dist.monitored_barrier(group, ROLL_CALL, wait_all_ranks=True)
    except RuntimeError as error:
        if found := re.search(r"Ranks? ([0-9][0-9, ]*) failed", str(error)):
            return f"rank {found[1].strip(' ,')}"
        if dist.get_rank() != 0 and "rank 0" in str(error):
            return "rank 0"
    return "another rank"
