"""What a config needs in memory and on disk, worked out before anything is allocated.

Modules are built on torch's meta device, so weights and what follows from them (gradients, optimizer, average,
states, checkpoints) are exact; activations are an estimate, measured against real steps
(tests/training/test_sizes.py).
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import SEGMENTERS
from hldm.config import Config, ConfigError, DataConfig, StackConfig
from hldm.generation.footprint import FLOAT, INTEGER, RUNTIME, chunk_bytes, state_bytes
from hldm.generation.own_prior import prior_class
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import DRAWS
from hldm.plugins import allow_named
from hldm.runs.machine import available_memory, free_disk, gpu_memory, human
from hldm.sources.files import matching_files
from hldm.sources.notes import TextNote
from hldm.sources.stream import HEAD_BYTES, SHUFFLE_BYTES
from hldm.text.bytes import OUTPUTS
from hldm.training.environment import launched_number
from hldm.training.objectives import AutoencoderObjective, PriorObjective
from hldm.training.optimizers import make_optimizers

BIBLE_BYTES = 4_200_000  # the built-in corpus
TENSOR_RECORD = 150  # bytes of a safetensors header a tensor: name, shape and offsets in JSON
BYTES = 256  # what a segmenter predicts


class Sizes(NamedTuple):
    """Bytes by what they are for."""

    device: dict[str, int]  # of each process, on its GPU or else in memory
    host: dict[str, int]  # of each process, in memory wherever it trains
    disk: dict[str, int]  # below the run's folder, once


# ---- a stage, and what there is for it


class Need(NamedTuple):
    """Something that a stage needs, part by part, and how much of it there is."""

    what: str  # memory, GPU memory, disk
    parts: dict[str, int]  # bytes by what they are for
    available: int  # bytes
    where: str

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.total <= self.available

    def refusal(self, stage: str) -> str:
        """Needed against available, and what to lower."""
        largest = max(self.parts, key=lambda part: self.parts[part])
        way_out = WAY_OUT.get(largest, "lower the widths or the number of layers").format(stage=stage)
        return (
            f"training.{stage} needs about {human(self.total)} of {self.what}, {human(self.available)} available "
            f"{self.where}; {human(self.parts[largest])} of it are {largest}: {way_out}"
        )


WAY_OUT = {
    "python and torch": "close other programs",
    "corpus": "lower data.max_bytes",
    "stream": "lower data.readers",
    "activations": "lower data.lanes, data.window_bytes or the widths, or raise training.accumulation",
    "carried states": "lower data.lanes",
    "segmenter": "choose a chunking.strategy that asks none, such as words",
    "checkpoints": "lower checkpoint.keep or the widths, or free some",
}


def text_bytes(data: DataConfig) -> int:
    """Bytes of text that will be read, at most: what the files hold, what data.max_bytes lets in.

    Raises ConfigError or FileNotFoundError where data.path names no text.
    """
    if data.stream:
        return min(HEAD_BYTES, data.max_bytes)
    if data.dataset:
        return data.max_bytes
    if not data.path:
        return min(BIBLE_BYTES, data.max_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextNote)  # said when the text is read
        files = matching_files(data.path)
    # compressed text unpacks to about four times as much
    sizes = (file.stat().st_size * (4 if file.suffix.lower() in (".gz", ".parquet") else 1) for file in files)
    return min(sum(sizes), data.max_bytes)


# ---- what it consists of


def untrained(config: Config, stage: str) -> AutoencoderObjective | PriorObjective:
    """What a stage ("autoencoder" or "prior") trains, on whatever device is the default."""
    allow_named(config)
    autoencoder = Autoencoder.from_settings(config.autoencoder, config.chunking)
    if stage == "autoencoder":
        if config.training.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        return AutoencoderObjective(autoencoder, config.autoencoder, config.diffusion.gamma_0)
    sections = (config.autoencoder, config.prior, config.hierarchy, config.diffusion)
    prior = prior_class(config.prior).from_settings(*sections)
    return PriorObjective(prior, autoencoder)


@lru_cache(maxsize=4)  # asked for several times
def shapes_of(config: Config, stage: str) -> tuple[AutoencoderObjective | PriorObjective, Segmenter | None]:
    """The same without memory, and the segmenter that the stage asks, if any."""
    strategy = config.chunking.strategy
    with torch.device("meta"):
        segmenter = SEGMENTERS[strategy].from_settings(config.chunking) if strategy in SEGMENTERS else None
        return untrained(config, stage), segmenter


def count(module: nn.Module | None) -> int:
    """Numbers that the parameters of a module hold."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def stage_sizes(config: Config, stage: str, processes: int = 1) -> Sizes:
    """What one stage ("autoencoder" or "prior") needs, in each of so many processes."""
    training, data = config.training.of(stage), config.data
    objective, segmenter = shapes_of(config, stage)
    rows = -(-data.lanes // (processes * training.accumulation))
    lanes = -(-data.lanes // processes)
    model = FLOAT * count(objective)
    average = model if training.ema_decay else 0
    best = model if training.patience else 0
    gradients = optimizer = 0
    for each in make_optimizers(objective, training):
        trained = FLOAT * sum(p.numel() for group in each.param_groups for p in group["params"])
        gradients += trained * (1 if processes == 1 else 2)  # DDP's buckets are a second copy
        optimizer += trained * (2 if isinstance(each, torch.optim.AdamW) else 1)  # moments; Muon has one
    states = state_bytes(objective.initial_carry(1, torch.device("meta")))
    records = 4 * len(list(objective.parameters())) * TENSOR_RECORD
    checkpoint = model + average + best + optimizer + data.lanes * states + records
    text = text_bytes(data)
    chunks = text // chunk_bytes(config.chunking)
    # there once as it was saved and once in float64, to cut: three numbers a weight, and less
    asked = 3 * FLOAT * count(segmenter)
    return Sizes(
        device={
            "parameters": model,
            "gradients": gradients,
            "optimizer state": optimizer,
            "averaged weights": average,
            "carried states": 2 * lanes * states,  # before and after a step
            # when the optimizer steps, activations are gone and its own temporaries there
            "activations": max(activation_bytes(config, stage, rows), optimizer),
        },
        host={
            "python and torch": RUNTIME,
            # as read, split, and joined again; then a flag a byte, a number a chunk
            "corpus": 4 * text + 2 * INTEGER * chunks,
            # what each reader has read, what is shuffled of it, and what the streams still hold of the block before
            "stream": 3 * SHUFFLE_BYTES * -(-data.readers // processes) if data.stream else 0,
            # indices of every byte of a global batch, ten of them
            "batch": 10 * INTEGER * data.lanes * (data.window_bytes + config.chunking.max_bytes),
            "best weights": best,
            "segmenter": training_bytes(segmenter) if stage == "autoencoder" else asked,
        },
        disk={
            "checkpoints": checkpoint * (config.checkpoint.keep + 1),  # one more while it is written
            "exported models": 2 * (model + FLOAT * count(segmenter)),  # the stage's own and the pipeline's
        },
    )


# ---- activations


def stack_numbers(config: StackConfig, positions: int, window: int, recompute: bool = False) -> int:
    """Numbers that the backward pass of a Griffin stack needs, its own temporaries included."""
    d, m = config.width, config.hidden
    block = max(window, 32)  # hldm.model.griffin.ATTENTION_BLOCK
    keys = window + block
    each = {
        # norm, gates, decay, multiplier, convolution, states, products, MLP
        "recurrent": 14 * d + 4 * m,
        # norm, queries, keys and values met again by the next block, output; mask; MLP
        "attention": 7 * d + 4 * d * keys // block + 2 * keys + 4 * m,
    }
    numbers = [each[kind] for kind in config.blocks]
    kept = len(numbers) * d + max(numbers) if recompute else sum(numbers)
    return positions * kept


def prior_numbers(config: Config, chunks: int) -> int:
    """The same of both towers, over so many chunks of one row."""
    prior, hierarchy, settings = config.prior, config.hierarchy, config.autoencoder
    d, draws = prior.width, DRAWS
    queries = 1 + chunks + sum(chunks // hierarchy.ratio**n + 1 for n in range(1, hierarchy.levels + 1))
    keys = hierarchy.capacity + queries
    pairs = queries * keys
    layer = 15 * queries * d + 6 * keys * d + 4 * prior.heads * pairs
    context = prior.layers * layer + 8 * pairs
    pairs = chunks * draws * keys
    block = chunks * draws * 25 * d + 6 * chunks * d + 4 * keys * d + 4 * prior.heads * pairs
    ends = chunks * draws * 8 * settings.latent_dim
    mixture = 6 * chunks * draws * settings.components
    return context + prior.denoiser_layers * block + ends + mixture


def activation_bytes(config: Config, stage: str, rows: int) -> int:
    """An estimate of what a forward and backward pass over a window of so many rows takes at its peak.

    Measured on a CPU in float32: 0.96 to 1.12 times the peak of a step of configs/tiny.yaml (stage one) and of both
    stages of small.yaml. Not measured on a GPU. bfloat16 counts as float32, which is too much.
    """
    settings, chunking = config.autoencoder, config.chunking
    encoder, decoder, z = settings.encoder, settings.decoder, settings.latent_dim
    recompute = config.training.gradient_checkpointing
    length = config.data.window_bytes + chunking.max_bytes
    chunks = length // chunk_bytes(chunking) + 1
    events = length + (0 if config.is_twin else chunks)
    # a strided readout keeps its input, laid out by chunk, and makes its gradient, twice each
    readout = 4 * encoder.width if settings.pooling == "strided" else 14 * max(encoder.width, z)
    reading = stack_numbers(encoder, length, chunking.max_bytes, recompute) + length * readout
    reading += stack_numbers(settings.trunk, chunks, 1, recompute) if settings.trunk_layers else 0
    writing = stack_numbers(decoder, events, chunking.max_bytes + 1, recompute) + events * 6 * OUTPUTS
    writing += 0 if config.is_twin else events * 14 * max(decoder.width, z)
    if config.is_twin:
        numbers = writing * rows
    elif stage == "autoencoder":
        numbers = (reading + writing) * rows
    else:
        numbers = rows * prior_numbers(config, chunks)
    return FLOAT * numbers


def training_bytes(segmenter: Segmenter | None) -> int:
    """What training a segmenter takes: weights, gradients, two moments, and activations of its trunk, roughly."""
    if segmenter is None:
        return 0
    positions = segmenter.settings.lanes * segmenter.settings.window_bytes
    activations = stack_numbers(segmenter.trunk.config, positions, 1) + 6 * BYTES * positions
    return FLOAT * (4 * count(segmenter) + activations)


# ---- needed, and there


def needs(config: Config, stage: str, root: Path = Path("runs")) -> list[Need]:
    """What the stage needs here, and how much there is: in this cgroup, on this GPU, on the disk of root."""
    processes = launched_number("WORLD_SIZE", 1)
    here = launched_number("LOCAL_WORLD_SIZE", 1)
    sizes = stage_sizes(config, stage, processes)
    memory, where = available_memory()
    graphics = gpu_memory()
    host = dict(sizes.host)
    found = []
    if graphics is None:
        host |= sizes.device
    else:
        # models are built, and checkpoints gathered, in the memory of the machine
        host |= {"parameters": sizes.device["parameters"] + sizes.device["optimizer state"]}
        found.append(Need("GPU memory", sizes.device, graphics, "on the GPU"))
    found.append(Need("memory", {part: here * size for part, size in host.items()}, memory, where))
    folder = root / config.name / stage
    free, disk = free_disk(root)
    # what an earlier start left is written over
    taken = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    return [*found, Need("disk", sizes.disk, free + taken, f"in {disk}")]


def require_room(config: Config, stage: str, root: Path = Path("runs")) -> None:
    """Raise ConfigError, needed against available and what to lower, unless the stage will fit."""
    for need in needs(config, stage, root):
        if not need.fits:
            raise ConfigError(need.refusal(stage))


# ---- the table

LABELS = dict.fromkeys(
    ("mixture", "rate"), "mixture (predicts the next latent)"
)  # of parts whose names say too little
STAGES = {"autoencoder": "stage one", "prior": "stage two"}


def survey(config: Config, root: Path = Path("runs")) -> dict[str, Any]:
    """What every stage of a config needs and what there is, as plain data. `report` makes a table of it."""
    stages: dict[str, Any] = {}
    for stage in ("autoencoder",) if config.is_twin else ("autoencoder", "prior"):
        objective, segmenter = shapes_of(config, stage)
        parts = sorted(objective.named_children())
        counts = {"rate" if name == "mixture" else name: count(part) for name, part in parts}
        if stage == "autoencoder":
            counts["segmenter"] = count(segmenter)
        stages[stage] = {
            "parameters": {name: numbers for name, numbers in counts.items() if numbers},
            "needs": [
                need._asdict() | {"total": need.total, "fits": need.fits, "refusal": need.refusal(stage)}
                for need in needs(config, stage, root)
            ],
        }
    fits = all(need["fits"] for found in stages.values() for need in found["needs"])
    return {"config": config.name, "fits": fits, "stages": stages}


def planned(config: Config, processes: int) -> dict[str, Any]:
    """What each of so many processes would need, wherever they will run, in bytes. `report_plan` makes a table of it.

    Raises ConfigError where data.lanes cannot be divided among them.
    """
    stages: dict[str, Any] = {}
    for stage in ("autoencoder",) if config.is_twin else ("autoencoder", "prior"):
        parts = processes * config.training.accumulation
        if config.data.lanes % parts:
            raise ConfigError(
                f"data.lanes must be divisible by processes x training.accumulation, got {config.data.lanes} "
                f"lanes and {processes} x {parts // processes}"
            )
        sizes = stage_sizes(config, stage, processes)
        # models are built, and checkpoints gathered, in the memory of the machine
        built = {name: sizes.device[name] for name in ("parameters", "optimizer state")}
        stages[stage] = {"device": sizes.device, "host": sizes.host | built, "disk": sizes.disk}
    return {"config": config.name, "processes": processes, "stages": stages}


def report_plan(found: dict[str, Any]) -> str:
    """What `planned` found, as a table."""
    processes = found["processes"]
    lines = [
        f"{found['config']} in {processes} process{'es' if processes > 1 else ''}, each on a GPU of its own"
    ]
    for stage, sizes in found["stages"].items():
        lines.append(f"{STAGES[stage]} ({stage})")
        device, host, disk = (sum(sizes[part].values()) for part in ("device", "host", "disk"))
        shared = f", {human(processes * host)} where all share a machine"
        alone = (
            device + host - sum(sizes["device"][name] for name in sizes["device"] if name in sizes["host"])
        )
        for what, total, kind, more in (
            ("GPU memory", device, "device", " each"),
            ("memory", host, "host", f" each{shared}; without GPUs {human(alone)} each"),
            ("disk", disk, "disk", " in all"),
        ):
            lines.append(f"  {what:<18}{human(total):>9}{more}")
            lines += [f"    {part:<16}{human(size):>9}" for part, size in sizes[kind].items() if size]
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    """What `survey` found, as a table and a verdict."""
    lines = []
    for stage, sizes in found["stages"].items():
        counts = (f"{LABELS.get(name, name)} {count:,}" for name, count in sizes["parameters"].items())
        lines.append(f"{STAGES[stage]} ({stage}), parameters: {', '.join(counts)}")
        for need in sizes["needs"]:
            lines.append(
                f"  {need['what']:<18}{human(need['total']):>9}  of {human(need['available'])} {need['where']}"
            )
            lines += [f"    {part:<16}{human(size):>9}" for part, size in need["parts"].items() if size]
    refusals = [need["refusal"] for s in found["stages"].values() for need in s["needs"] if not need["fits"]]
    return "\n".join(
        [*lines, *refusals, f"{found['config']} {'fits' if found['fits'] else 'does not fit'} here"]
    )
