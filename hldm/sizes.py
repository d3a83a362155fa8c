"""What a config needs in memory and on disk, worked out before anything is allocated.

Weights are counted exactly, by the shapes that the modules will have; what else follows from them (gradients,
optimizer, average, checkpoints) is as exact; activations are an estimate, measured against real steps
(tests/test_sizes.py). Arithmetic alone, no torch: a config of a thousand billion weights is refused as
quickly as any other.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from glob import glob
from math import isqrt, prod
from pathlib import Path
from typing import Any, NamedTuple

from hldm.config import (
    ChunkingConfig,
    Config,
    ConfigError,
    DataConfig,
    GriffinConfig,
    HierarchyConfig,
    config_from_dict,
)
from hldm.text import VOCABULARY

FLOAT = 4  # bytes of a float32
INTEGER = 8  # bytes of an int64
OUTPUTS = 258  # of the decoder: bytes and the two ends
TIME_WIDTH = 32  # of the denoiser's embedding of gamma
MUON_WIDTH = 32  # narrower matrices are AdamW's (hldm.training)
RUNTIME = 400 * 2**20  # Python with torch, diffusers and transformers imported: 362 MiB measured, torch 2.13
BIBLE_BYTES = 4_200_000  # the built-in corpus
TENSOR_RECORD = 150  # bytes of a safetensors header a tensor: name, shape and offsets in JSON
GENERATOR_BYTES = 5_100  # of a torch.Generator on the CPU: a Mersenne twister's 624 words as int64
PROMPT_WINDOW = 4096  # bytes of a prompt read at once (hldm.generation)
GPU_DRIVERS = ("/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")  # NVIDIA, the same under WSL, AMD
CHUNK_BYTES = 100  # Python's own of a chunk written: a bytes object, its place in lists


class Weight(NamedTuple):
    """A parameter of the model; embeddings are AdamW's, whatever the optimizer."""

    shape: tuple[int, ...]
    is_embedding: bool = False

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return prod(self.shape)


class Sizes(NamedTuple):
    """Bytes by what they are for."""

    device: dict[str, int]  # of each process, on its GPU or else in memory
    host: dict[str, int]  # of each process, in memory wherever it trains
    disk: dict[str, int]  # below the run's folder, once


# ---- weights


def _count(weights: Iterable[Weight]) -> int:
    return sum(weight.numbers for weight in weights)


def _linear(inputs: int, outputs: int, bias: bool = True) -> list[Weight]:
    return [Weight((outputs, inputs)), *([Weight((outputs,))] if bias else [])]


def _embedding(rows: int, width: int) -> Weight:
    return Weight((rows, width), is_embedding=True)


def _griffin(config: GriffinConfig) -> Iterator[Weight]:
    """hldm.griffin.Griffin."""
    d, k, w = config.width, config.conv_width, config.width // config.heads
    hidden = round(d * config.mlp_ratio)
    for kind in config.blocks:
        if kind == "recurrent":
            yield from _linear(d, d) * 3
            yield from (Weight((k, d)), Weight((d,)))
            yield from (Weight((config.heads, w, 2 * w)), Weight((2, config.heads, w)), Weight((d,)))
        else:
            yield from [*_linear(d, d, bias=False) * 3, *_linear(d, d)]
        yield from [Weight((d,))] * 2
        yield from [*_linear(d, hidden, bias=False) * 2, *_linear(hidden, d, bias=False)]
    yield Weight((d,))


def _placed_readout(inputs: int, outputs: int, places: int) -> Iterator[Weight]:
    hidden = 2 * max(inputs, outputs)
    yield from (*_linear(inputs, hidden), _embedding(places, hidden), *_linear(hidden, outputs))


def autoencoder_weights(config: Config) -> list[Weight]:
    """Parameters of hldm.autoencoder.Autoencoder."""
    settings, chunking = config.autoencoder, config.chunking
    encoder, decoder, z = settings.encoder, settings.decoder, settings.latent_dim
    weights = [_embedding(VOCABULARY, decoder.width), *_griffin(decoder), *_linear(decoder.width, OUTPUTS)]
    if z:
        weights += [_embedding(VOCABULARY, encoder.width), *_griffin(encoder)]
        weights += _placed_readout(encoder.width, z, chunking.max_bytes)
        weights += _placed_readout(z, decoder.width, chunking.max_bytes + 1)
        if settings.reads_text:
            weights += _linear(encoder.width, decoder.width)
        if settings.trunk_layers:
            wide = settings.trunk_width
            weights += [*_linear(2 * encoder.width, wide), *_griffin(settings.trunk)]
            weights += _linear(wide, decoder.width)
    return weights


