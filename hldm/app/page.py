"""Pages that stand on their own: templates filled with escaped text, numbers as JSON inside the page.

Nothing is loaded from a network, and no text of a corpus or of a model can become markup or script.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hldm.text.bytes import printable

HERE = Path(__file__).parent
SPACES = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


@lru_cache(maxsize=1)
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # noqa: S701 - on for every template, whatever its name ends in
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # JSON in a page must be what JSON.parse reads: NaN is an error here, not in a browser
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    found.globals["part"] = part
    found.filters["number"] = number
    return found


def fill(template: str, **values: Any) -> str:
    """A template of this folder with these values, each escaped."""
    return _environment().get_template(template).render(**values)


def part(name: str) -> Markup:
    """A style sheet or script of this folder, to stand in a page as it is: our own file, no user's text."""
    return Markup((HERE / name).read_text(encoding="utf-8"))  # noqa: S704


def shown(text: bytes) -> str:
    """Bytes of a chunk as a reader may see them: no control characters, U+FFFD for half a character."""
    return printable(text.decode("utf-8", "replace"))


def marked(text: bytes) -> str:
    """The same for a label, with white space made visible."""
    return shown(text).translate(SPACES)


def number(value: float | None, form: str = ".3f") -> str:
    """A formatted number; a dash where there is none, or none that is finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def finite(value: Any) -> Any:
    """Nested values as JSON can hold them: None for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
