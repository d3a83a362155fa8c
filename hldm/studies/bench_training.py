"""How fast both stages and the twin train, and where the time of a step goes."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from hldm.chunking.chunker import make_chunker
from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import attach_segmenter
from hldm.config import ChunkingConfig, Config, DataConfig, LoggingConfig
from hldm.evaluation.tables import Table, row
from hldm.runs.clock import in_turns, median_ratio, timed
from hldm.runs.folder import Run
from hldm.runs.machine import peak_memory
from hldm.sources.corpora import load_corpus
from hldm.text.windows import Windows
from hldm.training.anomalies import TrainingDiverged
from hldm.training.optimizers import WARMUP
from hldm.training.segmenters import train_segmenter
from hldm.training.sizes import untrained
from hldm.training.stage import make_accelerator
from hldm.training.trainer import Trainer

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

GEMM_SIZE, GEMM_REPEATS = 1024, 20  # the peak: n^3 products in float32, the best of so many
WARM_UP_STEPS = 2  # before the clock starts: allocator, caches, optimizer state
PROFILED_STEPS = 3
SAVES = 3  # timed, of each
SEGMENTER_STEPS = 20  # a policy that has never moved starts everywhere or nowhere, whatever the threshold
STEP = "hldm.studies.bench: a training step"  # marks a step in the profile; its own time is what no operator took


@lru_cache(maxsize=2)  # both stages train on the same
def text_of(data: DataConfig, chunking: ChunkingConfig, seed: int) -> tuple[Windows, Segmenter | None]:
    """What a config trains on, and what cuts it: a segmenter that is hardly trained, None where it takes none."""
    corpus, segmenter = load_corpus(data, "train"), None
    if chunking.needs_segmenter:
        segmenter = train_segmenter(chunking, corpus, seed=seed, steps=SEGMENTER_STEPS, minutes=math.inf)
    chunker = make_chunker(chunking, segmenter)
    windows = Windows(corpus, chunker, lanes=data.lanes, window_bytes=data.window_bytes, seed=seed)
    return windows, segmenter


def trainer_of(config: Config, stage: str) -> Trainer:
    """What trains a stage ("autoencoder" or "prior"), with a run that writes nothing."""
    windows, segmenter = text_of(config.data, config.chunking, config.seed)
    training, objective = config.training.of(stage), untrained(config, stage)
    if segmenter is not None:
        attach_segmenter(objective.autoencoder, segmenter)
    trainer = Trainer(
        objective,
        windows,
        training,
        run=Run(Path(), is_main=False, say=print),
        seed=config.seed,
        checkpoint=config.checkpoint,
        logging=LoggingConfig(),
        accelerator=make_accelerator(training, LoggingConfig(), "."),
    )
    trainer.model.train()
    return trainer


# ---- speed, saving, profile


def gemm_peak(device: torch.device) -> float:
    """The most GFLOP/s that a large float32 matrix product reaches here, on the threads torch has."""
    a, b, c = torch.randn(3, GEMM_SIZE, GEMM_SIZE, device=device)
    seconds = min(timed(lambda: torch.mm(a, b, out=c))[1] for _ in range(GEMM_REPEATS))
    return 2 * GEMM_SIZE**3 / seconds / 1e9


def _step(trainer: Trainer) -> int:
    """A whole optimizer step as training takes it, at the peak learning rate; returns its characters."""
    before = trainer.totals.characters
    if trainer.step(WARMUP) is None:
        raise TrainingDiverged("a step was not finite and so was not whole: lower training's learning_rate")
    return trainer.totals.characters - before


def time_steps(stages: Mapping[str, Trainer], steps: int) -> dict[str, dict[str, Any]]:
    """Characters per second of each stage, and the ratio to the last one's: a median over turns."""
    turns = in_turns(
        {name: partial(_step, trainer) for name, trainer in stages.items()}, steps, WARM_UP_STEPS
    )
    rates = {name: [characters / seconds for characters, seconds in found] for name, found in turns.items()}
    return {
        name: {
            "parameters": sum(p.numel() for p in trainer.objective.parameters() if p.requires_grad),
            "characters_per_second": statistics.median(rates[name]),
            "characters_per_second_best": max(rates[name]),
            "ratio_to_twin": median_ratio(rates[name], rates[list(stages)[-1]]),
            "seconds_per_step": statistics.median(seconds for _, seconds in turns[name]),
        }
        for name, trainer in stages.items()
    }