def prior_weights(config: Config) -> list[Weight]:
    """Parameters of hldm.prior.Prior."""
    prior, z = config.prior, config.autoencoder.latent_dim
    d, wide = prior.width, prior.denoiser_width
    entries = (config.hierarchy.levels + 1) * (capacity(config.hierarchy) + 1)
    bias = Weight((entries, prior.heads))
    norm = [Weight((d,))] * 2
    weights = [*_linear(z, d), _embedding(config.hierarchy.levels + 1, d), Weight((d,)), *norm]
    if prior.reads_text:
        weights += _linear(config.autoencoder.known_width, d, bias=False)
    if config.autoencoder.rate == "mixture":
        weights += mixture_weights(config)
    if prior.contextualiser == "griffin":
        weights += _griffin(_recurrent_contextualiser(config))
    else:
        layer = [*norm, *_linear(d, d), *_linear(d, 2 * d), *_linear(d, d), bias, *norm]
        weights += [*layer, *_linear(d, 4 * d), *_linear(4 * d, d)] * prior.layers
    block = [*_linear(wide, d), *_linear(d, 2 * d), *_linear(d, wide), bias]
    block += [*_linear(wide, 3 * wide), *_linear(3 * wide, wide)]
    block += [*_linear(d, 6 * wide), *_linear(TIME_WIDTH, 4 * wide, bias=False)]
    weights += [*_linear(2 * z, wide), *_linear(TIME_WIDTH, TIME_WIDTH), *block * prior.denoiser_layers]
    return [*weights, *_linear(wide, z), Weight((d,))]


def mixture_weights(config: Config) -> list[Weight]:
    """Parameters of hldm.mixture.MixturePredictor."""
    settings = config.autoencoder
    d, k, z = settings.known_width, settings.components, settings.latent_dim
    return [*[Weight((d,))] * 2, *_linear(d, 2 * d), *_linear(2 * d, k), Weight((k, z)), Weight((z,))]


def rate_weights(config: Config) -> list[Weight]:
    """Parameters of what prices the latents in stage one."""
    settings = config.autoencoder
    if config.is_twin or settings.rate == "none":
        return []
    if settings.rate == "diffusion":
        return prior_weights(config)
    if settings.rate == "mixture":
        return mixture_weights(config)
    d = settings.known_width
    return [*[Weight((d,))] * 2, *_linear(d, 2 * d), *_linear(2 * d, 2 * settings.latent_dim)]


def _recurrent_contextualiser(config: Config) -> GriffinConfig:
    prior = config.prior
    return GriffinConfig(width=prior.width, blocks=("recurrent",) * prior.layers, heads=prior.heads)


