"""The table of faster forms that `hldm.model.speed` looks up: a plain function or class, and what does the same faster.

A form of a function takes the arguments of the plain one and may return NotImplemented: then the plain one runs. What
gains less than 2 % of a training step or of writing has no form (measured, configs/small.yaml, one core). A form whose
plain code has been edited since it was written after it is not used: the edit would have no effect, without a word.
`python -m hldm.kernels.forms` records, in plain.json, that the two have been compared.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import torch

from hldm.generation import writer as generation
from hldm.kernels import derivatives, library, muon, scan, writer
from hldm.model import ops

FORMS: dict[Any, Any] = {
    ops.scan: scan.scan,
    ops.rg_lru: derivatives.rg_lru,
    ops.causal_conv: derivatives.causal_conv,
    ops.rms_norm: derivatives.rms_norm,
    ops.add_rms_norm: derivatives.add_rms_norm,
    ops.gelu_gate: derivatives.gelu_gate,
    generation.make_writer: writer.make_writer,
    torch.optim.Muon: muon.Muon,
}

# Files whose formulas the writers' C++ holds, too.
MIRRORED = [
    *(f"generation/{name}.py" for name in ("chunk", "writer")),
    *(f"model/{name}.py" for name in ("autoencoder", "contextualiser", "denoiser", "diffusion", "griffin")),
    *(f"model/{name}.py" for name in ("hierarchy", "likelihood", "mixture", "prior", "readouts")),
]
RECORD = Path(__file__).with_name("plain.json")


def code() -> dict[str, str]:
    """sha256 of the plain code that the forms were written after, by function or file."""
    functions = [plain for plain in FORMS if plain.__module__ == ops.__name__]
    texts = {function.__name__: inspect.getsource(function) for function in functions}
    texts |= {name: (RECORD.parents[1] / name).read_text(encoding="utf-8") for name in MIRRORED}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def current() -> dict[Any, Any]:
    """The forms whose plain code is as recorded; a line says which is not."""
    recorded = json.loads(RECORD.read_bytes())
    edited = [name for name, found in code().items() if recorded.get(name) != found]
    if not edited:
        return FORMS
    logging.getLogger(__name__).warning(
        f"{', '.join(edited)}: edited since its faster form was written, so plain torch computes; once both agree, "
        "record it by python -m hldm.kernels.forms"
    )
    left_out = {plain for plain in FORMS if plain.__name__ in edited} | {generation.make_writer}
    return {plain: form for plain, form in FORMS.items() if plain not in left_out}


def why_none() -> str:
    """Why there are no C++ kernels, in words; "" where there are."""
    found = library.kernels()
    return "" if found.library else found.told


if __name__ == "__main__":
    RECORD.write_text(json.dumps(code(), indent=1) + "\n", encoding="utf-8")