def time_saving(trainer: Trainer, seconds_per_step: float) -> dict[str, float]:
    """Seconds of a checkpoint, the median of SAVES on the disk of the current folder, and their share of training."""
    run, seconds = trainer.run, []
    for _ in range(SAVES):
        # each in a folder of its own: a step that is saved already is not saved again
        with TemporaryDirectory(dir=".", prefix=".bench-") as folder:
            trainer.run = Run(Path(folder), is_main=True, say=print)
            seconds.append(timed(lambda: trainer.save(print))[1])
    trainer.run = run
    save = statistics.median(seconds)
    return {
        "seconds_per_save": save,
        "saving_share": save / (save + trainer.checkpoint.every * seconds_per_step),
    }


def memory_of(trainer: Trainer) -> dict[str, int] | None:
    """Bytes that training takes at its peak: those held from step to step, and those of a step; None off the CPU.

    Held are weights, their average, what the optimizers keep and what is carried from window to window; in a step
    come gradients and activations. Without what Python, torch and the text take.
    """
    _, step = peak_memory(partial(_step, trainer))
    if step is None or trainer.accelerator.device.type != "cpu":
        return None
    models = [trainer.objective, *([] if trainer.average is None else [trainer.average])]
    states = [list(optimizer.state.values()) for optimizer in trainer.optimizers]
    leaves = tree_leaves([[dict(model.state_dict()) for model in models], states, trainer.carries])
    size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
    return {"held_bytes": size, "step_bytes": step, "peak_bytes": size + step}


# An operator belongs to the first of these that matches it or one of its callers; see group_of.
_CALLERS = {
    "optimizer": r"Optimizer\.|aten::_foreach_|aten::_fused_adam",  # clipping and averaging, too
    "recurrence": r"ChunkedScan|OnePassScan|GatedScanFunction|CausalConvFunction",
    "attention": r"scaled_dot_product|ScaledDotProduct|aten::_softmax",
    "norm": r"RMSNormFunction|layer_norm|LayerNorm|rms_norm",
    "embedding": r"(?i:embedding)",
}
_MATRIX_PRODUCT = re.compile(r"aten::(mm|bmm|addmm_?|baddbmm_?)")
_COPY = re.compile(
    r"aten::(copy_?|_copy_from|clone|contiguous|to|_to_copy|cat|stack|repeat|reshape|(constant_)?pad(_nd)?|fill_?|zero_?|"
    r"(new_)?(zeros|ones|full|empty)(_like|_strided)?|(slice|select)_backward|resize_|"
    r"index|index_select|_?index_put(_impl)?_?|gather|scatter(_add)?_?)"
)
_VIEW = re.compile(
    r"aten::(view\w*|_unsafe_view|t|(un)?squeeze_?|transpose_?|permute|expand|slice|select|narrow|chunk|split\w*|unbind|"
    r"(un)?flatten|as_strided_?|unfold|diagonal|detach_?|alias|item|_local_scalar_dense|matmul|linear|is_nonzero|result_type)"
)
GROUPS = (
    "matrix products",
    *_CALLERS,
    "elementwise",  # and reductions
    "copies",
    "other",  # views, dispatch and autograd's own work
    "between operators",  # Python, and laying out the batch
)


def group_of(names: Sequence[str]) -> str:
    """Which of GROUPS an operator's own time belongs to; names: its callers from the outermost, then itself.

    A matrix product is one wherever it is called, except in the optimizer (Muon's are not the model's). Fused
    attention holds its own products.
    """
    own = names[-1]
    for group, pattern in _CALLERS.items():
        if group != "optimizer" and _MATRIX_PRODUCT.fullmatch(own):
            return "matrix products"
        if any(re.search(pattern, name) for name in names):
            return group
    if own == STEP:
        return "between operators"
    if "GeluGateFunction" in own:  # or its backward
        return "elementwise"
    if not own.startswith("aten::") or _VIEW.fullmatch(own):
        return "other"
    return "copies" if _COPY.fullmatch(own) else "elementwise"