def capacity(hierarchy: HierarchyConfig) -> int:
    """Entries of the pyramid that a state holds (hldm.hierarchy.capacity, which imports torch)."""
    total = level = 0
    for _ in range(hierarchy.levels + 1):
        level = -(-level // hierarchy.ratio) + hierarchy.window + hierarchy.ratio
        total += level
    return total


def _optimizer_numbers(weights: Iterable[Weight], optimizer: str) -> int:
    """Two moments for AdamW's, one for Muon's: matrices but embeddings, MUON_WIDTH wide or more."""
    total = 0
    for weight in weights:
        shape = weight.shape
        inner = len(shape) == 2 and not weight.is_embedding and min(shape) >= MUON_WIDTH
        total += weight.numbers * (1 if optimizer == "muon" and inner else 2)
    return total


# ---- states and activations


def _griffin_state(config: GriffinConfig, window: int) -> int:
    """Bytes of a row's state."""
    recurrent = config.width * config.conv_width * FLOAT
    attention = window * (2 * config.width * FLOAT + 1)
    return sum(recurrent if kind == "recurrent" else attention for kind in config.blocks)


def _states(config: Config) -> dict[str, int]:
    """Bytes of a row's state by part, as Carry in hldm.objectives names them."""
    settings, prior, hierarchy = config.autoencoder, config.prior, config.hierarchy
    window = config.chunking.max_bytes
    decoder = _griffin_state(settings.decoder, window + 1) + INTEGER
    if config.is_twin:
        return {"decoder": decoder}
    recurrent = prior.contextualiser == "griffin"
    layers = 0 if recurrent else prior.layers
    context = capacity(hierarchy) * ((layers + 1) * prior.width * FLOAT + 3 * INTEGER) + INTEGER
    context += (hierarchy.levels * settings.latent_dim + prior.width) * FLOAT
    context += _griffin_state(_recurrent_contextualiser(config), 1) if recurrent else 0
    context += settings.known_width * FLOAT if prior.reads_text or settings.rate == "mixture" else 0
    encoder = _griffin_state(settings.encoder, window)
    encoder += (settings.encoder.width + settings.known_width) * FLOAT
    encoder += _griffin_state(settings.trunk, 1) if settings.trunk_layers else 0
    return {"encoder": encoder, "decoder": decoder, "context": context}


def state_bytes(config: Config, stage: str) -> int:
    """What a stage carries from window to window for each row."""
    states = _states(config)
    if stage == "autoencoder" and config.autoencoder.rate != "diffusion":
        states.pop("context", None)
    if stage == "prior" and config.data.cache_latents:
        del states["encoder"]
    if stage == "prior" and not config.training.prior.joint:
        del states["decoder"]
    return sum(states.values())


def chunk_bytes(chunking: ChunkingConfig) -> int:
    """A typical chunk's length; texts decide, so between the least and the most."""
    if chunking.strategy == "fixed":
        return chunking.max_bytes
    if chunking.needs_segmenter:
        return max(int(chunking.target_bytes), 1)
    return max(isqrt(chunking.min_bytes * chunking.max_bytes), 1)


def _stack(config: GriffinConfig, positions: int, window: int, recompute: bool) -> int:
    """Numbers that the backward pass of a Griffin stack needs, its own temporaries included."""
    d, m = config.width, round(config.width * config.mlp_ratio)
    block = max(window, 32)  # hldm.griffin.ATTENTION_BLOCK
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


def _prior_activations(config: Config, rows: int, chunks: int) -> int:
    """The same of both towers, over so many chunks a row."""
    prior, hierarchy = config.prior, config.hierarchy
    d, wide, draws = prior.width, prior.denoiser_width, prior.draws
    queries = 1 + chunks + sum(chunks // hierarchy.ratio**n + 1 for n in range(1, hierarchy.levels + 1))
    keys = capacity(hierarchy) + queries
    pairs = queries * keys
    layer = 15 * queries * d + 6 * keys * d + 4 * prior.heads * pairs
    context = prior.layers * layer + 8 * pairs
    if prior.contextualiser == "griffin":
        context = _stack(_recurrent_contextualiser(config), chunks, 1, False) + 8 * pairs
    pairs = chunks * draws * keys
    block = chunks * draws * (22 * wide + 3 * d) + 6 * chunks * wide + 4 * keys * d + 4 * prior.heads * pairs
    settings = config.autoencoder
    ends = chunks * draws * 8 * settings.latent_dim
    mixture = 6 * chunks * draws * settings.components if settings.rate == "mixture" else 0
    return rows * (context + prior.denoiser_layers * block + ends + mixture)


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
    reading = _stack(encoder, length, chunking.max_bytes, recompute) + length * 14 * max(encoder.width, z)
    reading += _stack(settings.trunk, chunks, 1, recompute) if settings.trunk_layers else 0
    writing = _stack(decoder, events, chunking.max_bytes + 1, recompute) + events * 6 * OUTPUTS
    writing += 0 if config.is_twin else events * 14 * max(decoder.width, z)
    if config.is_twin:
        numbers = writing * rows
    elif stage == "autoencoder":
        numbers = (reading + writing) * rows
        if settings.rate == "diffusion":
            numbers += _prior_activations(config, rows, chunks)
    else:
        numbers = _prior_activations(config, rows, chunks)
        if config.training.prior.joint:
            numbers += (reading + writing) * rows
    return FLOAT * numbers


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
    "cached latents": "set data.cache_latents=false",
    "checkpoints": "lower checkpoint.keep or the widths, or free some",
}


def human(count: int) -> str:
    """1536 -> 1.5 KiB, to about three digits."""
    for exponent, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**exponent:
            size = count / 1024**exponent
            return f"{size:,.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"
    return f"{count} bytes"


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
        parts["rate"] = rate_weights(config)
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
    model, average = FLOAT * _count(weights), FLOAT * _count(weights) if training.ema_decay else 0
    gradients = FLOAT * _count(trained) * (1 if processes == 1 else 2)  # DDP's buckets are a second copy
    optimizer = FLOAT * _optimizer_numbers(trained, training.optimizer)
    states = state_bytes(config, stage)
    checkpoint = model + average + optimizer + data.lanes * states + 4 * len(weights) * TENSOR_RECORD
    text = text_bytes(data)
    chunks = text // chunk_bytes(config.chunking)
    exported = {name: FLOAT * _count(part) for name, part in parts.items()}
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
        },
        disk={
            "checkpoints": checkpoint * (config.checkpoint.keep + 1),  # one more while it is written
            "exported models": 2 * sum(exported.values()),  # the stage's own and the pipeline's
            "cached latents": FLOAT * config.autoencoder.latent_dim * chunks
            if stage == "prior" and data.cache_latents
            else 0,
        },
    )


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


