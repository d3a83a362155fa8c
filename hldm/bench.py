"""`hldm bench`: how fast both stages and the twin train and write on this machine, and where the time goes.

Speeds on a shared machine wander by tens of per cent from minute to minute. So whatever is compared here is measured
in one process and in turns, a step of each again and again, and every figure stands beside its twin's. Models are
untrained: a step costs the same whatever it has learned. Imports torch only once there is work to do.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hldm.config import Config, ConfigError, LoggingConfig, load_config
from hldm.reports import check_report_path, save_report

if TYPE_CHECKING:
    import torch
    from torch.autograd.profiler_util import FunctionEvent

    from hldm.autoencoder import Autoencoder
    from hldm.corpus import Corpus
    from hldm.data import Windows
    from hldm.generation import Writer
    from hldm.objectives import AutoencoderObjective, PriorObjective
    from hldm.prior import Prior
    from hldm.training import Trainer

GEMM_SIZE, GEMM_REPEATS = 1024, 20  # the peak: n^3 products in float32, the best of so many
WARM_UP_STEPS = 2  # before the clock starts: allocator, caches, optimizer state
PROFILED_STEPS = 3
SAVES = 3  # timed, of each
WRITTEN_CHARACTERS = 400  # of each continuation, at least
WRITING = {  # continuations at once, bytes of the prompt that each goes on from
    "batch_1": (1, 200),
    "batch_8": (8, 200),
    "long_prompt": (1, 20_000),
}
STEP = "hldm.bench: a training step"  # marks a step in the profile; its own time is what no operator took


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises ValueError or OSError, told in one line by whoever calls."""
    parser = argparse.ArgumentParser(
        prog="hldm bench", description="Measure the speed of training and generation, beside the twin's."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="e.g. configs/tiny.yaml")
    what.add_argument(
        "--layers", action="store_true", help="scan, layers and a byte's step instead of training"
    )
    parser.add_argument("--twin", type=Path, metavar="FILE", help="default: <config>-twin.yaml beside it")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed, of each (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    arguments = parser.parse_args(argv)
    path, target = arguments.config, arguments.json
    if arguments.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {arguments.steps}")
    if target is not None:
        check_report_path(target, "RG-LRU" if arguments.layers else "bytes_per_step")
    if arguments.layers:
        from hldm import bench_layers

        layers = bench_layers.measure(repeats=arguments.steps)
        if target is not None:
            save_report(target, layers)
        print(bench_layers.report(layers))
        return 0
    config = load_config(path)
    twin = load_config(arguments.twin or path.with_name(f"{path.stem}-twin{path.suffix}"))
    found = measure(config, twin, steps=arguments.steps)
    if target is not None:
        save_report(target, found)
    print(report(found))
    return 0


def measure(config: Config, twin: Config, *, steps: int = 10) -> dict[str, Any]:
    """Everything about a config and its twin, as plain numbers. `report` makes tables of it.

    Raises ConfigError unless the one has latents and the other has none.
    """
    if config.is_twin or not twin.is_twin:
        raise ConfigError(
            f"a bench needs a config with latents and a twin without, got autoencoder.latent_dim "
            f"{config.autoencoder.latent_dim} in {config.name} and {twin.autoencoder.latent_dim} in {twin.name}"
        )
    # else the profiler tells standard error whenever it starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from hldm.corpus import load_corpus
    from hldm.runs import describe_environment

    corpora = {data: load_corpus(data, "train") for data in {config.data, twin.data}}
    corpus = corpora[config.data]
    torch.manual_seed(config.seed)
    windows, twin_windows = _windows(config, corpus), _windows(twin, corpora[twin.data])
    stages = {
        "stage one": _trainer(config, "autoencoder", _stage_one(config), windows),
        "stage two": _trainer(config, "prior", _stage_two(config, windows), windows),
        "twin": _trainer(twin, "autoencoder", _stage_one(twin), twin_windows),
    }
    device = stages["twin"].accelerator.device
    peak = gemm_peak(device)
    training = time_steps(stages, steps)
    for name, trainer in stages.items():
        training[name] |= time_saving(trainer, training[name]["seconds_per_step"])
    profiles = {name: profile_steps(trainer) for name, trainer in stages.items()}
    peak = max(peak, gemm_peak(device))  # before or after: whichever was disturbed less
    for name, found in training.items():
        profile = profiles[name]
        found["profile"] = profile and rate_products(profile, found["seconds_per_step"], peak)

    model, plain = stages["stage two"].objective, stages["twin"].objective
    for autoencoder in (model.autoencoder, plain.autoencoder):
        write_like(autoencoder, corpus, windows.chunks)
    model.eval()
    plain.eval()
    environment = describe_environment()
    machine = {name: environment[name] for name in ("cpu", "cores", "threads", "torch", "platform", "commit")}
    return {
        "machine": {**machine, "device": str(device), "gemm_gflops": peak},
        "config": config.name,
        "steps": steps,
        "bytes_per_step": config.data.lanes * config.data.window_bytes,
        "training": training,
        "generation": time_writing(
            {
                "model": (model.autoencoder, model.prior, config),
                "twin": (plain.autoencoder, None, twin),
            },
            corpus,
        ),
    }


# ---- the parts, as hldm.stages puts them together


def _windows(config: Config, corpus: Corpus) -> Windows:
    from hldm.chunking import make_chunker
    from hldm.data import Windows

    data = config.data
    if config.chunking.needs_segmenter:
        raise ConfigError(
            f"hldm bench trains nothing, so no segmenter: chunking.strategy={config.chunking.strategy} has no figures"
        )
    chunker = make_chunker(config.chunking)
    return Windows(corpus, chunker, lanes=data.lanes, window_bytes=data.window_bytes, seed=config.seed)


def _prior(config: Config) -> Prior:
    from hldm.prior import Prior

    return Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)


