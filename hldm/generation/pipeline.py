"""The model as one folder that three lines of Python load: a diffusers pipeline.

pipe = HLDMPipeline.from_pretrained("runs/demo/pipeline")
print(pipe("And the king said", max_characters=200).texts[0])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import attach_segmenter, read_segmenter
from hldm.config import GenerationConfig, changed, section_from_dict, to_dict
from hldm.generation.footprint import require_room_to_write
from hldm.generation.own_prior import read_prior, saved_class
from hldm.generation.writer import Continuation, write_on
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import make_scheduler, scheduler_name
from hldm.model.prior import Prior
from hldm.runs.files import fingerprint
from hldm.runs.saved_model import SAVED_BY_DIFFUSERS, SavedModel, read_json, require_consent_of
from hldm.sources.notes import first_line
from hldm.text.bytes import stream_decoder, to_bytes


@dataclass
class HLDMPipelineOutput(BaseOutput):
    """What was written, one entry a prompt and sample."""

    texts: list[str]  # continuations, without their prompts
    sequences: list[bytes]  # the same, as bytes
    chunk_spans: list[list[tuple[int, int]]]  # byte span of every chunk in its sequence
    calls: int  # denoiser evaluations, each for the whole batch


class HLDMPipeline(DiffusionPipeline):
    """Prompt in, text out. `prior` and `scheduler` are None in the twin."""

    _optional_components = ["prior", "scheduler"]
    autoencoder: Autoencoder
    prior: Prior | None

    def __init__(
        self,
        autoencoder: Autoencoder,
        prior: Prior | None = None,
        scheduler: Any = None,
        defaults: dict[str, Any] | None = None,
    ):
        """defaults: generation settings, used where a call names none."""
        super().__init__()
        self.segmenter: Segmenter | None = None  # what cuts prompts, if that takes one: see `with_segmenter`
        if prior is not None and prior.config["autoencoder"] != fingerprint(autoencoder.state_dict()):
            raise ValueError(
                "this prior was trained on another autoencoder's latents: "
                "train it again with train_diffusion.py, or load the autoencoder it belongs to"
            )
        self.register_modules(autoencoder=autoencoder, prior=prior, scheduler=scheduler)
        self.register_to_config(defaults=defaults or {})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, allow_code: bool = False) -> HLDMPipeline:
        """Load what `save_pretrained` wrote; see `read_pipeline`."""
        return read_pipeline(folder, allow_code=allow_code)

    @classmethod
    def assemble(
        cls, autoencoder: Autoencoder, prior: Prior | None, defaults: GenerationConfig
    ) -> HLDMPipeline:
        """Put a trained model together, with the sampler that its config names."""
        scheduler = None
        if prior is not None:
            scheduler = make_scheduler(defaults.scheduler, prior.schedule, max(1, defaults.steps))
        return cls(
            autoencoder.eval(),
            prior.eval() if prior is not None else None,
            scheduler,
            defaults=to_dict(defaults),
        )

    def with_segmenter(self, segmenter: Segmenter | None) -> HLDMPipeline:
        """This pipeline, its prompts cut by a segmenter, which is saved along with it."""
        attach_segmenter(self.autoencoder, segmenter)
        self.segmenter = segmenter
        return self

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the folder that `read_pipeline` reads."""
        super().save_pretrained(folder, **options)
        if self.segmenter is not None:
            segmenter: SavedModel = self.segmenter
            segmenter.save_pretrained(str(Path(folder) / "segmenter"))

    @property
    def settings(self) -> GenerationConfig:
        """The generation settings of this pipeline; a scheduler put in by the user is honoured."""
        settings = GenerationConfig(**dict(self.config["defaults"]))
        if self.scheduler is not None:
            order = self.scheduler.config.get("solver_order")
            settings = changed(settings, scheduler=scheduler_name(type(self.scheduler).__name__, order))
        return settings

    def __call__(
        self,
        prompt: str | bytes | Sequence[str | bytes] = "",
        max_characters: int = 400,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        decoder_temperature: float | None = None,
        top_p: float | None = None,
        num_return_sequences: int = 1,
        seed: int = 0,
        generator: torch.Generator | None = None,
        streamer: Callable[[int, str], None] | None = None,
        return_dict: bool = True,
    ) -> HLDMPipelineOutput | tuple[list[str]]:
        """Continue each prompt.

        streamer: called with (row, text) as text is made; only whole UTF-8 characters are passed on.
        Row i draws from seed + i, so a batch writes what its prompts write one by one; generator: draws
        the seed instead, as diffusers' users expect.
        """
        prompts = [prompt] if isinstance(prompt, str | bytes) else list(prompt)
        texts_so_far = [to_bytes(p) if isinstance(p, str) else p for p in prompts]
        require_room_to_write(
            self.autoencoder, self.prior, texts_so_far, num_return_sequences, max_characters
        )
        rows = [text for text in texts_so_far for _ in range(num_return_sequences)]
        given = dict(steps=num_inference_steps, guidance=guidance_scale, temperature=temperature)
        given |= dict(decoder_temperature=decoder_temperature, top_p=top_p)
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator))
        settings = changed(self.settings, **{k: v for k, v in given.items() if v is not None})
        decoders = [stream_decoder() for _ in rows]
        written: list[Continuation] = []
        calls = 0
        for written, news, calls in write_on(  # noqa: B007 - the last yield is the finished text
            self.autoencoder, self.prior, rows, settings, max_characters=max_characters, seed=seed
        ):
            for row, (decoder, new) in enumerate(zip(decoders, news, strict=True)):
                text = decoder.decode(new)
                if streamer is not None and text:
                    streamer(row, text)
        if streamer is not None:
            for row, decoder in enumerate(decoders):
                if rest := decoder.decode(b"", final=True):
                    streamer(row, rest)
        texts = [row.text.decode("utf-8", errors="replace") for row in written]
        if not return_dict:
            return (texts,)
        sequences, spans = [row.text for row in written], [row.chunk_spans for row in written]
        return HLDMPipelineOutput(texts, sequences, spans, calls)


