"""How fast a model writes, beside its twin and a GPT-2 of as many parameters, and what memory that takes.

By the number of continuations at once, the length of the text before them and the denoising steps a latent. Everyone
writes in turns, a few characters each time. The GPT-2 is transformers' own with its key-value cache, untrained; it
knows no more than its last `GPT2_POSITIONS` bytes, and once those are used up it reads the later half of them again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hldm.config import Config, changed
from hldm.evaluation.tables import Table, row
from hldm.generation.chunk import Piece
from hldm.generation.writer import Writer, make_writer, row_generators
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.clock import in_turns, median_ratio, timed
from hldm.runs.machine import peak_memory
from hldm.text.bytes import END_OF_CHUNK, OUTPUTS, count_characters
from hldm.text.corpus import Corpus

TURNS = 7
CHARACTERS_A_TURN = 30  # of each continuation, at least
CHARACTERS_AT_LEAST = 240  # of a turn: less than a tenth of a second is too noisy
GPT2_POSITIONS = 1024  # as the smallest GPT-2
GPT2_PIECE = 8  # bytes a call of its writer


class Case(NamedTuple):
    """What is asked for: so many continuations at once, each of a prompt of so many bytes."""

    rows: int
    prompt_bytes: int
    steps: int | None = None  # denoising steps; None: as the config has them


CASES = {
    "1 continuation": Case(1, 1_000),
    "8 continuations": Case(8, 1_000),
    "64 continuations": Case(64, 1_000),
    "1 after 10,000 bytes": Case(1, 10_000),
}
LONG_CASES = {  # minutes of reading
    "1 after 100,000 bytes": Case(1, 100_000),
    "1 after 1,000,000 bytes": Case(1, 1_000_000),
}
STEPS = (0, 1, 4, 16)  # denoising steps of one continuation after the shortest prompt


class Contestant(NamedTuple):
    """A model that writes."""

    parameters: int
    start: Callable[[Case], Writer]  # with the prompt read
    steps: tuple[int, ...] = ()  # numbers of denoising steps it can be asked for


# ---- the models that write


def write_like(autoencoder: Autoencoder, corpus: Corpus, chunks: int) -> None:
    """Make an untrained decoder write the corpus' bytes by frequency, whatever it reads, in chunks about as long.

    Its own chunks would have all the length they may, which flatters a model with a cost per chunk. Documents
    never end. And prompts of any length are continued by the same text, so that only its cost can differ.
    """
    count = torch.zeros(OUTPUTS)
    count[:256] = torch.from_numpy(np.bincount(corpus.text, minlength=256))
    count[END_OF_CHUNK] = chunks
    with torch.no_grad():
        autoencoder.outputs.weight.zero_()
        autoencoder.outputs.bias.copy_(count.log())


def contestant(autoencoder: Autoencoder, prior: Prior | None, config: Config, corpus: Corpus) -> Contestant:
    """A model of ours, or its twin where there is no prior."""

    def start(case: Case) -> Writer:
        # 1: `write_like` means its frequencies
        settings = changed(config.generation, decoder_temperature=1.0)
        if case.steps is not None:
            settings = changed(settings, steps=case.steps)
        generators = row_generators(config.seed, case.rows)
        return make_writer(autoencoder, prior, prompts(corpus, case), settings, generators)

    steps = () if prior is None else tuple(n for n in STEPS if n or prior.mixture is not None)
    modules = [autoencoder] if prior is None else [autoencoder, prior]
    return Contestant(sum(p.numel() for module in modules for p in module.parameters()), start, steps)


def gpt2_contestant(parameters: int, corpus: Corpus, device: torch.device) -> Contestant:
    """A GPT-2 of about so many parameters, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width, layers = gpt2_shape(parameters)
    sizes = {"vocab_size": OUTPUTS, "n_embd": width, "n_layer": layers, "n_head": layers}
    shape = GPT2Config(n_positions=GPT2_POSITIONS, bos_token_id=None, eos_token_id=None, **sizes)
    model = GPT2LMHeadModel(shape).eval().to(device)
    count = sum(p.numel() for p in model.parameters())
    return Contestant(count, lambda case: GPT2Writer(model, prompts(corpus, case)))


def gpt2_shape(parameters: int) -> tuple[int, int]:
    """Width and layers, which are its heads, too: 64 times as wide as deep, as GPT-2, then the width that fits best."""
    layers = max(1, round((parameters / (12 * 64**2)) ** (1 / 3)))
    # a d^2 + b d: products and biases of attention and MLP and two norms in each layer; embeddings
    a, b = 12 * layers, 13 * layers + OUTPUTS + GPT2_POSITIONS + 2
    width = (math.sqrt(b * b + 4 * a * parameters) - b) / (2 * a)
    return layers * round(width / layers), layers