def _stage_one(config: Config) -> AutoencoderObjective:
    from hldm.autoencoder import Autoencoder
    from hldm.objectives import AutoencoderObjective

    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
    if config.training.autoencoder.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    light = config.autoencoder.rate == "diffusion" and not config.is_twin
    prior = _prior(config) if light else None
    return AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0, prior)


def _stage_two(config: Config, windows: Windows) -> PriorObjective:
    import numpy as np

    from hldm.autoencoder import Autoencoder
    from hldm.objectives import CachedLatents, PriorObjective

    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
    latents = None
    if config.data.cache_latents:
        shape = (windows.chunks, config.autoencoder.latent_dim)
        latents = CachedLatents(np.random.default_rng(config.seed).standard_normal(shape, np.float32))
    return PriorObjective(_prior(config), autoencoder, config.training.prior.joint, latents)


def _trainer(config: Config, stage: str, objective: Any, windows: Windows) -> Trainer:
    """What trains a stage, with a run that writes nothing."""
    from hldm.runs import Run
    from hldm.training import Trainer, make_accelerator

    training = getattr(config.training, stage)
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


# ---- training


def gemm_peak(device: torch.device) -> float:
    """The most GFLOP/s that a large float32 matrix product reaches here, on the threads torch has."""
    import torch

    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, device=device)
    seconds = min(_seconds(lambda: torch.mm(a, b)) for _ in range(GEMM_REPEATS))
    return 2 * GEMM_SIZE**3 / seconds / 1e9


def _seconds(work: Callable[[], Any]) -> float:
    """Wall clock of a piece of work, that of an accelerator included."""
    began = time.perf_counter()
    work()
    _wait_for_device()
    return time.perf_counter() - began


def _wait_for_device() -> None:
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _step(trainer: Trainer) -> None:
    """A whole optimizer step as training takes it, at the peak learning rate."""
    from hldm.training import TrainingDiverged

    if trainer.step(trainer.config.warmup) is None:
        raise TrainingDiverged("a step was not finite and so was not whole: lower training's learning_rate")


def time_steps(stages: Mapping[str, Trainer], steps: int) -> dict[str, dict[str, Any]]:
    """Characters per second of each stage, their steps taken in turns, and the ratio to the last one's.

    The ratio is the median over turns: what slows a turn slows both halves of it.
    """
    rates: dict[str, list[float]] = {name: [] for name in stages}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for turn in range(-WARM_UP_STEPS, steps):
        for name, trainer in stages.items():
            before = trainer.totals.characters
            took = _seconds(partial(_step, trainer))
            if turn >= 0:
                seconds[name].append(took)
                rates[name].append((trainer.totals.characters - before) / took)
    last = rates[list(stages)[-1]]
    return {
        name: {
            "parameters": sum(p.numel() for p in trainer.objective.parameters() if p.requires_grad),
            "characters_per_second": statistics.median(rates[name]),
            "characters_per_second_best": max(rates[name]),
            "ratio_to_twin": statistics.median(a / b for a, b in zip(rates[name], last, strict=True)),
            "seconds_per_step": statistics.median(seconds[name]),
        }
        for name, trainer in stages.items()
    }