def read_pipeline(folder: str | Path, *, allow_code: bool = False) -> HLDMPipeline:
    """Load a saved pipeline, from disk only; the same as HLDMPipeline.from_pretrained.

    allow_code: import the classes of someone's own that it names, if any (hldm.plugins)

    diffusers would import whatever classes the folder names; here they must be our own, each part is checked
    before it is used (hldm.runs.saved_model), and the sampler is made anew from its name.
    Raises FileNotFoundError with the command that makes a pipeline, ValueError for a damaged one.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} holds no trained model: run train_autoencoder.py, then train_diffusion.py, with its config"
        )
    require_consent_of(folder, allow_code)
    try:
        found = read_json(index)
        scheduler = _check_index(found, saved_class(folder / "prior"))
        defaults = found.get("defaults")
        if not isinstance(defaults, dict):
            raise ValueError(f"model_index.json: defaults must be an object, got {defaults!r:.80}")
        settings = section_from_dict(GenerationConfig, defaults)
        if scheduler is not None:
            saved = read_json(folder / "scheduler" / "scheduler_config.json")
            settings = changed(settings, scheduler=scheduler_name(scheduler, saved.get("solver_order")))
        autoencoder = Autoencoder.from_pretrained(folder / "autoencoder")
        prior = None if scheduler is None else read_prior(folder / "prior")
        segmenter = read_segmenter(folder / "segmenter", autoencoder.chunking)
        return HLDMPipeline.assemble(autoencoder, prior, settings).with_segmenter(segmenter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder} cannot be loaded ({first_line(error)}): train the run again or restore it"
        ) from error


# The module and class of each part as diffusers saves them; where the same classes once lived.
PARTS: dict[str, tuple[list[str] | None, ...]] = {
    "autoencoder": (["hldm.model.autoencoder", "Autoencoder"], ["hldm.autoencoder", "Autoencoder"]),
    "prior": (["hldm.model.prior", "Prior"], ["hldm.prior", "Prior"]),
    # none any more: text is its bytes. Earlier pipelines name one, which is not read.
    "tokenizer": (None, ["hldm.generation.pipeline", "ByteTokenizer"], ["hldm.pipeline", "ByteTokenizer"]),
}


def _check_index(index: dict[str, Any], own_prior: list[str] | None) -> str | None:
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
