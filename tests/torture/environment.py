"""Variables that accelerate, torch, launchers and Python read: no effect, one line that names them, or refused so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hldm.training.stages  # noqa: F401 - here, not in every child
from tests.conftest import ROOT
from tests.torture import children, small
from tests.torture.trial import Trial

VALUES = ("", "0", "1", "2", "-1", "true", "no", "junk", "1e9")
# Read when a training opens, so that a fork of this process reads them.
READ_LATE = (
    *(f"ACCELERATE_USE_{name}" for name in ("CPU", "FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")),
    *(f"ACCELERATE_USE_{name}" for name in ("SAGEMAKER", "XPU", "IPEX", "TP")),
    *(f"ACCELERATE_DYNAMO_{name}" for name in ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC")),
    *(
        f"ACCELERATE_{name}"
        for name in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING")
    ),
    *(f"ACCELERATE_{name}" for name in ("TORCH_DEVICE", "FP8_BACKEND", "DEBUG_MODE", "CPU_AFFINITY")),
    *(
        f"ACCELERATE_{name}"
        for name in ("SPLIT_BATCHES", "DISPATCH_BATCHES", "EVEN_BATCHES", "DOWNCAST_BF16")
    ),
    *("ACCELERATE_DEEPSPEED_ZERO_STAGE", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "PARALLELISM_CONFIG_TP_SIZE"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED"),
    *("PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"),
    *(
        "PYTORCH_ENABLE_MPS_FALLBACK",
        "USE_TORCH_XLA",
        "HF_DATASETS_IN_MEMORY_MAX_SIZE",
        "TOKENIZERS_PARALLELISM",
    ),
    *("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "CUDA_VISIBLE_DEVICES", "HLDM_KERNELS"),
)
# Read when Python or a library starts: by processes of their own.
READ_EARLY = (
    *(("PYTHONOPTIMIZE", value) for value in ("1", "2")),
    *(("PYTHONWARNINGS", value) for value in ("error", "ignore")),
    *(("PYTHONIOENCODING", value) for value in ("ascii:strict", "utf-16", "latin-1")),
    *(("PYTHONHASHSEED", value) for value in ("0", "5")),
    *(("LC_ALL", value) for value in ("C", "POSIX", "junk", "tr_TR.UTF-8")),
    *(
        ("OMP_DYNAMIC", "true"),
        ("OMP_SCHEDULE", "dynamic,1"),
        ("OMP_WAIT_POLICY", "ACTIVE"),
        ("KMP_AFFINITY", "junk"),
    ),
    *(("MKL_NUM_THREADS", "junk"), ("MKL_CBWR", "COMPATIBLE"), ("ATEN_CPU_CAPABILITY", "default")),
    *(("ONEDNN_MAX_CPU_ISA", "SSE41"), ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"), ("TORCH_LOGS", "junk")),
    *(("TORCH_DISTRIBUTED_DEBUG", value) for value in ("DETAIL", "junk")),
    *(("TORCH_SHOW_CPP_STACKTRACES", "1"), ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"), ("PYTORCH_JIT", "0")),
    *(("TORCHDYNAMO_DISABLE", "1"), ("TORCH_COMPILE_DISABLE", "1"), ("CUBLAS_WORKSPACE_CONFIG", ":16:8")),
    *(
        ("ACCELERATE_LOG_LEVEL", "junk"),
        ("DIFFUSERS_SLOW_IMPORT", "junk"),
        ("HF_ENABLE_PARALLEL_LOADING", "junk"),
    ),
    *(
        ("HF_HOME", "/proc/none"),
        ("HOME", "/nonexistent"),
        ("TMPDIR", "/nonexistent"),
        ("CXX", "/nonexistent/g++"),
    ),
)
STAGE = "autoencoder"
FEW = (small.UNSAVED, f"training.{STAGE}.steps=3")
BARE = ("ACCELERATE_", "MASTER_", "PMI_", "OMPI_", "SLURM_")  # of none of these is there one to begin with


def torture(trial: Trial) -> None:
    for name in [name for name in os.environ if name.startswith(BARE)]:
        del os.environ[name]
    text = small.write_text(trial.folder)
    straight = small.train_straight(trial.folder / "straight", text, (STAGE,), *FEW)
    weights = small.outcome(straight, STAGE)["exported"]
    late = trial.sample([(name, value) for name in READ_LATE for value in VALUES])
    ends: dict[str, int] = {}
    for number, (name, value) in enumerate(late):
        folder, log = trial.folder / f"late-{number}", trial.folder / f"late-{number}.log"
        small.start_folder(folder, STAGE)
        work = small.train(folder, text, STAGE, *FEW)
        code = children.wait(children.fork(work, log, {name: value}), 120)
        check(trial, name, value, code, log.read_text(errors="replace"), folder, weights, ends)
    for number, (name, value) in enumerate(trial.sample(READ_EARLY)):
        folder = small.start_folder(trial.folder / f"early-{number}", STAGE)
        command = [sys.executable, str(small.SCRIPTS[STAGE]), *small.arguments(text, STAGE, *FEW)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), name: value}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=600)
        said = (done.stdout + done.stderr).replace(b"\0", b"").decode(errors="replace")
        check(trial, name, value, done.returncode, said, folder, weights, ends)
    trial.note = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


def check(
    trial: Trial,
    name: str,
    value: str,
    code: int,
    said: str,
    folder: Path,
    weights: str,
    ends: dict[str, int],
) -> None:
    """Record one training. weights: of a training without the variable;  ends: counts by how it ended."""
    wrong = ["a traceback"] if "Traceback" in said else []
    if code == 2:
        end = "refused by name"
        lines = [line for line in said.splitlines() if line.startswith("hldm: ")]
        if len(lines) != 1 or not (name in lines[0] or is_of_a_library(lines[0])):
            wrong.append(f"told without its name: {said[-500:]}")
    elif code:
        end = "broken"
        wrong.append(f"exit code {code}: {said[-500:]}")
    elif small.outcome(folder, STAGE)["exported"] == weights:
        end = "without effect"
    else:
        end = "said"
        if name not in said and "C++ kernels: " not in said:
            wrong.append("trained other weights without a word")
    ends[end] = ends.get(end, 0) + 1
    trial.record(f"{name}={value}", wrong)


def is_of_a_library(line: str) -> bool:
    """Whether it says that a library could not be imported, in that library's words."""
    return "hldm doctor" in line or "Invalid log settings" in line or "No such file or directory" in line
