"""`hldm doctor --gpu`: whether what is made for a GPU is right there, and how fast, in minutes on one card.

Each section checks or measures one thing and says it in one line. Without a GPU all of them run at tiny size on the
CPU, which tests this file, not a card; what needs CUDA is said to be skipped. A section that fails is a fault, and the
others still run.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hldm.chunking.chunker import make_chunker
from hldm.config import ChunkingConfig, Config, ConfigError, changed, load_config, stage_training, to_yaml
from hldm.generation.pipeline import HLDMPipeline, HLDMPipelineOutput
from hldm.generation.writer import make_writer, row_generators
from hldm.model import ops
from hldm.model.autoencoder import Autoencoder
from hldm.model.griffin import Griffin
from hldm.model.prior import Prior
from hldm.runs.clock import timed
from hldm.runs.files import fingerprint
from hldm.runs.machine import gpu_memory, human
from hldm.sources.corpora import load_corpus
from hldm.studies.bench_training import memory_of, trainer_of
from hldm.studies.bench_writing import write_like
from hldm.text.bytes import count_characters
from hldm.training.sizes import stage_sizes

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 480.0  # no section starts later
FREE_SHARE = 0.8  # of the memory of a card, what a training step is given
STEPS, WARM_UP_STEPS = 5, 2  # of training: the median of those that count
STEPS_S = 45.0  # or as many as fit
RANK_STEPS = 4
TRACE_STEPS = 64  # of a scan that torch.compile would have to unroll
PROMPT_BYTES, CHARACTERS = 200, 240  # before writing; written, in all, at least
CPU_SIZES = ("data.lanes=4", "data.window_bytes=64")  # of the CPU form
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number


class Skipped(Exception):
    """This machine lacks what a section needs."""


class Result(NamedTuple):
    """What a section found."""

    name: str
    status: str  # ok, skipped, FAULT
    text: str  # one line
    seconds: float
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """The device under test and the config whose shapes are measured on it."""

    device: torch.device
    config: Config

    @property
    def is_gpu(self) -> bool:
        """Whether this is a card, not the CPU form."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products of training compute in."""
        return torch.bfloat16 if self.config.training.autoencoder.mixed_precision == "bf16" else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """As in training."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16, cache_enabled=False
        )


def card_of(config: Path | None = None) -> Card:
    """The first GPU and configs/base.yaml, or the CPU and configs/tiny.yaml, or another config; on built-in text."""
    is_gpu = torch.cuda.is_available()
    path = config or ROOT / f"configs/{'base' if is_gpu else 'tiny'}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such config: run this in a clone of hldm, or name one by --config"
        )
    text = ["data.path=", "data.dataset=", "data.stream=false"]
    resolved = load_config([path], [*text, *(() if is_gpu else CPU_SIZES)])
    if resolved.is_twin:
        raise ConfigError(
            f"{path} is a twin: hldm doctor --gpu measures both stages of a config with latents"
        )
    return Card(torch.device("cuda" if is_gpu else "cpu"), resolved)


def check(card: Card) -> Iterator[Result]:
    """Every section, in order."""
    began = time.monotonic()
    for section in SECTIONS:
        name = section.__name__.replace("_", " ")
        start = time.monotonic()
        figures: Mapping[str, Any] = {}
        try:
            if start - began > LIMIT_S:
                raise Skipped(f"{LIMIT_S:g} s have passed")
            text, figures = section(card)
            status = "ok"
        except Skipped as reason:
            status, text = "skipped", f"skipped: {reason}"
        # what drivers and compilers raise has no common base; the next section may still work
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            status, text = "FAULT", f"{type(error).__name__}: {' '.join(' '.join(lines[:3]).split())[:300]}"
        gc.collect()
        if card.is_gpu:
            torch.cuda.empty_cache()
        yield Result(name, status, f"{name}: {text}", time.monotonic() - start, figures)


def report(results: list[Result]) -> dict[str, Any]:
    """Plain data of all of them."""
    return {
        found.name: {"status": found.status, "text": found.text, "seconds": found.seconds, **found.figures}
        for found in results
    }


# ---- the card


def card(card: Card) -> tuple[str, dict[str, Any]]:
    """What it is, and the peak of its matrix products."""
    peak = matrix_peak(card)
    figures: dict[str, Any] = {"torch": torch.__version__, "peak_tflops": peak, "dtype": str(card.dtype)}
    if not card.is_gpu:
        text = "no GPU: this is the CPU form at tiny size, which says nothing of a card"
    else:
        properties = torch.cuda.get_device_properties(card.device)
        figures |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        figures |= {"cards": torch.cuda.device_count(), "memory_bytes": properties.total_memory}
        figures |= {"cuda": torch.version.cuda}
        text = (
            f"{properties.name}, capability {figures['capability']}, {human(properties.total_memory)}, "
            f"{figures['cards']} of them, CUDA {torch.version.cuda}"
        )
    return (
        f"{text}; torch {torch.__version__}; {_name(card.dtype)} products reach {peak:.3g} TFLOP/s",
        figures,
    )


def matrix_peak(card: Card) -> float:
    """TFLOP/s of a large matrix product in the dtype of training: the best of several."""
    n = 8192 if card.is_gpu else 256
    a, b = torch.randn(2, n, n, device=card.device).to(card.dtype)
    seconds = min(timed(lambda: torch.mm(a, b))[1] for _ in range(10))
    return 2 * n**3 / seconds / 1e12


# ---- the scan


def _scan_of(card: Card) -> tuple[str, Callable[..., tuple[Tensor, Tensor]]]:
    """The form under test; Triton's own errors are not hidden, as they are in training."""
    from hldm.kernels import scan

    if not card.is_gpu:
        return "chunked torch", scan.ChunkedScan.apply
    from hldm.kernels.triton_scan import OnePassScan

    return "Triton", OnePassScan.apply


