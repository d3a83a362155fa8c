"""The index of a saved pipeline, model_index.json: which class each part of it must have."""

from __future__ import annotations

from typing import Any

from hldm.runs.saved_model import SAVED_BY_DIFFUSERS

# The module and class of each part as diffusers saves them; where the same classes once lived.
PARTS: dict[str, tuple[list[str] | None, ...]] = {
    "autoencoder": (["hldm.model.autoencoder", "Autoencoder"], ["hldm.autoencoder", "Autoencoder"]),
    "prior": (["hldm.model.prior", "Prior"], ["hldm.prior", "Prior"]),
    # none any more: text is its bytes. Earlier pipelines name one, which is not read.
    "tokenizer": (None, ["hldm.generation.pipeline", "ByteTokenizer"], ["hldm.pipeline", "ByteTokenizer"]),
}


def check_index(index: dict[str, Any], own_prior: list[str] | None) -> str | None:
    """The class of the pipeline's scheduler, None for a twin. Raises ValueError for any other pipeline.

    own_prior: module and class of the user's own prior that the folder names, if any
    """
    pair = index.get("scheduler")
    scheduler = pair[1] if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) else None
    expected: dict[str, Any] = {**PARTS, "scheduler": (["diffusers", scheduler],)}
    if own_prior is not None:
        expected |= {"prior": (own_prior,)}
    if scheduler is None:
        expected |= {"prior": ([None, None],), "scheduler": ([None, None],)}
    expected["_class_name"] = ("HLDMPipeline",)
    for key, values in expected.items():
        if index.get(key) not in values:
            raise ValueError(f"model_index.json: {key} must be {values[0]}, got {index.get(key)!r:.80}")
    if unknown := sorted(index.keys() - expected.keys() - SAVED_BY_DIFFUSERS - {"defaults"}):
        raise ValueError(f"model_index.json: unknown key {unknown[0]!r:.80}")
    return scheduler
