"""What a run of the family needs in memory and on disk, worked out before anything is allocated.

As hldm.training.sizes for the two stages: weights and what follows from them are exact, activations an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hldm.chunking.chunker import make_chunker
from hldm.chunking.strategies import SEGMENTERS
from hldm.config import ChunkingConfig, ConfigError
from hldm.generation.footprint import FLOAT, INTEGER, RUNTIME, chunk_bytes, state_bytes
from hldm.jepa.concepts import concept_decoder
from hldm.jepa.config import JepaConfig
from hldm.jepa.decoder import ChunkDecoder
from hldm.jepa.objective import JepaObjective
from hldm.jepa.pairs import PairObjective
from hldm.jepa.sentences import SentenceObjective
from hldm.jepa.text_pairs import pairs_of
from hldm.jepa.transformer import LONGEST_TOKENS, folder_of
from hldm.runs.machine import available_memory, free_disk, gpu_memory
from hldm.text.bytes import OUTPUTS
from hldm.text.corpus import Corpus
from hldm.training.environment import launched_number
from hldm.training.optimizers import make_optimizers
from hldm.training.sizes import TENSOR_RECORD, Need, Sizes, count, stack_numbers, training_bytes

LONGER = 1.5  # texts of a batch that training may meet over those of the first held-out one


def require_room_of(
    config: JepaConfig, stage: str, corpora: Mapping[str, Corpus], root: Path = Path("runs")
) -> None:
    """Raise ConfigError, needed against available and what to lower, unless the stage will fit: "jepa" or "decoder"."""
    for need in needs_of(config, stage, corpora, root):
        if not need.fits:
            raise ConfigError(need.refusal(stage))


def needs_of(config: JepaConfig, stage: str, corpora: Mapping[str, Corpus], root: Path) -> list[Need]:
    """What the stage needs here, and how much there is: in this cgroup, on this GPU, on the disk of root."""
    sizes = sizes_of(config, stage, corpora, launched_number("WORLD_SIZE", 1))
    memory, where = available_memory()
    graphics = gpu_memory()
    host, found = dict(sizes.host), []
    if graphics is None:
        host |= sizes.device
    else:
        # models are built, and checkpoints gathered, in the memory of the machine
        host |= {name: sizes.device[name] for name in ("parameters", "optimizer state")}
        found.append(Need("GPU memory", sizes.device, graphics, "on the GPU"))
    here = launched_number("LOCAL_WORLD_SIZE", 1)
    found.append(Need("memory", {part: here * size for part, size in host.items()}, memory, where))
    folder = root / config.name / stage
    free, disk = free_disk(root)
    taken = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
    return [*found, Need("disk", sizes.disk, free + taken, f"in {disk}")]


def sizes_of(config: JepaConfig, stage: str, corpora: Mapping[str, Corpus], processes: int = 1) -> Sizes:
    """Bytes that a stage needs, in each of so many processes."""
    training, data = config.training.of(stage), config.data
    lanes = -(-data.lanes // processes)
    strategy = config.chunking.strategy
    with torch.device("meta"):
        objective = _shape_of(config)
        trained = objective if stage == "jepa" else _decoder_of(config)
        segmenter = SEGMENTERS[strategy].from_settings(config.chunking) if strategy in SEGMENTERS else None
    # targets are buffers
    held = sum(t.numel() * t.element_size() for t in objective.state_dict().values())
    model = held + (0 if stage == "jepa" else FLOAT * count(trained))
    average = model if training.ema_decay else 0
    gradients = optimizer = 0
    for each in make_optimizers(trained, training):
        weights = FLOAT * sum(p.numel() for group in each.param_groups for p in group["params"])
        gradients += weights * (1 if processes == 1 else 2)  # DDP's buckets are a second copy
        optimizer += weights * (2 if isinstance(each, torch.optim.AdamW) else 1)
    states = state_bytes(objective.initial_carry(1, torch.device("meta")))
    checkpoint = model + average + optimizer + data.lanes * states
    checkpoint += 4 * len(objective.state_dict()) * TENSOR_RECORD
    rows = -(-data.lanes // (processes * training.accumulation))
    text = sum(len(corpus.text) for corpus in corpora.values())
    return Sizes(
        device={
            "parameters": model,
            "gradients": gradients,
            "optimizer state": optimizer,
            "averaged weights": average,
            "carried states": 2 * lanes * states,
            "activations": max(FLOAT * activation_numbers(config, corpora, rows), optimizer),
        },
        host={
            "python and torch": RUNTIME,
            "corpus": 3 * text + 2 * INTEGER * text // chunk_bytes(config.chunking),
            "segmenter": training_bytes(segmenter),
        },
        disk={
            "checkpoints": checkpoint * (config.checkpoint.keep + 1),  # one more while it is written
            "exported models": model,
        },
    )


def _shape_of(config: JepaConfig) -> Any:
    """The objective without memory, when the default device is meta."""
    if config.task == "pairs":
        return PairObjective(config)
    kind = JepaObjective if config.task == "chunks" else SentenceObjective
    return kind(config, torch.ones(256, dtype=torch.long), 1.0)


def _decoder_of(config: JepaConfig) -> ChunkDecoder:
    if config.task == "chunks":
        return ChunkDecoder.from_settings(config.decoder, config.chunking, config.vector)
    return concept_decoder(config)


def activation_numbers(config: JepaConfig, corpora: Mapping[str, Corpus], rows: int) -> int:
    """An estimate of the numbers that a forward and backward pass of so many rows holds at its peak.

    Measured on a CPU in float32: 1.0 to 1.7 times the peak of a step of configs/jepa-*.yaml and of all-MiniLM-L6-v2.
    """
    encoder, decoder, longest = config.encoder, config.decoder, config.chunking.max_bytes
    a, b = _lengths(config, corpora)
    if config.task == "pairs":  # both views together, and each by itself
        positions = 2 * (a + b) + config.pairs.predictions
        numbers = stack_numbers(encoder, positions, config.pairs.window) + positions * 6 * OUTPUTS
        return rows * numbers
    if config.sentences.encoder:
        numbers = _transformer_numbers(config, a) + (b if config.objective.target != "gradient" else 0)
    else:
        wide = 14 * max(encoder.width, config.vector)
        numbers = stack_numbers(encoder, a, longest) + a * wide
        # the target's pass keeps nothing but what the block at hand needs, unless it has a gradient
        share = 1 if config.objective.target == "gradient" else len(encoder.blocks)
        numbers += (stack_numbers(encoder, b, longest) + b * wide) // share
    chunks = a // chunk_bytes(config.chunking) + 1
    if config.objective.has_predictor:
        settings = config.predictor
        numbers += settings.layers * chunks * (16 * settings.width + 4 * settings.heads * chunks)
    terms = config.objective.terms
    if terms.own or terms.predicted:
        events = a + chunks
        numbers += stack_numbers(decoder, events, longest + 1)
        numbers += events * (6 * OUTPUTS + 14 * max(decoder.width, config.vector))
    return rows * numbers


def _lengths(config: JepaConfig, corpora: Mapping[str, Corpus]) -> tuple[int, int]:
    """Bytes of a row of what is read, and of what targets are made of, padding included."""
    if config.task == "chunks":
        length = config.data.window_bytes + config.chunking.max_bytes
        # holes may be longer than what they hide
        grows = max(config.views.hole_bytes / chunk_bytes(config.chunking), 1.0) - 1
        return round(length * (1 + grows * config.views.share)), length
    chunker = make_chunker(ChunkingConfig())  # any will do: lengths alone are asked for
    corpus = corpora["validation"]
    batch = pairs_of(config, corpus, corpora["train"], chunker, config.data.lanes).batch(0)
    return round(LONGER * batch.context.bytes.shape[1]), round(LONGER * batch.target.bytes.shape[1])


def _transformer_numbers(config: JepaConfig, length: int) -> int:
    """Of a transformer's pass over a text of so many bytes, about four to a token."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(folder_of(config), local_files_only=True)
    tokens, d = min(length // 3, LONGEST_TOKENS), settings.hidden_size
    heads = settings.num_attention_heads
    return settings.num_hidden_layers * tokens * (34 * d + 5 * heads * tokens)
