"""Stage zero: the segmenter of a run, trained when there is none yet, and the boundaries it gives, kept on disk.

runs/<name>/segmenter/model/         weights and threshold
runs/<name>/segmenter/boundaries-*   where the chunks of a corpus start, by what they depend on
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hldm.chunking.attached import attach_chunker
from hldm.chunking.entropy import EntropySegmenter
from hldm.chunking.policy import PolicySegmenter
from hldm.chunking.recurrence import GateSegmenter, StateSegmenter
from hldm.chunking.router import LearnedSegmenter
from hldm.chunking.segmenter import Segmenter
from hldm.chunking.select import SelectSegmenter
from hldm.config import ChunkingConfig, ConfigError
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import map_carry
from hldm.runs.checkpoints import atomic_write, fingerprint
from hldm.runs.clock import clock_named
from hldm.runs.folder import shipped
from hldm.text.corpus import Corpus

SEGMENTERS: dict[str, type[Segmenter]] = {
    "entropy": EntropySegmenter,
    "state_change": StateSegmenter,
    "gate": GateSegmenter,
    "learned": LearnedSegmenter,
    "reinforce": PolicySegmenter,
    "select": SelectSegmenter,
}
WARMUP, FINAL_LEARNING_RATE = 0.05, 0.05  # shares of the progress and of the peak, as training.* by default
CLIP_NORM, WEIGHT_DECAY = 1.0, 0.01  # the same
EVERY = 100  # steps between lines of progress


def train_segmenter(
    chunking: ChunkingConfig,
    corpus: Corpus,
    *,
    seed: int = 0,
    minutes: float = math.inf,
    clock: str = "wall",
    say: Callable[[str], None] = lambda line: None,
    at_step: Callable[[], object] = lambda: None,
) -> Segmenter:
    """A segmenter of the strategy that `chunking` names, trained on a corpus, its threshold set on a sample of it.

    minutes: a limit beside the settings' own, clock: what they count (hldm.runs.clock);  at_step: called before every step
    With no limit but steps it is a pure function of corpus, settings and seed.
    """
    settings = chunking.segmenter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SEGMENTERS[chunking.strategy].from_settings(chunking)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.97), weight_decay=WEIGHT_DECAY
    )
    # lanes read on from places spread over the text, round its end; their states are carried
    size, t = len(corpus.text), settings.window_bytes
    first = np.arange(settings.lanes) * size // settings.lanes
    is_doc_start = np.zeros(size, bool)
    is_doc_start[corpus.offsets[:-1]] = True
    state = model.initial_state(settings.lanes)
    most_minutes = min(minutes, settings.minutes or math.inf)
    now = clock_named(clock)
    began, progress, step = now(), 0.0, 0
    model.train()
    while progress < 1:
        at_step()
        place = (first[:, None] + step * t + np.arange(t)) % size
        text = torch.from_numpy(corpus.text[place].astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(progress)
        loss, state = model.loss(text, torch.from_numpy(is_doc_start[place]), state, progress, generator)
        if not math.isfinite(float(loss.detach())):
            raise ConfigError(
                f"chunking.strategy={chunking.strategy}: the segmenter's loss is not finite at step {step}; "
                "lower chunking.segmenter.learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        state = map_carry(lambda tensor: tensor.detach(), state)
        step += 1
        progress = step / settings.steps
        progress = max(progress, (now() - began) / (60 * most_minutes))
        if step % EVERY == 0 or progress >= 1:
            say(f"segmenter, step {step}: loss {float(loss.detach()):.3f}")
    model.eval()
    mean = model.calibrate(sample_of(corpus, settings.sample_bytes))
    say(f"segmenter: {mean:.2f} bytes a chunk at threshold {float(model.threshold):.4g}")
    return model


def _rate(progress: float) -> float:
    """Share of the peak: a linear rise, then a cosine."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.05)
    done = (progress - WARMUP) / (1 - WARMUP)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def sample_of(corpus: Corpus, size: int) -> list[np.ndarray]:
    """Beginnings of documents spread over a corpus, about `size` bytes in all."""
    documents = min(len(corpus), 16)
    most = -(-size // documents)
    picked = np.linspace(0, len(corpus) - 1, documents).astype(int)
    return [corpus.document(int(index))[:most] for index in picked]


def read_segmenter(folder: Path, chunking: ChunkingConfig) -> Segmenter | None:
    """The segmenter saved in a folder, None for a strategy that needs none.

    Raises FileNotFoundError, ValueError where it is missing, damaged or made with other settings.
    """
    if not chunking.needs_segmenter:
        return None
    segmenter = SEGMENTERS[chunking.strategy].from_pretrained(folder)
    if segmenter.chunking != chunking:
        raise ConfigError(
            f"{folder} was made with other settings of chunking: set them back, or choose another --name"
        )
    return segmenter.eval()


def shipped_segmenter(chunking: ChunkingConfig, documents: Sequence[np.ndarray]) -> Segmenter:
    """The segmenter of a strategy that comes with hldm, within these limits, its threshold set on these documents.

    Raises FileNotFoundError in a copy without it.
    """
    folder = shipped(f"segmenters/{chunking.strategy}")
    segmenter = SEGMENTERS[chunking.strategy].from_pretrained(folder).eval()
    limits = {name: getattr(chunking, name) for name in ("min_bytes", "max_bytes", "target_bytes")}
    segmenter.chunking = replace(segmenter.chunking, **limits)
    segmenter.calibrate(documents)
    return segmenter


def attach_segmenter(autoencoder: Autoencoder, segmenter: Segmenter) -> None:
    """Have an autoencoder's text cut by a segmenter. Raises ValueError when it was trained with another."""
    chunking = autoencoder.chunking
    chunker = segmenter.chunker(chunking.min_bytes, chunking.max_bytes)
    attach_chunker(autoencoder, chunker, fingerprint(segmenter.state_dict()))


def cached_starts(
    folder: Path, segmenter: Segmenter, corpus: Corpus, at_block: Callable[[], object] = lambda: None
) -> np.ndarray:
    """(t,) bool: where the chunks of a corpus start, read from `folder` or made and left there.

    The file's name says what it depends on, its head what it holds: one that is damaged is made again.
    """
    chunking = segmenter.chunking
    bound = json.dumps(
        [corpus.fingerprint, fingerprint(segmenter.state_dict()), chunking.min_bytes, chunking.max_bytes]
    )
    path = folder / f"boundaries-{hashlib.sha256(bound.encode()).hexdigest()[:16]}"
    size = len(corpus.text)
    if path.is_file():
        data = path.read_bytes()
        digest, packed = data[:32], data[32:]
        if hashlib.sha256(packed).digest() == digest and len(packed) == -(-size // 8):
            return np.unpackbits(np.frombuffer(packed, np.uint8), count=size).astype(bool)
    chunker = segmenter.chunker(chunking.min_bytes, chunking.max_bytes)
    found = chunker.chunk_starts([corpus.document(index) for index in range(len(corpus))], at_block)
    packed = np.packbits(found).tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, hashlib.sha256(packed).digest() + packed)
    return found
