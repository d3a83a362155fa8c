"""Text written back from a level-1 summary alone: how much of r chunks their mean still holds.

A small decoder learns p(text of r chunks | mean of their vectors) on the frozen encoder of a run and then writes the
likeliest bytes of held-out stretches freely. What it writes stands beside what it writes from another stretch's summary
(shuffled), and beside a decoder of the same size and minutes that reads no summary at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hldm.chunking.reading import held_out_windows, read_windows
from hldm.config import ChunkingConfig, StackConfig, TrainingConfig, changed
from hldm.evaluation.tables import Table
from hldm.generation.pipeline import read_pipeline
from hldm.jepa.concepts import score_texts
from hldm.jepa.decoder import ChunkDecoder
from hldm.model.autoencoder import Autoencoder
from hldm.runs.clock import clock_named
from hldm.runs.folder import corpora_of_run
from hldm.runs.location import pipeline_of
from hldm.text.bytes import count_characters
from hldm.text.corpus import Corpus, make_corpus
from hldm.training.optimizers import CLIP_NORM, make_average, make_optimizers, set_rates

TRAINING_BYTES = 2_000_000  # of training text that is encoded
STRETCHES = 400  # of held-out text that are written
BATCH = 64  # stretches an optimizer step
DECODER = StackConfig(width=96, blocks=("recurrent",), heads=4)
TRAINING = TrainingConfig(learning_rate=8e-3)  # that of stage two, configs/small.yaml


class Stretches(NamedTuple):
    """Stretches of r chunks, each with the means of what stands for its chunks."""

    text: Tensor  # (k l) bytes, 0 where padded
    length: Tensor  # (k)
    means: dict[str, Tensor]  # (k w) of latents, and of what the trunk knows after each chunk

    def some(self, index: Tensor) -> Stretches:
        """Those of this index (j) alone."""
        return Stretches(
            self.text[index], self.length[index], {name: means[index] for name, means in self.means.items()}
        )

    def texts(self) -> list[str]:
        """As strings."""
        rows = zip(self.text.tolist(), self.length.tolist(), strict=True)
        return [bytes(row[:size]).decode(errors="replace") for row, size in rows]


@torch.no_grad()
def stretches_of(autoencoder: Autoencoder, corpus: Corpus, chunks: int) -> Stretches:
    """The complete blocks of so many chunks of every document, counted from its start as in the pyramid.

    Raises ValueError where no document is long enough.
    """
    windows = held_out_windows(autoencoder, corpus)
    vectors: dict[str, Tensor] = {}
    for batch, encoding in read_windows(autoencoder, windows):
        found = {"latents": encoding.latents}
        if autoencoder.settings.trunk_layers:
            found["trunk"] = encoding.after
        for name, of_chunk in found.items():
            kept = vectors.setdefault(name, torch.zeros(windows.chunks, of_chunk.shape[-1]))
            kept[batch.chunk_index[batch.is_chunk].cpu()] = of_chunk[batch.is_chunk].float().cpu()
    start = np.append(np.flatnonzero(windows.chunk_start), len(corpus.text))  # of chunks, then the end
    document = np.searchsorted(start, corpus.offsets)  # first chunk of each, then how many there are
    pairs = zip(document[:-1], document[1:], strict=True)
    first = np.concatenate([np.arange(a, b - chunks + 1, chunks) for a, b in pairs])  # (k)
    if not len(first):
        raise ValueError(f"{corpus.name}: no document holds {chunks} chunks: take fewer")
    begin, end = start[first], start[first + chunks]
    length = end - begin
    place = np.arange(length.max())
    is_real = place < length[:, None]
    text = np.where(is_real, corpus.text[np.where(is_real, begin[:, None] + place, 0)], 0)
    blocks = torch.from_numpy(first)[:, None] + torch.arange(chunks)  # (k r)
    means = {name: of_chunk[blocks].mean(dim=1) for name, of_chunk in vectors.items()}
    return Stretches(torch.from_numpy(text.astype(np.int64)), torch.from_numpy(length), means)


def train_decoder(
    vectors: Tensor, stretches: Stretches, max_bytes: int, minutes: float, seed: int
) -> ChunkDecoder:
    """A decoder of stretches from vectors (k w), trained for so many minutes of one CPU core's time."""
    clock, generator = clock_named("cpu"), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        chunking = changed(ChunkingConfig(), strategy="fixed", min_bytes=1, max_bytes=max_bytes)
        decoder = ChunkDecoder.from_settings(DECODER, chunking, vectors.shape[1])
    optimizers = make_optimizers(decoder, TRAINING)
    average = make_average(decoder, TRAINING.ema_decay)
    began = clock()
    while (progress := (clock() - began) / (60 * minutes)) < 1:
        set_rates(optimizers, TRAINING, 1.0, progress)
        index = torch.randint(len(vectors), (BATCH,), generator=generator)
        length = stretches.length[index]
        text = stretches.text[index, : int(length.max())]
        loss = decoder.nats(vectors[index], text, length).sum() / length.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(decoder)
    decoder.load_state_dict(average.module.state_dict())
    return decoder.eval()


