"""What a run writes on from one prompt at several temperatures, its chunks apart."""

from __future__ import annotations

from typing import Any

from hldm.app.page import shown
from hldm.config import GenerationConfig, changed
from hldm.generation.pipeline import HLDMPipeline
from hldm.generation.writer import write_on

CHARACTERS = 220
LATENT_TEMPERATURES = (0.6, 1.0)  # of the latent's noise: tame, and as trained
BYTE_TEMPERATURES = (0.0, 0.7, 1.0)  # of the decoder: the likeliest, the default, as trained


def samples_by_temperature(pipeline: HLDMPipeline, prompt: bytes, *, seed: int = 0) -> list[dict[str, Any]]:
    """A continuation for every pair of temperatures; the twin, without latents, has one of them.

    The run's own steps, sampler and nucleus, the same seed for all.
    """
    is_twin = pipeline.prior is None
    found = []
    for temperature in (1.0,) if is_twin else LATENT_TEMPERATURES:
        for decoder_temperature in BYTE_TEMPERATURES:
            settings = changed(
                pipeline.settings, temperature=temperature, decoder_temperature=decoder_temperature
            )
            found.append(
                {
                    "temperature": None if is_twin else temperature,
                    "decoder_temperature": decoder_temperature,
                    **_written(pipeline, prompt, settings, seed),
                }
            )
    return found


def _written(pipeline: HLDMPipeline, prompt: bytes, settings: GenerationConfig, seed: int) -> dict[str, Any]:
    """Chunks of one continuation, and whether the model ended the document."""
    models = pipeline.autoencoder, pipeline.prior
    *_, (rows, _, _) = write_on(*models, [prompt], settings, max_characters=CHARACTERS, seed=seed)
    return {"chunks": [shown(chunk) for chunk in rows[0].chunks], "ended": rows[0].ended}
