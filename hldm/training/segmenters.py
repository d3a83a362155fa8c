"""Stage zero: the segmenter of a run, trained on its corpus before the autoencoder is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import SEGMENTERS, sample_of
from hldm.config import ChunkingConfig, ConfigError, TrainingConfig
from hldm.model.state import map_carry
from hldm.runs.clock import clock_named
from hldm.text.corpus import Corpus
from hldm.training.optimizers import CLIP_NORM, learning_rate, make_optimizers

LEAST = 0.05  # of the peak learning rate: the first step learns, too
EVERY = 100  # steps between lines of progress


def train_segmenter(
    chunking: ChunkingConfig,
    corpus: Corpus,
    *,
    seed: int = 0,
    minutes: float | None = None,
    steps: int | None = None,
    most_minutes: float = math.inf,
    clock: str = "wall",
    say: Callable[[str], None] = lambda line: None,
    at_step: Callable[[], object] = lambda: None,
) -> Segmenter:
    """Train the segmenter of a strategy on a corpus; its threshold is set on a sample of the corpus.

    minutes, steps: in place of the strategy's own (`hldm.chunking.segmenter.Settings`)
    most_minutes: a limit beside them;  clock: what minutes count (hldm.runs.clock)
    at_step: called before every step
    With no limit but steps it is a pure function of corpus, settings and seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SEGMENTERS[chunking.strategy].from_settings(chunking)
    generator = torch.Generator().manual_seed(seed)
    settings = model.settings
    training = TrainingConfig(optimizer="adamw", learning_rate=settings.learning_rate)
    (optimizer,) = make_optimizers(model, training)
    # each stream starts at its own place of the text, carries its state, and goes on at the beginning after the end
    size, t = len(corpus.text), settings.window_bytes
    first = np.arange(settings.lanes) * size // settings.lanes
    is_doc_start = np.zeros(size, bool)
    is_doc_start[corpus.offsets[:-1]] = True
    state = model.initial_state(settings.lanes)
    most_minutes = min(most_minutes, settings.minutes if minutes is None else minutes)
    most_steps = settings.steps if steps is None else steps
    now = clock_named(clock)
    began, progress, step = now(), 0.0, 0
    model.train()
    while progress < 1:
        at_step()
        place = (first[:, None] + step * t + np.arange(t)) % size
        text = torch.from_numpy(corpus.text[place].astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = max(LEAST * training.learning_rate, learning_rate(training, progress))
        loss, state = model.loss(text, torch.from_numpy(is_doc_start[place]), state, progress, generator)
        if not math.isfinite(float(loss.detach())):
            raise ConfigError(
                f"chunking.strategy={chunking.strategy}: the segmenter's loss is not finite at step {step}; "
                "choose another seed or chunking.strategy"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        state = map_carry(lambda tensor: tensor.detach(), state)
        step += 1
        progress = step / most_steps
        progress = max(progress, (now() - began) / (60 * most_minutes))
        if step % EVERY == 0 or progress >= 1:
            say(f"segmenter, step {step}: loss {float(loss.detach()):.3f}")
    model.eval()
    mean = model.calibrate(sample_of(corpus, settings.sample_bytes))
    say(f"segmenter: {mean:.2f} bytes a chunk at threshold {float(model.threshold):.4g}")
    return model


def train_for_minutes(minutes: float, chunking: ChunkingConfig, corpus: Corpus) -> Segmenter:
    """A segmenter trained by the clock alone."""
    return train_segmenter(chunking, corpus, minutes=minutes, steps=10**9)