def require_disk(path: Path, needed: int, way_out: str) -> None:
    """Raise ConfigError unless a file of so many bytes can be written to path."""
    free, where = free_disk(path.parent)
    if needed > free:
        raise ConfigError(
            f"{path} needs {human(needed)} of disk, {human(free)} available in {where}: {way_out}, or free some"
        )


# ---- the table


def survey(config: Config, root: Path = Path("runs")) -> dict[str, Any]:
    """What every stage of a config needs and what there is, as plain data. `report` makes a table of it."""
    stages: dict[str, Any] = {}
    for stage in ("autoencoder",) if config.is_twin else ("autoencoder", "prior"):
        stages[stage] = {
            "parameters": {name: _count(part) for name, part in stage_weights(config, stage).items() if part},
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


# ---- writing


def writing_bytes(config: Config, rows: int, characters: int, prompt_bytes: int) -> int:
    """Memory to continue `rows` prompts, the longest of so many bytes, by `characters` each. A rough estimate."""
    read = min(prompt_bytes, PROMPT_WINDOW)
    stack = config.autoencoder.decoder if config.is_twin else config.autoencoder.encoder
    # nothing is kept for a backward pass: one block's, and one layer's
    numbers = _stack(replace(stack, blocks=stack.blocks[:1]), read, config.chunking.max_bytes, False)
    if not config.is_twin:
        once = replace(config.prior, layers=1, denoiser_layers=1, draws=1)
        numbers += _prior_activations(replace(config, prior=once), 1, read // chunk_bytes(config.chunking))
    written = characters + characters // chunk_bytes(config.chunking) * CHUNK_BYTES
    row = 2 * sum(_states(config).values()) + GENERATOR_BYTES + FLOAT * numbers + 2 * prompt_bytes + written
    return RUNTIME + rows * row


def require_room_to_write(config: Config, rows: int, characters: int, prompt_bytes: int) -> None:
    """Raise ConfigError unless the memory suffices; see `writing_bytes`."""
    needed = writing_bytes(config, rows, characters, prompt_bytes)
    available, where = available_memory()
    if needed > available:
        raise ConfigError(
            f"writing {characters:,} characters on from {rows:,} prompts of up to {prompt_bytes:,} bytes needs about "
            f"{human(needed)} of memory, {human(available)} available {where}: ask for fewer or shorter ones"
        )


def read_model_settings(pipeline: Path) -> Config | None:
    """The settings that a saved pipeline was built from, its JSON alone; None where they cannot be read."""
    found: dict[str, Any] = {}
    sections = {"autoencoder": ("autoencoder", "chunking"), "prior": ("prior", "hierarchy")}
    try:
        for part, names in sections.items():
            path = pipeline / part / "config.json"
            if part == "autoencoder" or path.is_file():  # a twin has no prior
                saved = json.loads(path.read_text(encoding="utf-8"))
                found |= {name: saved[name] for name in names}
        return config_from_dict(found)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # loading the model will say what is wrong


# ---- what there is


def available_memory(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> tuple[int, str]:
    """Bytes that this process can have in all, what it holds already included, and what sets the limit.

    The least of the machine's, the cgroup's (a container's, a job's) and ulimit -v's.
    """
    status = kibibytes("/proc/self/status")
    own = status.get("VmRSS", 0)
    free = kibibytes("/proc/meminfo").get("MemAvailable")
    if free is None:  # no Linux
        limits = [(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "on this machine")]
    else:
        limits = [(free + own, "on this machine")]
    limits += [(free + own, "in this cgroup") for free in _cgroup_memory(groups, root)]
    virtual, _ = resource.getrlimit(resource.RLIMIT_AS)
    if virtual != resource.RLIM_INFINITY:
        limits.append((virtual - status.get("VmSize", 0) + own, "under ulimit -v"))
    least, where = min(limits)
    return max(least, 0), where


def _cgroup_memory(groups: Path, root: Path) -> Iterator[int]:
    """Bytes still free in every cgroup with a limit that this process is in, version 1 or 2."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        place = base / path.lstrip("/")
        # A container may see its own group as the root, whatever the path says.
        for folder in (place, *(above for above in place.parents if above.is_relative_to(base))):
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
            yield most - used + int(stat.get(cache, 0))  # files read once are dropped when memory is short


def kibibytes(path: str) -> dict[str, int]:
    """The lines `name: number kB` of a file of /proc, in bytes; empty where there is none."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[2:] == ["kB"]}


def gpu_memory() -> int | None:
    """Bytes free on this process' GPU; None where there is none. Imports torch only if there may be one."""
    if "torch" not in sys.modules and not any(map(os.path.exists, GPU_DRIVERS)):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0]


def free_disk(folder: Path) -> tuple[int, Path]:
    """Bytes free where a folder is or would be made, and the folder that stands there already."""
    standing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(standing).free, standing