def profile_steps(trainer: Trainer) -> dict[str, Any] | None:
    """Seconds a step by group, and the GFLOP of its matrix products, over a few steps; None off the CPU.

    The profiler's own cost makes steps longer, by a microsecond or two an operator: many small ones look worse.
    """
    if trainer.accelerator.device.type != "cpu":
        return None  # self CPU time would be the time of launching
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
        for _ in range(PROFILED_STEPS):
            with record_function(STEP):
                _step(trainer)
    return sum_by_group(seen.events() or [])


def sum_by_group(events: Iterable[FunctionEvent]) -> dict[str, Any]:
    """Self CPU time and floating point operations of profiled steps, a step."""
    seconds, flops = dict.fromkeys(GROUPS, 0.0), 0
    for event in events:
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        if names[-1] != STEP:
            continue  # the profiler's own
        group = group_of(names[::-1])
        seconds[group] += event.self_cpu_time_total / 1e6 / PROFILED_STEPS
        if group == "matrix products":
            # (n k) by (k m), in a batch or not, after what they are added to, if anything
            shapes: Any = event.input_shapes
            left, right = [shape for shape in shapes if len(shape) >= 2][-2:]
            flops += 2 * math.prod(left) * right[-1]
    return {"seconds": seconds, "matrix_gflop": flops / 1e9 / PROFILED_STEPS}


def rate_products(profile: dict[str, Any], seconds_per_step: float, peak: float) -> dict[str, Any]:
    """A profile with what its matrix products reach of the peak: while they run, and over the whole step.

    seconds_per_step: of a step without profiler
    """
    seconds, gflop = profile["seconds"]["matrix products"], profile["matrix_gflop"]
    return {
        **profile,
        "matrix_share": seconds / sum(profile["seconds"].values()),
        "peak_share_inside": gflop / seconds / peak,
        "peak_share_whole": gflop / seconds_per_step / peak,
    }


def measure(stages: Mapping[str, Trainer], steps: int) -> dict[str, Any]:
    """Speed, saving, memory and profile of every stage, the last being the twin's.

    And the peak that products are rated by.
    """
    device = next(iter(stages.values())).accelerator.device
    peak = gemm_peak(device)
    training = time_steps(stages, steps)
    for name, trainer in stages.items():
        figures = training[name]
        figures |= time_saving(trainer, figures["seconds_per_step"])
        figures |= {"memory": memory_of(trainer), "profile": profile_steps(trainer)}
    peak = max(peak, gemm_peak(device))  # before or after: whichever was disturbed less
    for figures in training.values():
        if figures["profile"] is not None:
            figures["profile"] = rate_products(figures["profile"], figures["seconds_per_step"], peak)
    return {"gemm_gflops": peak, "training": training}


def report(training: Mapping[str, Any]) -> Table:
    """What `measure` found of training."""
    rows = [
        row("training, characters per second", ",.0f", training, "characters_per_second"),
        row("  the best step", ",.0f", training, "characters_per_second_best"),
        row("  over the twin's", ".2f", training, "ratio_to_twin"),
        row("parameters trained", ",.0f", training, "parameters"),
        row("milliseconds a step", ",.1f", training, "seconds_per_step", scale=1e3),
        row("milliseconds a save", ",.1f", training, "seconds_per_save", scale=1e3),
        row("  share of training, at checkpoint.every", ".2%", training, "saving_share"),
        row("peak memory, MiB", ",.1f", training, "memory", "peak_bytes", scale=2**-20),
        row("  held from step to step", ",.1f", training, "memory", "held_bytes", scale=2**-20),
        row("matrix products, GFLOP a step", ",.2f", training, "profile", "matrix_gflop"),
        row("  share of the profiled step", ".1%", training, "profile", "matrix_share"),
        row("  of the peak, while they run", ".1%", training, "profile", "peak_share_inside"),
        row("  of the peak, over the whole step", ".1%", training, "profile", "peak_share_whole"),
        ["profiled step, milliseconds in", *("" for _ in training)],
        *(row(f"  {group}", ",.1f", training, "profile", "seconds", group, scale=1e3) for group in GROUPS),
    ]
    return Table(["", *training], rows)
