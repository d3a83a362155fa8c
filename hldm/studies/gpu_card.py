"""The device that `hldm doctor --gpu` tests, and the references its sections measure against."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hldm.config import Config, ConfigError, load_config
from hldm.runs.clock import timed

ROOT = Path(__file__).resolve().parents[2]
CPU_SIZES = ("data.lanes=4", "data.window_bytes=64")  # of the CPU form
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number


class Skipped(Exception):
    """This machine lacks what a section needs."""


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
        return torch.bfloat16 if self.config.training.mixed_precision == "bf16" else torch.float32

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


def matrix_peak(card: Card) -> float:
    """TFLOP/s of a large matrix product in the dtype of training: the best of several."""
    n = 8192 if card.is_gpu else 256
    a, b = torch.randn(2, n, n, device=card.device).to(card.dtype)
    seconds = min(timed(lambda: torch.mm(a, b))[1] for _ in range(10))
    return 2 * n**3 / seconds / 1e12


def relative_error(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest difference as a share of the largest number. Raises AssertionError where that is too much."""
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= TOLERANCE[dtype]:  # nan is too much
        raise AssertionError(f"off by {error:.2g} of the largest number in {dtype_name(dtype)}")
    return error


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16 of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
