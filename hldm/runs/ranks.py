"""The processes of a run: how they start, what they agree on, and which of them hangs or has died."""

from __future__ import annotations

import os
import re
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from hldm.config import ConfigError, LoggingConfig, TrainingConfig
from hldm.runs.exits import RunEnded

# Ranks that time out together do so within the difference of their steps.
ROLL_CALL = timedelta(seconds=2)

# In what gloo says: mostly the path of its source, but from within a backward pass without it.
GLOO_WORDS = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer")


# How `accelerate launch` tells its processes that weights or optimizer states are to be split over them.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism config",
}


class RankLost(RunEnded):
    """Another process of the run does not answer; this one cannot go on without it."""

    exit_code = 5
    is_agreed = False


def make_accelerator(config: TrainingConfig, logging: LoggingConfig, folder: str) -> Accelerator:
    """One process or many, CPU or not, from the environment that `accelerate launch` set."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch --cpu --num_processes N starts one process, not N: "
            "use `accelerate launch --multi_gpu --num_processes N` (it works on CPU, too)"
        )
    for name, what in SHARDING.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"accelerate was asked for {what}, but every rank of this trainer keeps all weights: "
                "use `accelerate launch --multi_gpu` or a file of configs/accelerate"
            )
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # other accelerators lack float64 or operators used here
        mixed_precision=config.mixed_precision,
        log_with=list(logging.trackers) or None,
        project_dir=folder,
        # Buffers hold sums of each rank's own rows; the objectives add them up in end_step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_s)),
        ],
    )


def largest(accelerator: Accelerator, value: int) -> int:
    """The largest of the ranks' values."""
    if accelerator.num_processes == 1:
        return value
    found = torch.tensor(value, device=accelerator.device)
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
    """Who does not answer, e.g. "rank 1": rank 0 sees them all; the others see rank 0 or "another rank"."""
    try:
        dist.monitored_barrier(group, ROLL_CALL, wait_all_ranks=True)
    except RuntimeError as error:
        if found := re.search(r"Ranks? ([0-9][0-9, ]*) failed", str(error)):
            return f"rank {found[1].strip(' ,')}"
        if dist.get_rank() != 0 and "rank 0" in str(error):
            return "rank 0"
    return "another rank"
