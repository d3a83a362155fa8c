"""`hldm doctor --gpu`: whether what is made for a GPU is right there, and how fast, in minutes on one card.

Each section checks or measures one thing and says it in one line. Without a GPU all of them run at tiny size on the
CPU, which tests the sections, not a card; what needs CUDA is said to be skipped. A section that fails is a fault, and
the others still run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from hldm.runs.machine import human
from hldm.studies.gpu_card import Card, Skipped, dtype_name, matrix_peak
from hldm.studies.gpu_scan import gradients, kernel_choice, scan
from hldm.studies.gpu_training import compiling, stage_one, stage_two, two_ranks
from hldm.studies.gpu_writing import generators, writing

LIMIT_S = 480.0  # no section starts later


class Result(NamedTuple):
    """What a section found."""

    name: str
    status: str  # ok, skipped, FAULT
    text: str  # one line
    seconds: float
    figures: Mapping[str, Any]


def check(card: Card) -> Iterator[Result]:
    """Every section, in order."""
    began = time.monotonic()
    for section in SECTIONS:
        name = section.__name__.replace("_", " ")
        start = time.monotonic()
        figures: Mapping[str, Any] = {}
        try:
            if start - began > LIMIT_S:
                raise Skipped(f"{LIMIT_S:g} s have passed")
            text, figures = section(card)
            status = "ok"
        except Skipped as reason:
            status, text = "skipped", f"skipped: {reason}"
        # what drivers and compilers raise has no common base; the next section may still work
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            status, text = "FAULT", f"{type(error).__name__}: {' '.join(' '.join(lines[:3]).split())[:300]}"
        gc.collect()
        if card.is_gpu:
            torch.cuda.empty_cache()
        yield Result(name, status, f"{name}: {text}", time.monotonic() - start, figures)


def report(results: list[Result]) -> dict[str, Any]:
    """Plain data of all of them."""
    return {
        found.name: {"status": found.status, "text": found.text, "seconds": found.seconds, **found.figures}
        for found in results
    }


def card(card: Card) -> tuple[str, dict[str, Any]]:
    """What it is, and the peak of its matrix products."""
    peak = matrix_peak(card)
    figures: dict[str, Any] = {"torch": torch.__version__, "peak_tflops": peak, "dtype": str(card.dtype)}
    if not card.is_gpu:
        text = "no GPU: this is the CPU form at tiny size, which says nothing of a card"
    else:
        properties = torch.cuda.get_device_properties(card.device)
        figures |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        figures |= {"cards": torch.cuda.device_count(), "memory_bytes": properties.total_memory}
        figures |= {"cuda": torch.version.cuda}
        text = (
            f"{properties.name}, capability {figures['capability']}, {human(properties.total_memory)}, "
            f"{figures['cards']} of them, CUDA {torch.version.cuda}"
        )
    return (
        f"{text}; torch {torch.__version__}; {dtype_name(card.dtype)} products reach {peak:.3g} TFLOP/s",
        figures,
    )


SECTIONS: tuple[Callable[[Card], tuple[str, Mapping[str, Any]]], ...] = (
    card, scan, gradients, kernel_choice, stage_one, stage_two, compiling, writing, generators, two_ranks,
)  # fmt: skip
