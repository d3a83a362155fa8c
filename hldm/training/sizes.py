"""What a config needs in memory and on disk, worked out before anything is allocated.

Weights are counted exactly, by the shapes that the modules will have; what else follows from them (gradients,
optimizer, average, checkpoints) is as exact; activations are an estimate, measured against real steps
(tests/training/test_sizes.py). Arithmetic alone, no torch: a config of a thousand billion weights is refused as
quickly as any other.
"""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from hldm.config import ChunkingConfig, Config, ConfigError, DataConfig
from hldm.generation.footprint import (
    FLOAT,
    INTEGER,
    RUNTIME,
    chunk_bytes,
    prior_numbers,
    stack_numbers,
    state_parts,
)
from hldm.runs.machine import available_memory, free_disk, gpu_memory, human
from hldm.text.bytes import OUTPUTS
from hldm.training.shapes import (
    Weight,
    autoencoder_weights,
    count,
    mixture_weights,
    optimizer_numbers,
    prior_weights,
    segmenter_trunk,
    segmenter_weights,
)

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
    "activations": "lower data.lanes, data.window_bytes or the widths, or raise training.{stage}.accumulation",
    "carried states": "lower data.lanes",
    "segmenter": "lower chunking.segmenter's width, layers, lanes or window_bytes",
    "checkpoints": "lower checkpoint.keep or the widths, or free some",
}


def text_bytes(data: DataConfig) -> int:
    """Bytes of text that will be read, at most: what the files hold, what data.max_bytes lets in."""
    if data.dataset:
        return data.max_bytes
    if not data.path:
        return min(BIBLE_BYTES, data.max_bytes)
    place = Path(data.path).expanduser()
    files = [str(place)]
    if not place.is_file():
        files = glob(str(place / "**" if place.is_dir() else place), recursive=True)
    # compressed text unpacks to about four times as much
    sizes = (
        os.path.getsize(file) * (4 if file.endswith((".gz", ".parquet")) else 1)
        for file in files
        if os.path.isfile(file)
    )
    return min(sum(sizes), data.max_bytes)


def stage_weights(config: Config, stage: str) -> dict[str, list[Weight]]:
    """The parts that the stage's objective holds, which is what its checkpoints do."""
    parts = {"autoencoder": autoencoder_weights(config)}
    if stage == "autoencoder":
        parts["rate"] = mixture_weights(config)
    else:
        parts["prior"] = prior_weights(config)
    return parts


def stage_sizes(config: Config, stage: str, processes: int = 1) -> Sizes:
    """What one stage ("autoencoder" or "prior") needs, in each of so many processes."""
    training, data = getattr(config.training, stage), config.data
    parts = stage_weights(config, stage)
    weights = [weight for part in parts.values() for weight in part]
    trained = parts["prior"] if stage == "prior" and not training.joint else weights
    rows = -(-data.lanes // (processes * training.accumulation))
    lanes = -(-data.lanes // processes)
    model, average = FLOAT * count(weights), FLOAT * count(weights) if training.ema_decay else 0
    gradients = FLOAT * count(trained) * (1 if processes == 1 else 2)  # DDP's buckets are a second copy
    optimizer = FLOAT * optimizer_numbers(trained, training.optimizer)
    states = state_bytes(config, stage)
    checkpoint = model + average + optimizer + data.lanes * states + 4 * len(weights) * TENSOR_RECORD
    text = text_bytes(data)
    chunks = text // chunk_bytes(config.chunking)
    segmenter = FLOAT * count(segmenter_weights(config.chunking))
    exported = {name: FLOAT * count(part) for name, part in parts.items()}
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
            # indices of every byte of a global batch, ten of them
            "batch": 10 * INTEGER * data.lanes * (data.window_bytes + config.chunking.max_bytes),
            "segmenter": segmenter_bytes(config.chunking) if stage == "autoencoder" else 3 * segmenter,
        },
        disk={
            "checkpoints": checkpoint * (config.checkpoint.keep + 1),  # one more while it is written
            "exported models": 2 * (sum(exported.values()) + segmenter),  # the stage's own and the pipeline's
        },
    )


def state_bytes(config: Config, stage: str) -> int:
    """What a stage carries from window to window for each row."""
    states = state_parts(config)
    if stage == "autoencoder":
        states.pop("context", None)
    if stage == "prior" and not config.training.prior.joint:
        del states["decoder"]
    return sum(states.values())


def activation_bytes(config: Config, stage: str, rows: int) -> int:
    """An estimate of what a forward and backward pass over a window of so many rows takes at its peak.

    Measured on a CPU in float32: 0.96 to 1.12 times the peak of a step of configs/tiny.yaml (stage one) and of both
    stages of small.yaml. Not measured on a GPU. bfloat16 counts as float32, which is too much.
    """
    settings, chunking = config.autoencoder, config.chunking
    encoder, decoder, z = settings.encoder, settings.decoder, settings.latent_dim
    recompute = config.training.autoencoder.gradient_checkpointing
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
        numbers = prior_numbers(config, rows, chunks)
        if config.training.prior.joint:
            numbers += (reading + writing) * rows
    return FLOAT * numbers


def segmenter_bytes(chunking: ChunkingConfig) -> int:
    """What training a segmenter takes: weights, gradients, two moments, and activations of its trunk, roughly.

    Afterwards it is there once as it was saved and once in float64, to cut: three numbers a weight, and less.
    """
    weights = segmenter_weights(chunking)
    if not weights:
        return 0
    settings = chunking.segmenter
    positions = settings.lanes * settings.window_bytes
    activations = stack_numbers(segmenter_trunk(chunking), positions, 1, False) + 6 * BYTES * positions
    return FLOAT * (4 * count(weights) + activations)


def needs(config: Config, stage: str, root: Path = Path("runs")) -> list[Need]:
    """What the stage needs here, and how much there is: in this cgroup, on this GPU, on the disk of root."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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


def survey(config: Config, root: Path = Path("runs")) -> dict[str, Any]:
    """What every stage of a config needs and what there is, as plain data. `report` makes a table of it."""
    stages: dict[str, Any] = {}
    for stage in ("autoencoder",) if config.is_twin else ("autoencoder", "prior"):
        parts = stage_weights(config, stage)
        if stage == "autoencoder":
            parts["segmenter"] = segmenter_weights(config.chunking)
        stages[stage] = {
            "parameters": {name: count(part) for name, part in parts.items() if part},
            "needs": [
                {"what": n.what, "where": n.where, "available": n.available, "total": n.total, "fits": n.fits}
                | {
                    "parts": {part: size for part, size in n.parts.items() if size},
                    "refusal": n.refusal(stage),
                }
                for n in needs(config, stage, root)
            ],
        }
    fits = all(need["fits"] for found in stages.values() for need in found["needs"])
    return {"config": config.name, "fits": fits, "stages": stages}


def report(found: dict[str, Any]) -> str:
    """What `survey` found, as a table and a verdict."""
    lines = []
    for stage, sizes in found["stages"].items():
        counts = ", ".join(f"{name} {count:,}" for name, count in sizes["parameters"].items())
        lines.append(f"training.{stage}: {counts} parameters")
        for need in sizes["needs"]:
            lines.append(
                f"  {need['what']:<18}{human(need['total']):>9}  of {human(need['available'])} {need['where']}"
            )
            lines += [f"    {part:<16}{human(size):>9}" for part, size in need["parts"].items()]
    refusals = [need["refusal"] for s in found["stages"].values() for need in s["needs"] if not need["fits"]]
    return "\n".join([*lines, *refusals, f"{found['config']} {'fits' if found['fits'] else 'does not fit'}"])
