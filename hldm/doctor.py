"""`hldm doctor`: what is installed, what this machine has, and what of it does not work.

A machine without a network or an accelerator is in good health.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
from packaging.requirements import Requirement
from typer import Option

from hldm.config import ConfigError
from hldm.runs.machine import free_disk

GIB = 2**30


class Finding(NamedTuple):
    """One line of the report; `is_fault` makes the exit code 1."""

    text: str
    is_fault: bool = False


def doctor(
    *,
    gpu: Annotated[bool, Option("--gpu", help="check and measure the GPU code, in minutes")] = False,
    config: Annotated[Path | None, Option(help="with --gpu: its shapes (default: configs/base.yaml)")] = None,
    as_json: Annotated[bool, Option("--json", help="the same as one JSON object")] = False,
) -> int:
    """Check this machine and installation.

    Exit code 1 when something that training needs is missing.
    """
    if config is not None and not gpu:
        raise ConfigError("--config says whose shapes --gpu measures: give both")
    found: list[Finding] = []

    def say(finding: Finding) -> None:
        found.append(finding)
        if not as_json:
            print(f"{'FAULT' if finding.is_fault else 'ok   '} {finding.text}", flush=True)

    figures = _check_gpu(config, say) if gpu else None
    for check in () if gpu else (check_packages, check_machine, check_corpus, check_hub):
        for finding in _findings(check):
            say(finding)
    faults = sum(finding.is_fault for finding in found)
    if as_json:
        told = {"findings": [finding._asdict() for finding in found], "faults": faults}
        print(json.dumps(told if figures is None else {**told, "gpu": figures}, indent=1))
    else:
        print(f"{faults} fault{'s' * (faults != 1)} found")
    return 1 if faults else 0


def _check_gpu(config: Path | None, say: Callable[[Finding], None]) -> dict[str, object]:
    from hldm.studies.gpu import check, report
    from hldm.studies.gpu_card import card_of

    results = []
    for result in check(card_of(config)):
        say(Finding(f"{result.text} ({result.seconds:.0f} s)", is_fault=result.status == "FAULT"))
        results.append(result)
    return report(results)


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except ImportError as error:
        yield Finding(f"{check.__name__} could not run: {' '.join(str(error).split())}", is_fault=True)


def check_packages() -> Iterator[Finding]:
    """Python and every package hldm asks for, by its metadata alone."""
    yield Finding(f"Python {platform.python_version()} on {platform.platform()}")
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("hldm") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("hldm is not installed: make setup, or pip install -e .", is_fault=True)
        return
    yield Finding(f"hldm {importlib.metadata.version('hldm')}")
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = f" {importlib.metadata.version(requirement.name)}"
            is_good = requirement.specifier.contains(found.strip(), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            found, is_good = " is missing", False
        way_out = "" if is_good else f": pip install '{requirement}'"
        yield Finding(f"{requirement.name}{found}{way_out}", is_fault=not is_good)


def check_machine() -> Iterator[Finding]:
    """Device, threads, kernels, memory, disk."""
    import torch

    if torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator()
        yield Finding(f"device {name}, {torch.accelerator.device_count()} of them")
    else:
        yield Finding("device cpu, no accelerator")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores (OMP_NUM_THREADS {threads})")
    if find_spec("hldm.kernels") is None:
        yield Finding("C++ kernels: none, plain torch does the same (hldm/kernels is not there)")
    else:
        from hldm.kernels.library import kernels

        yield Finding(f"C++ kernels: {kernels().told}")
    yield Finding(f"memory {psutil.virtual_memory().total / GIB:.1f} GiB")
    free, folder = free_disk(Path.cwd())
    yield Finding(f"disk {free / GIB:.1f} GiB free in {folder}")


def check_corpus() -> Iterator[Finding]:
    """Whether the built-in corpus can be read."""
    from hldm.sources.corpora import bible_verses

    try:
        yield Finding(f"built-in corpus: {len(bible_verses()):,} verses of the Bible in Basic English")
    except ConfigError as error:
        yield Finding(str(error), is_fault=True)


def check_hub() -> Iterator[Finding]:
    """Whether datasets could be fetched by name; nothing else needs that."""
    from hldm.sources.hub import require_hub

    try:
        require_hub("Hugging Face hub")
        yield Finding("Hugging Face hub: reachable")
    except ConfigError as error:
        yield Finding(f"{error}; only data.dataset needs it")