class GPT2Writer:
    """Greedy bytes of a GPT-2 with a key-value cache; a row's text never ends."""

    calls = 0

    def __init__(self, model: Any, prompts: list[bytes]):
        self.model = model
        text = np.stack([np.frombuffer(prompt, np.uint8) for prompt in prompts]).astype(np.int64)
        self.text = torch.from_numpy(text[:, -GPT2_POSITIONS // 2 :]).to(
            model.device
        )  # (b t) what it still knows
        self.chosen = self._read(self.text)

    def _read(self, text: Tensor, past: Any = None) -> Tensor:
        """The next symbols (b 1) after more text (b t)."""
        found = self.model(text, past_key_values=past, use_cache=True, logits_to_keep=1)
        self.past = found.past_key_values
        return found.logits[:, -1, :128].argmax(dim=-1, keepdim=True)  # ASCII: each byte is a character

    def write(self) -> list[Piece]:
        """GPT2_PIECE bytes more a row."""
        before = self.text.shape[1]
        for _ in range(GPT2_PIECE):
            self.text = torch.cat([self.text, self.chosen], dim=1)
            if self.past.get_seq_length() < GPT2_POSITIONS:
                self.chosen = self._read(self.chosen, self.past)
            else:
                before -= self.text.shape[1] - GPT2_POSITIONS // 2
                self.text = self.text[:, -GPT2_POSITIONS // 2 :]
                self.chosen = self._read(self.text)
        return [Piece(bytes(written), False) for written in self.text[:, before:].tolist()]


def prompts(corpus: Corpus, case: Case) -> list[bytes]:
    """The corpus' first bytes, again and again where it has fewer."""
    return [np.resize(corpus.text, case.prompt_bytes).tobytes()] * case.rows


# ---- how fast


class Continuing:
    """Prompts being continued, and what reading them took."""

    def __init__(self, contestant: Contestant, case: Case):
        self.least = max(CHARACTERS_A_TURN * case.rows, CHARACTERS_AT_LEAST)

        def begin() -> None:
            self.writer, self.reading_seconds = timed(lambda: contestant.start(case))
            self.write()  # warm-up

        self.peak, self.growth = peak_memory(begin)
        self.calls_before = self.writer.calls

    def write(self) -> int:
        """A turn more; returns its characters."""
        characters = 0
        while characters < self.least:
            characters += sum(count_characters(piece.text) for piece in self.writer.write())
        return characters

    def figures(self, characters: int, rates: Sequence[float]) -> dict[str, Any]:
        """Those of `report`. characters: of all turns;  rates: characters per second of each"""
        return {
            "characters_per_second": statistics.median(rates),
            "characters_per_second_best": max(rates),
            "characters": characters,
            "denoiser_calls": self.writer.calls - self.calls_before,
            "reading_seconds": self.reading_seconds,
            "peak_bytes": self.peak,
            "growth_bytes": self.growth,
        }


def measure(contestants: Mapping[str, Contestant], *, long: bool = False) -> dict[str, dict[str, Any]]:
    """Figures of every contestant in every case, in turns; the ratios to twin and GPT-2 are medians over turns."""
    shortest = next(iter(CASES.values()))
    labels = {case: label for label, case in (CASES | (LONG_CASES if long else {})).items()}
    asked = [(name, case) for name in contestants for case in labels]
    for name, someone in contestants.items():
        for steps in someone.steps:
            asked.append((name, shortest._replace(steps=steps)))
            labels[asked[-1][1]] = f"1 with {steps} denoising steps"
    with torch.no_grad():
        running = {(name, case): Continuing(contestants[name], case) for name, case in asked}
        turns = in_turns({key: continuing.write for key, continuing in running.items()}, TURNS)
    rates = {key: [characters / seconds for characters, seconds in found] for key, found in turns.items()}
    found: dict[str, dict[str, Any]] = {
        name: {"parameters": someone.parameters} for name, someone in contestants.items()
    }
    for (name, case), continuing in running.items():
        same = case._replace(steps=None)  # that everyone was asked
        against = {f"over_{other}": (other, same) for other in contestants if other != name}
        if case.prompt_bytes != shortest.prompt_bytes:
            against["over_short_prompt"] = (name, same._replace(prompt_bytes=shortest.prompt_bytes))
        ratios = {
            key: median_ratio(rates[name, case], rates[other])
            for key, other in against.items()
            if other in rates
        }
        characters = sum(characters for characters, _ in turns[name, case])
        found[name][labels[case]] = continuing.figures(characters, rates[name, case]) | ratios
    return found


def report(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `measure` found."""
    rows = [row("parameters", ",.0f", found, "parameters")]
    for label in list(next(iter(found.values())))[1:]:
        rows.append(row(f"{label}, characters per second", ",.1f", found, label, "characters_per_second"))
        details = [
            ("the best turn", ",.1f", "characters_per_second_best", 1.0),
            *((f"times the {name}'s", ",.2f", f"over_{name}", 1.0) for name in list(found)[1:]),
            ("times as fast as after the short prompt", ",.2f", "over_short_prompt", 1.0),
            ("denoiser calls", ",.0f", "denoiser_calls", 1.0),
            ("seconds to read the prompt", ".3f", "reading_seconds", 1.0),
            ("peak memory of the process, MiB", ",.1f", "peak_bytes", 2**-20),
            ("grown by, MiB", ",.1f", "growth_bytes", 2**-20),
        ]
        for name, form, key, scale in details:
            line = row(f"  {name}", form, found, label, key, scale=scale)
            if set(line[1:]) != {"-"}:
                rows.append(line)
    return Table(["writing", *found], rows)