def time_saving(trainer: Trainer, seconds_per_step: float) -> dict[str, float]:
    """Seconds of a checkpoint, the median of SAVES on the disk of the current folder, and their share of training."""
    from hldm.runs import Run

    run, seconds = trainer.run, []
    for _ in range(SAVES):
        # each in a folder of its own: a step that is saved already is not saved again
        with TemporaryDirectory(dir=".", prefix=".bench-") as folder:
            trainer.run = Run(Path(folder), is_main=True, say=print)
            seconds.append(_seconds(lambda: trainer.save(print)))
    trainer.run = run
    save = statistics.median(seconds)
    return {
        "seconds_per_save": save,
        "saving_share": save / (save + trainer.checkpoint.every * seconds_per_step),
    }


# Who an operator works for is the first of these that knows it or one of its callers; see group_of.
_CALLERS = {
    "optimizer": r"Optimizer\.|aten::_foreach_|aten::_fused_adam",  # clipping and averaging, too
    "recurrence": r"_ChunkedScan|_CppScan|GatedDecayFunction|GatedScanFunction|CausalConvFunction",
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
    if own.startswith("hldm::"):
        return "elementwise"
    if not own.startswith("aten::") or _VIEW.fullmatch(own):
        return "other"
    return "copies" if _COPY.fullmatch(own) else "elementwise"


def profile_steps(trainer: Trainer) -> dict[str, Any] | None:
    """Seconds a step by group, and the GFLOP of its matrix products, over a few steps; None off the CPU.

    The profiler's own cost makes steps longer, by a microsecond or two an operator: many small ones look worse.
    """
    if trainer.accelerator.device.type != "cpu":
        return None  # self CPU time would tell how long launching took
    from torch.profiler import ProfilerActivity, profile, record_function

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
    seconds = profile["seconds"]["matrix products"]
    inside, whole = profile["matrix_gflop"] / seconds, profile["matrix_gflop"] / seconds_per_step
    return {
        **profile,
        "matrix_share": seconds / sum(profile["seconds"].values()),
        "gflops_inside": inside,
        "peak_share_inside": inside / peak,
        "gflops_whole": whole,
        "peak_share_whole": whole / peak,
    }


# ---- generation


def write_like(autoencoder: Autoencoder, corpus: Corpus, chunks: int) -> None:
    """Make an untrained decoder write the corpus' bytes by frequency, whatever it reads, in chunks about as long.

    Its own chunks would have all the length they may, which flatters a model that pays by the chunk. Documents
    never end. And prompts of any length are continued by the same text, so that only its cost can differ.
    """
    import numpy as np
    import torch

    from hldm.text import END_OF_CHUNK

    count = torch.zeros_like(autoencoder.outputs.bias)
    count[:256] = torch.from_numpy(np.bincount(corpus.text, minlength=256))
    count[END_OF_CHUNK] = chunks
    with torch.no_grad():
        autoencoder.outputs.weight.zero_()
        autoencoder.outputs.bias.copy_(count.log())


class Continuing:
    """Prompts being continued, and what that has cost since the first piece."""

    def __init__(self, autoencoder: Autoencoder, prior: Prior | None, config: Config, prompts: list[bytes]):
        from hldm.generation import make_writer, row_generators

        # 1: `write_like` means its frequencies
        settings = replace(config.generation, decoder_temperature=1.0)
        generators = row_generators(config.seed, len(prompts))
        began = time.perf_counter()
        self.writer: Writer = make_writer(autoencoder, prior, prompts, settings, generators)
        _wait_for_device()
        self.reading_seconds = time.perf_counter() - began
        self.writer.write()  # warm-up
        self.calls_before, self.rows = self.writer.calls, len(prompts)
        self.characters, self.seconds = 0, 0.0

    def write(self) -> None:
        """One piece more a prompt."""
        from hldm.text import count_characters

        began = time.perf_counter()
        pieces = self.writer.write()
        _wait_for_device()
        self.seconds += time.perf_counter() - began
        self.characters += sum(count_characters(piece.text) for piece in pieces)

    def found(self) -> dict[str, float]:
        """The figures of `report`."""
        return {
            "characters_per_second": self.characters / self.seconds,
            "characters": self.characters,
            "denoiser_calls": self.writer.calls - self.calls_before,
            "reading_seconds": self.reading_seconds,
        }


def time_writing(
    models: Mapping[str, tuple[Autoencoder, Prior | None, Config]], corpus: Corpus
) -> dict[str, dict[str, Any]]:
    """Speed of every model in every case of WRITING, in turns: whoever has written least goes on.

    cost_growth: seconds per character after the long prompt, over those after the short one
    """
    import numpy as np
    import torch

    with torch.no_grad():
        cases = {
            (name, case): Continuing(*model, [np.resize(corpus.text, length).tobytes()] * rows)
            for case, (rows, length) in WRITING.items()
            for name, model in models.items()
        }
        while (least := min(cases.values(), key=lambda c: c.characters / c.rows)) and (
            least.characters < WRITTEN_CHARACTERS * least.rows
        ):
            least.write()
    found: dict[str, dict[str, Any]] = {
        name: {case: cases[name, case].found() for case in WRITING} for name in models
    }
    for figures in found.values():
        short, long = (figures[case]["characters_per_second"] for case in ("batch_1", "long_prompt"))
        figures["cost_growth"] = short / long
    return found


# ---- tables


def report(found: Mapping[str, Any]) -> str:
    """What `measure` found, as aligned tables; `-` where there is nothing."""
    machine, training, generation = found["machine"], found["training"], found["generation"]
    head = [
        f"{machine['cpu']}, {machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}",
        f"float32 matrix products of {GEMM_SIZE}^3 reach {machine['gemm_gflops']:,.1f} GFLOP/s: the peak below",
        f"{found['config']}: {found['bytes_per_step']:,} bytes a step, {found['steps']} steps of each, in turns",
    ]
    rows = [
        _row("training, characters per second", ",.0f", training, "characters_per_second"),
        _row("  the best step", ",.0f", training, "characters_per_second_best"),
        _row("  over the twin's", ".2f", training, "ratio_to_twin"),
        _row("parameters trained", ",.0f", training, "parameters"),
        _row("milliseconds a step", ",.1f", training, "seconds_per_step", scale=1e3),
        _row("milliseconds a save", ",.1f", training, "seconds_per_save", scale=1e3),
        _row("  share of training, at checkpoint.every", ".2%", training, "saving_share"),
        _row("matrix products, GFLOP a step", ",.2f", training, "profile", "matrix_gflop"),
        _row("  share of the profiled step", ".1%", training, "profile", "matrix_share"),
        _row("  of the peak, while they run", ".1%", training, "profile", "peak_share_inside"),
        _row("  of the peak, over the whole step", ".1%", training, "profile", "peak_share_whole"),
        ["profiled step, milliseconds in", *("" for _ in training)],
        *(_row(f"  {group}", ",.1f", training, "profile", "seconds", group, scale=1e3) for group in GROUPS),
    ]
    tables = ["\n".join(head), _align(["", *training], rows)]
    rows = []
    for case, (batch, length) in WRITING.items():
        label = f"writing {batch} after {length:,} bytes, characters per second"
        rows += [
            _row(label, ",.1f", generation, case, "characters_per_second"),
            _row("  characters written", ",.0f", generation, case, "characters"),
            _row("  denoiser calls", ",.0f", generation, case, "denoiser_calls"),
            _row("  seconds to read the prompt", ".3f", generation, case, "reading_seconds"),
        ]
    rows.append(_row("cost of a character, long prompt over short", ".2f", generation, "cost_growth"))
    return "\n\n".join([*tables, _align(["", *generation], rows)])


def _row(label: str, form: str, columns: Mapping[str, Any], *keys: str, scale: float = 1) -> list[str]:
    """A label and, for every column, the formatted value below these keys."""
    row = [label]
    for value in columns.values():
        for key in keys:
            value = None if value is None else value[key]
        row.append("-" if value is None else format(value * scale, form))
    return row


def _align(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for label, *values in [head, *rows]:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
