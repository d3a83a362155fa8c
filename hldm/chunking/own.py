"""A chunking strategy of the user's own, named by `chunking.strategy=module:Class`.

Its class says where chunks would like to start; limits, whole characters and all else are those of `Chunker`. It is
tried on a probe text when it is loaded, for what a model relies on: one answer a byte, the same answer each time, and
none that depends on a later byte. That what it does elsewhere is as causal cannot be seen from here.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

from hldm import plugins
from hldm.chunking.chunker import Chunker
from hldm.config import ChunkingConfig, ConfigError
from hldm.sources.notes import note

SETTING = "chunking.strategy"
PROBE = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;\n"
    '"Mr. Smith," she said... "costs 3.50 (or so)!"  \tWell?\n\n'
    "def f(x_1):\n    return [x_1]  # ok\nÉlan, naïve; Größe ÿ.\r\n\r\n世界。你好！और फिर। 👩\u200d👧 eeeeeeeeeeeeeeee"
).encode() + b"\xff\x80 end"


class ChunkingStrategy(Protocol):
    """What a chunking strategy of one's own must provide."""

    def __init__(self, min_bytes: int, max_bytes: int) -> None:
        """min_bytes, max_bytes: the limits of a chunk, which are kept without its help."""

    def borders(self, text: bytes) -> np.ndarray:
        """(t,) bool: where a chunk would like to start, of one document; entry t depends on text[: t + 1] only.

        A border at a later byte of a character does not count: no character is split.
        """
        ...


class OwnChunker(Chunker):
    """Cuts at the borders of the user's strategy."""

    def __init__(self, name: str, min_bytes: int, max_bytes: int) -> None:
        """Loads and tries it. Raises ConfigError, one line, for what it lacks or gets wrong."""
        super().__init__(min_bytes, max_bytes)
        self.name = f"{SETTING}={name}"
        self.cls = plugins.load(name, SETTING)
        plugins.require_methods(self.cls, ChunkingStrategy, self.name)
        made = plugins.called(
            f"{self.name}: {self.cls.__name__}(min_bytes, max_bytes)", self.cls, min_bytes, max_bytes
        )
        self.strategy: ChunkingStrategy = made
        self._try()

    def borders(self, text: bytes) -> np.ndarray:
        if not text:
            return np.zeros(0, bool)
        found = np.asarray(plugins.called(f"{self.name}: borders(text)", self.strategy.borders, text))
        if found.dtype != bool or found.shape != (len(text),):
            raise ConfigError(
                f"{self.name}: borders(text) must return one bool a byte, bool ({len(text)},), "
                f"got {found.dtype} {found.shape}"
            )
        return found & (np.frombuffer(text, np.uint8) & 0xC0 != 0x80)

    def _try(self) -> None:
        """Raise ConfigError unless the borders of the probe text are a function of the bytes up to each."""
        whole = self.borders(PROBE)
        if (self.borders(PROBE) != whole).any():
            raise ConfigError(
                f"{self.name}: borders(text) must say the same of the same text, whatever came before"
            )
        for end in range(1, len(PROBE)):
            wrong = np.flatnonzero(self.borders(PROBE[:end]) != whole[:end])
            if len(wrong):
                at = int(wrong[0])
                raise ConfigError(
                    f"{self.name}: borders(text) must depend on no later byte, but that of byte {at} of "
                    f"{PROBE[max(at - 12, 0) : end]!r} changes with what follows"
                )

    @property
    def mark(self) -> str:
        """What a model remembers of it: a fingerprint of what it does to the probe text, and one of its source."""
        done = hashlib.sha256(np.packbits(self.borders(PROBE)).tobytes()).hexdigest()[:16]
        return f"{done}-{plugins.source_of(self.cls)}"


def own_chunker(config: ChunkingConfig) -> OwnChunker:
    """The strategy of `chunking.strategy=module:Class`."""
    return OwnChunker(config.strategy, config.min_bytes, config.max_bytes)


def check_mark(chunker: OwnChunker, saved: str) -> None:
    """Raise ValueError where a model was trained on other chunks; say so where only the source has changed since.

    saved: the mark that the model remembers, "" for one in training
    """
    if saved and saved.partition("-")[0] != chunker.mark.partition("-")[0]:
        raise ValueError(
            f"this model was trained on chunks of another {chunker.name}: its class cuts the probe text otherwise "
            "now; restore it, or train again"
        )
    if saved not in ("", chunker.mark):
        note(f"{chunker.name}: its source has changed since the model was trained on its chunks")
