"""What a page may ask for: JSON, checked field by field. A mistake is a ValueError of one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hldm.config import GenerationConfig, changed
from hldm.text.bytes import to_bytes

MAX_REQUEST_BYTES = 256 * 1024
MAX_TEXT_BYTES = 32 * 1024  # prompt and chunks: read again at every call
MAX_CHUNKS = 400  # written by one call
MAX_CANDIDATES = 12
MAX_STEPS = 500  # of denoising: seconds a chunk beyond it
SETTINGS = ("steps", "temperature", "decoder_temperature", "top_p", "guidance")
FIELDS = {"prompt", "chunks", "seed", "draw", "count", "latent", "hold", "settings"}


class Asked(NamedTuple):
    """One call."""

    prompt: bytes
    chunks: list[bytes]  # written so far
    seed: int
    draw: int  # of the first chunk written; later ones are first draws
    wanted: int  # chunks to write, or candidates
    latent: list[float] | None  # z_0 of the first chunk written
    hold: bool  # of every chunk written
    settings: GenerationConfig


def read_call(data: bytes, defaults: GenerationConfig, latent_dim: int, most: int = MAX_CHUNKS) -> Asked:
    """A call from its JSON. Raises ValueError that names the field, what it got and what it expects.

    defaults: settings where the call names none;  latent_dim: of the model;  most: chunks that may be asked for
    """
    try:
        found = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {' '.join(str(error).split()):.100}") from None
    if not isinstance(found, dict):
        raise ValueError("the request must be a JSON object")
    if unknown := sorted(found.keys() - FIELDS):
        raise ValueError(f"unknown field {unknown[0]!r:.60}: expected some of {', '.join(sorted(FIELDS))}")
    prompt = found.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be text, got {prompt!r:.60}")
    text, chunks = to_bytes(prompt), _chunks(found.get("chunks", []))
    if (size := len(text) + sum(map(len, chunks))) > MAX_TEXT_BYTES:
        raise ValueError(
            f"prompt and chunks hold {size:,} bytes, {MAX_TEXT_BYTES:,} at most: take a shorter text"
        )
    hold = found.get("hold", False)
    if not isinstance(hold, bool):
        raise ValueError(f"hold must be true or false, got {hold!r:.60}")
    return Asked(
        text,
        chunks,
        _integer(found, "seed", 0, 2**31 - 1, 0),
        _integer(found, "draw", 0, 10**6, 0),
        _integer(found, "count", 1, most, 1),
        _latent(found.get("latent"), latent_dim),
        hold,
        _settings(found.get("settings", {}), defaults),
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _integer(found: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = found.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number in {low}..{high}, got {value!r:.60}")
    return value


def _chunks(value: Any) -> list[bytes]:
    """Chunks from hexadecimal text: bytes of any kind, which JSON cannot hold."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("chunks must be a list of hexadecimal texts")
    try:
        chunks = [bytes.fromhex(one) for one in value]
    except ValueError:
        raise ValueError("chunks must be a list of hexadecimal texts") from None
    if not all(chunks):
        raise ValueError("no chunk may be empty")
    return chunks


def _latent(value: Any, latent_dim: int) -> list[float] | None:
    if value is None:
        return None
    if not latent_dim:
        raise ValueError("latent must be null: this model is a twin and has none")
    is_list = isinstance(value, list) and len(value) == latent_dim
    if not is_list or not all(type(x) in (int, float) and math.isfinite(x) and abs(x) < 1e3 for x in value):
        raise ValueError(f"latent must be {latent_dim} numbers below 1000, got {value!r:.60}")
    return [float(x) for x in value]


def _settings(value: Any, defaults: GenerationConfig) -> GenerationConfig:
    if not isinstance(value, dict):
        raise ValueError(f"settings must be an object, got {value!r:.60}")
    if unknown := sorted(value.keys() - set(SETTINGS)):
        raise ValueError(f"unknown setting {unknown[0]!r:.60}: expected some of {', '.join(SETTINGS)}")
    for name, number in value.items():
        if type(number) not in (int, float):
            raise ValueError(f"{name} must be a number, got {number!r:.60}")
    settings = changed(defaults, **value)
    if settings.steps > MAX_STEPS:
        raise ValueError(f"steps must be at most {MAX_STEPS} here, got {settings.steps}")
    return settings
