"""What the environment asks of accelerate and torch, held against the config: it may not change results unsaid.

`accelerate launch` and a user's shell set variables that `Accelerator` and torch read by themselves. Those that the
config answers, too, are compared with it and refused by name where they differ. Those that only change how numbers
are rounded are said in one line; environment.json keeps them with the run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hldm.config import ConfigError, LoggingConfig, TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

# How `accelerate launch` lets its processes know that weights or optimizer states are to be split over them.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
# How launchers say which process this is, and how many there are: torch's, accelerate's and those of MPI.
RANK, SIZES = "LOCAL_RANK", ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Those that `Accelerator` reads, by their beginnings: named where it cannot be made.
READ = (
    *("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "FORK_LAUNCHED", "TORCH_DISTRIBUTED_DEBUG"),
    *(RANK, "RANK", *SIZES),
)
# What torch and its libraries read themselves: faster or slower products, or products rounded otherwise.
ROUNDING = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_CUDNN_V8_API_DISABLED",
)
YES = ("1", "true", "yes", "y", "t", "on")  # as accelerate reads a flag


def launched_number(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """What a launcher's variable says, such as WORLD_SIZE. Raises ConfigError where that cannot be."""
    try:
        number = int(environment.get(name, default))
    except ValueError:
        number = default - 1
    if number < default:  # which is the least that a launcher sets
        raise ConfigError(f"{name}={environment[name]} is not what launchers set: unset it, or start by one")
    return number


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for a launch that this trainer cannot follow, before accelerate acts on it."""
    # plain training knows nothing of a MASTER_ADDR that a cluster's shell exports; the launcher sets both
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    if launched and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise ConfigError(
            "accelerate launch --cpu --num_processes N starts one process, not N: "
            "use `accelerate launch --multi_gpu --num_processes N` (it works on CPU, too)"
        )
    several = [name for name in SIZES if launched_number(name, 1, environment) > 1]
    several += [RANK] if launched_number(RANK, -1, environment) != -1 else []
    if several and not environment.get("MASTER_ADDR"):
        raise ConfigError(
            f"{several[0]}={environment[several[0]]} says that a launcher started this process, but it set no "
            f"MASTER_ADDR: use `accelerate launch --multi_gpu --num_processes N`, or unset {several[0]}"
        )
    for name, what in SHARDING.items():
        if environment.get(name, "").lower() in YES:
            raise ConfigError(
                f"accelerate was asked for {what} ({name}={environment[name]}), but every rank of this trainer "
                "keeps all weights: use `accelerate launch --multi_gpu` or a file of configs/accelerate"
            )


@contextmanager
def naming_variables(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Within: whatever accelerate says of its environment becomes one line that names the variables it read."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with=")  # refused by the caller
            yield
    except (ImportError, AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        found = [f"{name}={environment[name]}" for name in sorted(environment) if name.startswith(READ)]
        if isinstance(error, ConfigError) or not found:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"accelerate cannot start ({reason[:300]}); it read {', '.join(found)}: unset or mend what is wrong"
        ) from error


def check_training(config: TrainingConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where accelerate would train otherwise than the config says."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, has, way_out in (
        ("MIXED_PRECISION", config.mixed_precision, "set training.mixed_precision"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", "set training.accumulation, which keeps the gradient whole"),
        ("TORCH_DEVICE", device, "other devices lack float64 or operators used here"),
        ("FP8_BACKEND", "NO", "fp8 is not used"),
        ("DYNAMO_BACKEND", "NO", "this trainer compiles nothing"),
    ):
        name = f"ACCELERATE_{name}"
        asked = environment.get(name, has)
        if asked.lower().partition(":")[0] != has.lower():  # cuda:1 is cuda
            raise ConfigError(
                f"accelerate was asked for {name}={asked}, but this run has {has}: "
                f"{way_out}, and unset {name} or pass `accelerate launch` what the config says"
            )


def check_trackers(logging: LoggingConfig) -> None:
    """Raise ConfigError for a tracker that accelerate does not know, or whose package is missing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in logging.trackers:
        if name not in {"all", *LOGGER_TYPE_TO_CLASS}:
            raise ConfigError(f"logging.trackers must be among {sorted(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
        if name not in {"all", *there}:
            raise ConfigError(
                f"logging.trackers names {name}, which is not installed: install it or leave it out"
            )


def wrapped(accelerator: Accelerator, objective: Any) -> Any:
    """An objective as accelerate's processes share its gradients."""
    if accelerator.ddp_handler is not None:  # looking for them costs a walk through the graph every step
        accelerator.ddp_handler.find_unused_parameters = objective.may_leave_out
    with warnings.catch_warnings():
        # torch 2.13's new word for it, forward_sync_buffers, is not known to accelerate 1.15
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(objective)


def rounding_variables(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """NAME=value of every variable set here that makes torch round otherwise."""
    return (f"{name}={environment[name]}" for name in ROUNDING if name in environment)