def uncompress_run(
    folder: Path, *, chunks: int, minutes: float, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train the decoders on a run's training text and score what they write of its test text, as JSON.

    chunks: of a stretch;  minutes: of one CPU core's time, each decoder's
    Raises ValueError, one line, for the twin, and for text without a stretch.
    """
    autoencoder = read_pipeline(pipeline_of(folder)).autoencoder
    if not autoencoder.latent_dim:
        raise ValueError(f"{folder} is a twin, which has no summaries: pass the run of a latent model")
    corpora = corpora_of_run(folder)
    train = stretches_of(autoencoder, _part_of(corpora["train"]), chunks)
    test = stretches_of(autoencoder, corpora["test"], chunks)
    picked = np.linspace(0, len(test.text) - 1, min(STRETCHES, len(test.text))).astype(int)
    test = test.some(torch.from_numpy(np.unique(picked)))
    right, max_bytes = test.texts(), chunks * autoencoder.chunking.max_bytes
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))
    records, written = [], {"true": right}
    for name in ("nothing", *train.means):
        say(f"decoder of {name}: {minutes:g} minutes on {len(train.text):,} stretches of {chunks} chunks")
        seen, held = (
            stretches.means.get(name, torch.zeros(len(stretches.text), 1)) for stretches in (train, test)
        )
        scale = seen.std(dim=0).clamp(min=1e-6)
        seen, held = ((vectors - seen.mean(dim=0)) / scale for vectors in (seen, held))
        decoder = train_decoder(seen, train, max_bytes, minutes, seed)
        given = {name: held} if name == "nothing" else {name: held, f"{name}, shuffled": held[order]}
        for label, vectors in given.items():
            lines = [line.decode(errors="replace") for line in decoder.write_chunks(vectors)]
            written[label] = lines
            records.append(
                {"summary": label, "numbers": 0 if name == "nothing" else held.shape[1]}
                | {"bits_per_character": _bits(decoder, vectors, test)}
                | score_texts(lines, right)
            )
    return {
        "summaries": records,
        "run": folder.resolve().name,
        "chunks": chunks,
        "minutes": minutes,
        "seed": seed,
        "stretches": len(right),
        "characters": float(np.mean([len(line) for line in right])),
        "written": {label: lines[:: max(len(right) // 4, 1)][:4] for label, lines in written.items()},
    }


@torch.no_grad()
def _bits(decoder: ChunkDecoder, vectors: Tensor, stretches: Stretches) -> float:
    """Bits a character of the true text of stretches, ends included."""
    nats = float(decoder.nats(vectors, stretches.text, stretches.length).double().sum())
    return nats / math.log(2) / sum(count_characters(line.encode()) for line in stretches.texts())


def _part_of(corpus: Corpus) -> Corpus:
    """Documents spread over a corpus, of about TRAINING_BYTES."""
    count = max(int(len(corpus) * min(TRAINING_BYTES / len(corpus.text), 1.0)), 1)
    picked = np.linspace(0, len(corpus) - 1, count).astype(int)
    return make_corpus(corpus.name, (corpus.document(int(index)).tobytes() for index in picked))


def tables(found: Mapping[str, Any]) -> list[str | Table]:
    """What `uncompress_run` found, for `hldm.evaluation.tables.show`."""
    head = (
        f"{found['stretches']:,} held-out stretches of {found['chunks']} chunks ({found['characters']:.0f} characters) "
        f"of {found['run']}, written from one summary each; {found['minutes']:g} minutes a decoder"
    )
    table = Table.of_records(
        found["summaries"],
        {
            "mean of": ("summary", "s"),
            "numbers": ("numbers", "d"),
            "bits/char": ("bits_per_character", ".3f"),
            "chrF": ("chrf", ".3f"),
            "edit similarity": ("edit_similarity", ".3f"),
            "±": ("standard_error", ".3f"),
            "ROUGE-L": ("rougeL", ".3f"),
        },
    )
    samples = [
        "\n".join(f"{label + ':':<{22}}{lines[i]}" for label, lines in found["written"].items())
        for i in range(len(found["written"]["true"]))
    ]
    return [head, table, *samples]