def _scan_inputs(card: Card, b: int, t: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Decays near 1, as models learn them, some exactly 0, as where documents start; inputs; a state."""
    generator = torch.Generator().manual_seed(0)
    decay = 1 - torch.rand(b, t, d, generator=generator) ** 3 * 0.5
    decay[:, t // 3 :: t // 3 + 1] = 0
    x, h0 = torch.randn(b, t, d, generator=generator), torch.randn(b, d, generator=generator)
    return [part.to(card.device, dtype).requires_grad_() for part in (decay, x, h0)]


def _gradients(scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    states, last = scan(*inputs)
    return list(torch.autograd.grad(states.sin().sum() + last.square().sum(), inputs))


def _error(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest difference as a share of the largest number. Raises AssertionError where that is too much."""
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= TOLERANCE[dtype]:  # nan is too much
        raise AssertionError(f"off by {error:.2g} of the largest number in {_name(dtype)}")
    return error


def scan(card: Card) -> tuple[str, dict[str, Any]]:
    """The scan against the loop, in float32 and as a model trained in bfloat16 calls it; and its speed."""
    name, form = _scan_of(card)
    loop = inspect.unwrap(ops.scan)
    shape = (3, 200, 130) if card.is_gpu else (2, 40, 9)
    errors = {}
    with torch.no_grad():
        exact = _scan_inputs(card, *shape, torch.float32)
        errors["float32"] = _error(form(*exact)[0], loop(*exact)[0], torch.float32)
        rounded = _scan_inputs(card, *shape, torch.bfloat16)
        # states are computed in float32 and returned in the dtype of the input
        states, _ = ops.linear_scan(*rounded)
        assert states.dtype == torch.bfloat16
        errors["bfloat16"] = _error(states, loop(*(x.float() for x in rounded))[0], torch.bfloat16)
        data, width = card.config.data, card.config.autoencoder.encoder.width
        large = _scan_inputs(card, min(data.lanes, 16), data.window_bytes, width, torch.float32)
        seconds = min(timed(lambda: form(*large))[1] for _ in range(5))
        by_loop = min(timed(lambda: loop(*large))[1] for _ in range(2))
    rate = 3 * large[0].nbytes / seconds / 1e9  # two are read, one is written
    found = {
        "form": name,
        "errors": errors,
        "gigabytes_per_second": rate,
        "times_the_loop": by_loop / seconds,
    }
    said = ", ".join(f"{error:.1g} in {dtype}" for dtype, error in errors.items())
    return (
        f"{name} against the loop: off by {said}; {rate:,.3g} GB/s, {by_loop / seconds:.3g} x the loop",
        found,
    )


def gradients(card: Card) -> tuple[str, dict[str, Any]]:
    """Those of the scan against the loop's, in float32 and float64."""
    name, form = _scan_of(card)
    errors = {}
    for dtype in (torch.float32, torch.float64):
        inputs = _scan_inputs(card, *((3, 200, 130) if card.is_gpu else (2, 40, 9)), dtype)
        pairs = zip(_gradients(form, inputs), _gradients(inspect.unwrap(ops.scan), inputs), strict=True)
        errors[_name(dtype)] = max(_error(one, other, dtype) for one, other in pairs)
    said = ", ".join(f"{error:.1g} in {dtype}" for dtype, error in errors.items())
    return f"{name} against the loop: off by {said}", {"form": name, "errors": errors}


def kernel_choice(card: Card) -> tuple[str, dict[str, Any]]:
    """Whether training itself will use Triton here: it trusts it only after a comparison of its own."""
    from hldm.kernels.scan import runs_in_triton

    if not card.is_gpu:
        raise Skipped("Triton needs CUDA")
    if not runs_in_triton(torch.zeros(1, device=card.device)):
        raise AssertionError("Triton is not trusted on this card, so training scans in torch")
    return "training scans in Triton", {}


# ---- training


def _fitting(card: Card, stage: str) -> Config:
    """The config with as many lanes as `hldm sizes` says fit."""
    config, memory = card.config, gpu_memory()
    if memory is None:
        return config
    while config.data.lanes > 1 and sum(stage_sizes(config, stage).device.values()) > FREE_SHARE * memory:
        config = changed(config, data=changed(config.data, lanes=config.data.lanes // 2))
    return config


def _training(card: Card, stage: str) -> tuple[str, dict[str, Any]]:
    config = _fitting(card, stage)
    trainer = trainer_of(config, stage)
    progress = getattr(config.training, stage).warmup

    def step() -> int:
        before = trainer.totals.characters
        if trainer.step(progress) is None:
            raise AssertionError("a step was not finite")
        return trainer.totals.characters - before

    with FlopCounterMode(display=False) as counter:
        step()
    if card.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    turns, began = [], time.monotonic()
    for number in range(WARM_UP_STEPS + STEPS):
        turns.append(timed(step))
        if number >= WARM_UP_STEPS and time.monotonic() - began > STEPS_S:
            break
    measured = turns[WARM_UP_STEPS:]
    seconds = statistics.median(s for _, s in measured)
    rate = statistics.median(characters / s for characters, s in measured)
    share = counter.get_total_flops() / seconds / 1e12 / matrix_peak(card)
    said = sum(stage_sizes(config, stage).device.values())
    if card.is_gpu:
        peak: int | None = torch.cuda.max_memory_allocated()
    else:
        memory = memory_of(trainer)
        peak = None if memory is None else memory["peak_bytes"]
    trainer.accelerator.free_memory()
    found = {
        "lanes": config.data.lanes,
        "window_bytes": config.data.window_bytes,
        "characters_per_second": rate,
        "seconds_per_step": seconds,
        "share_of_peak": share,
        "peak_bytes": peak,
        "sizes_bytes": said,
        "loss_is_finite": True,
    }
    taken = "not measured" if peak is None else human(peak)
    return (
        f"{config.name}, {config.data.lanes} lanes x {config.data.window_bytes} bytes, {_name(card.dtype)}: "
        f"{rate:,.0f} characters/s, {seconds:.3g} s a step, products at {share:.1%} of the peak; memory {taken} where "
        f"hldm sizes says {human(said)}"
    ), found


def stage_one(card: Card) -> tuple[str, dict[str, Any]]:
    """A training step of the autoencoder."""
    return _training(card, "autoencoder")


def stage_two(card: Card) -> tuple[str, dict[str, Any]]:
    """A training step of the prior."""
    return _training(card, "prior")


def compiling(card: Card) -> tuple[str, dict[str, Any]]:
    """Forward and backward of the encoder's stack with torch.compile and without; training itself compiles nothing."""
    from hldm.kernels.scan import runs_in_triton

    config = _fitting(card, "autoencoder")
    window = config.data.window_bytes
    if not runs_in_triton(torch.zeros(1, device=card.device)):
        window = min(window, TRACE_STEPS if card.is_gpu else 4)
    torch.manual_seed(0)
    stack = Griffin(config.autoencoder.encoder, window=config.chunking.max_bytes).to(card.device).eval()
    rows = max(config.data.lanes // 4, 1)
    x = torch.randn(rows, window, stack.config.width, device=card.device, requires_grad=True)
    none = torch.zeros(x.shape[:2], dtype=torch.bool, device=card.device)
    state = stack.initial_state(rows, card.device)

    def work(module: Any) -> tuple[Tensor, Tensor]:
        with card.autocast():
            y, _ = module(x, state, none, none)
        (gradient,) = torch.autograd.grad(
            y.float().sin().sum(), [x]
        )  # of squares, which are normed, it would be 0
        return y.detach(), gradient

    # without a card only what it traces is tested, not the code it makes
    compiled = torch.compile(stack, backend="inductor" if card.is_gpu else "aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        found, first = timed(lambda: work(compiled))
    error = max(_error(*pair, card.dtype) for pair in zip(found, work(stack), strict=True))
    on, off = (min(timed(partial(work, module))[1] for _ in range(5)) for module in (compiled, stack))
    return (
        f"the encoder's stack, forward and backward: {off / on:.2f} x as fast ({1e3 * on:.3g} ms on, "
        f"{1e3 * off:.3g} ms off), {first:.0f} s to compile, off by {error:.1g}"
    ), {"seconds_on": on, "seconds_off": off, "seconds_to_compile": first, "error": error}


# ---- writing


def _models(card: Card) -> tuple[Autoencoder, Prior]:
    """Both, untrained, writing bytes by their frequency in the built-in text."""
    config = card.config
    torch.manual_seed(config.seed)
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking).eval()
    if config.chunking.needs_segmenter:
        autoencoder.attached_chunker = make_chunker(ChunkingConfig())
    corpus = load_corpus(config.data, "validation")
    write_like(autoencoder, corpus, len(corpus.text) // 6)
    prior = Prior.from_settings(config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    prior.register_to_config(autoencoder=fingerprint(autoencoder.state_dict()))
    return autoencoder.to(card.device), prior.eval().to(card.device)


def writing(card: Card) -> tuple[str, dict[str, Any]]:
    """Characters a second, one continuation and 64."""
    models, found = _models(card), {}
    for rows in (1, 64):
        with torch.inference_mode():
            writer = make_writer(
                *models, [b"In the beginning "] * rows, card.config.generation, row_generators(0, rows)
            )
            writer.write()  # warm-up
            seconds, characters = 0.0, 0
            while characters < CHARACTERS * min(rows, 8) and seconds < STEPS_S / 2:
                pieces, taken = timed(writer.write)
                seconds += taken
                characters += sum(count_characters(piece.text) for piece in pieces)
        found[f"characters_per_second_{rows}"] = characters / seconds
    one, many = found.values()
    steps = card.config.generation.steps
    return f"{steps} steps a latent: {one:,.0f} characters/s in 1 row, {many:,.0f} in 64", found


def generators(card: Card) -> tuple[str, dict[str, Any]]:
    """Seeds and a generator of the device give the same text twice; a batch writes what its rows write."""
    pipeline = HLDMPipeline.assemble(*_models(card), card.config.generation)

    def write(prompts: list[str], **arguments: Any) -> list[str]:
        output = pipeline(prompts, max_characters=40, **arguments)
        assert isinstance(output, HLDMPipelineOutput)
        return output.texts

    prompts = ["In the beginning ", "And "]
    texts = write(prompts, seed=3)
    drawn = [write(prompts, generator=torch.Generator(card.device).manual_seed(3)) for _ in range(2)]
    if drawn[0] != drawn[1]:
        raise AssertionError("a generator of the device gave two texts from one seed")
    if write(prompts, seed=3) != texts:
        raise AssertionError("a seed gave two texts")
    alone = [write([prompt], seed=3 + row)[0] for row, prompt in enumerate(prompts)]
    # products of other shapes round otherwise, and a draw at a border then falls on its other side
    same = sum(one == other for one, other in zip(alone, texts, strict=True))
    found = {"rows_as_alone": same, "rows": len(prompts)}
    return f"the same text twice by seed and by generator; {same} of {len(prompts)} rows as alone", found


# ---- several ranks


def two_ranks(card: Card) -> tuple[str, dict[str, Any]]:
    """Two ranks train what one does, at tiny size."""
    if card.is_gpu and torch.cuda.device_count() < 2:
        raise Skipped("needs two cards")
    config = load_config([ROOT / "configs/tiny.yaml"], CPU_SIZES) if card.is_gpu else card.config
    config = stage_training(config, "autoencoder", steps=RANK_STEPS, minutes=0.0, mixed_precision="no")
    config = changed(config, logging=changed(config.logging, every=1, sample_every=0))
    with TemporaryDirectory() as folder:
        (Path(folder) / "ranks.yaml").write_text(to_yaml(config), encoding="utf-8")
        train = ["hldm", "train-autoencoder", "--config", "ranks.yaml"]
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launch += [
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(_free_port()),
        ]
        one = _losses(Path(folder), "one", train)
        two = _losses(Path(folder), "two", [*launch, "--module", *train])
    error = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    if not error < 1e-3:
        raise AssertionError(f"the losses of two ranks are off by {error:.2g} of one's: {two} and {one}")
    return f"{len(two)} steps of two ranks, losses off by {error:.1g} of one's", {"error": error}


def _losses(folder: Path, name: str, module: list[str]) -> list[float]:
    """Bits of every step of a training in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path]))}
    ran = subprocess.run(
        [sys.executable, "-m", *module, "--name", name],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S / 2,
    )  # fmt: skip
    if ran.returncode:
        raise AssertionError(f"{module[0]} ended with {ran.returncode}: {ran.stderr.strip()[-200:]}")
    lines = (folder / "runs" / name / "autoencoder" / "metrics.jsonl").read_text().splitlines()
    return [entry["decoder"] + entry["latent"] for entry in map(json.loads, lines) if "event" not in entry]


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SECTIONS: tuple[Callable[[Card], tuple[str, Mapping[str, Any]]], ...] = (
    card, scan, gradients, kernel_choice, stage_one, stage_two, compiling, writing, generators, two_ranks,
)  # fmt: skip
