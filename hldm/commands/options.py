"""Options that several commands share, each a type with its spelling and its help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

from hldm.plugins import ALL, allow


def check_minutes(value: float | None) -> float | None:
    """For typer's callback: the minutes, if they can be waited for."""
    if value is not None and not 0 < value < math.inf:
        raise BadParameter(f"must be positive and finite, got {value:g}")
    return value


def _check_seed(value: int) -> int:
    if not 0 <= value < 2**31:  # hldm.generation.seeds.MAX_SEED, which imports torch
        raise BadParameter(f"must lie in 0..2^31-1, got {value}")
    return value


def check_split(split: str | None, text: Path | None) -> None:
    """Raise ValueError where both a split of the run's text and another text are asked for."""
    if split is not None and text is not None:
        raise ValueError("--split is of the run's own data: give it or --text, not both")


def _allow_code(is_asked: bool) -> bool:
    if is_asked:
        allow([ALL])
    return is_asked


# The callback does what it says; a command only lists it among its parameters.
AllowCode = Annotated[
    bool,
    Option(
        "--allow-code", callback=_allow_code, help="import the classes outside of hldm that a folder names"
    ),
]


def with_name(overrides: list[str] | None, name: str | None) -> list[str]:
    """Overrides, and the name that --name gives as one of them."""
    return [*(overrides or []), *([] if name is None else [f"name={name}"])]


RUN_NAME = "folder of a run, small, small-twin or owner/name of a hub"
Run = Annotated[Path, Option(help="folder of the run, e.g. runs/demo")]
RunName = Annotated[str, Option(metavar="RUN", help=RUN_NAME)]
RunOrShipped = Annotated[Path | None, Option(help=f"{RUN_NAME} (default: small)")]
Text = Annotated[Path | None, Option(metavar="FILE", help="use this file instead, as one document")]
Split = Literal["validation", "test"]
Configs = Annotated[
    list[Path], Option("--config", metavar="FILE", help="YAML, or tiny, small, ...; may repeat")
]
Paired = Annotated[
    Path, Option(metavar="FILE", help="config of the model; its twin is NAME-twin.yaml beside it")
]
Overrides = Annotated[list[str] | None, Argument(metavar="a.b=c", help="any setting, e.g. data.lanes=64")]
PairOverrides = Annotated[
    list[str] | None,
    Argument(metavar="a.b=c", help="any setting, for model and twin; chunking.* for the model only"),
]
StudyName = Annotated[
    str | None, Option("--name", help="name of the folder below runs/ (default: the config file's)")
]
Minutes = Annotated[float, Option(callback=check_minutes, help="minutes of training, each")]
Clock = Annotated[Literal["wall", "cpu"], Option(help="what minutes count; cpu on a busy machine")]
MaxCharacters = Annotated[
    int, Option("--max-characters", "--max-chars", min=1, help="characters of each continuation")
]
Seed = Annotated[int, Option(callback=_check_seed, help="same seed, same noise")]
Temperature = Annotated[float | None, Option(help="scale of the latents' noise")]
DecoderTemperature = Annotated[float | None, Option(help="temperature of the bytes; 0 takes the likeliest")]
AsJson = Annotated[bool, Option("--json", help="one JSON object instead")]
Measured = Annotated[
    Path | None, Option("--measured", metavar="FILE", help="file for all numbers of a measurement, as JSON")
]
Report = Annotated[Path | None, Option("--json", metavar="FILE", help="file for all numbers")]
