"""The model as one folder that three lines of Python load: a diffusers pipeline.

pipe = HLDMPipeline.from_pretrained("runs/demo/pipeline")
print(pipe("And the king said", max_characters=200).texts[0])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from hldm.chunking.segmenter import Segmenter
from hldm.chunking.strategies import attach_segmenter, read_segmenter
from hldm.config import GenerationConfig, changed, section_from_dict, to_dict
from hldm.generation.candidates import Search, write_best
from hldm.generation.editing import Editing
from hldm.generation.encode import Kind, encode_texts
from hldm.generation.footprint import require_room_to_write
from hldm.generation.model_index import check_index
from hldm.generation.own_prior import read_prior, saved_class
from hldm.generation.ranking import Ranker
from hldm.generation.score import Score, Texts, score_texts
from hldm.generation.seeds import row_seeds
from hldm.generation.streams import stop_at, stop_bytes, stream_to
from hldm.generation.writer import Continuation
from hldm.model.autoencoder import Autoencoder
from hldm.model.diffusion import make_scheduler, scheduler_name
from hldm.model.prior import Prior
from hldm.runs.card import CARD, model_card
from hldm.runs.files import fingerprint
from hldm.runs.hub import upload
from hldm.runs.location import INDEX, find_model, pipeline_of
from hldm.runs.saved_model import (
    SavedModel,
    check_save,
    default_float32,
    read_json,
    require_consent_of,
    require_float32,
)
from hldm.sources.notes import first_line
from hldm.text.bytes import to_bytes

# (pipeline, step, denoiser calls so far, {"texts": bytes of each row so far, "news": what this step added})
StepEnd = Callable[["HLDMPipeline", int, int, dict[str, list[bytes]]], object]


@dataclass
class HLDMPipelineOutput(BaseOutput):
    """What was written, one entry a prompt and sample."""

    texts: list[str]  # continuations, without their prompts
    sequences: list[bytes]  # the same, as bytes
    chunk_spans: list[list[tuple[int, int]]]  # byte span of every chunk in its sequence
    calls: int  # denoiser evaluations, each for the whole batch


class HLDMPipeline(Editing, DiffusionPipeline):
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
        segmenter: Segmenter | None = None,
    ):
        """defaults: generation settings, used where a call names none;  segmenter: cuts prompts, if that takes one"""
        super().__init__()
        self.card: str | None = None  # README.md of the folder it was loaded from
        if prior is not None and prior.config["autoencoder"] != fingerprint(autoencoder.state_dict()):
            raise ValueError(
                "this prior was trained on another autoencoder's latents: "
                "train it again with hldm train-diffusion, or load the autoencoder it belongs to"
            )
        self.register_modules(autoencoder=autoencoder, prior=prior, scheduler=scheduler)
        self.register_to_config(defaults=defaults or {})
        self.with_segmenter(segmenter)

    # ---- from and to a folder or a hub

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        torch_dtype: Any = None,
        dtype: Any = None,
        device_map: str | None = None,
        variant: str | None = None,
        use_safetensors: bool = True,
        allow_code: bool = False,
    ) -> HLDMPipeline:
        """Load a model by name: a folder (pipeline, run, export), one that comes with hldm, or `owner/name` of a hub.

        revision, token, cache_dir, local_files_only: of the hub, see `hldm.runs.hub.download`
        allow_code: import the classes of someone's own that it names, if any (hldm.plugins)
        torch_dtype, dtype: float32, which is what models are computed in;  device_map: cpu, cuda, or auto
        Raises FileNotFoundError or ValueError, one line; see `read_pipeline`.
        """
        require_float32(torch_dtype if dtype is None else dtype)
        if variant is not None or not use_safetensors:
            raise ValueError(
                "weights have one form, safetensors in float32: leave out variant and use_safetensors=False"
            )
        device = _device_of(device_map)
        at_hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        found = find_model(name, **at_hub, local_files_only=local_files_only)
        pipeline = read_pipeline(pipeline_of(found), allow_code=allow_code)
        if (found / CARD).is_file():
            pipeline.card = (found / CARD).read_text(encoding="utf-8", errors="replace")
        return pipeline if device is None else pipeline.to(device)

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

    @property
    def components(self) -> dict[str, Any]:
        """What `HLDMPipeline(**pipe.components)` makes the same pipeline of, settings included."""
        return {**super().components, "defaults": dict(self.config["defaults"]), "segmenter": self.segmenter}

    def to(self, *where: Any, **named: Any) -> HLDMPipeline:
        """Move to a device. Raises ValueError for another dtype than float32."""
        for value in (*where, *named.values()):
            if isinstance(value, torch.dtype):
                require_float32(value)
        return super().to(*where, **named)

    def save_pretrained(
        self,
        folder: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write the folder that `from_pretrained` reads, with the card it was loaded with.

        push_to_hub: publish it, too, as `repo_id` (the folder's name by default); hub: see `push_to_hub`
        Raises ValueError, before anything is written, for what could not be loaded again.
        """
        if hub and not push_to_hub:
            raise TypeError(f"save_pretrained takes {', '.join(hub)} only with push_to_hub=True")
        parts = [part for part in (self.autoencoder, self.prior, self.segmenter) if part is not None]
        check_save(parts, safe_serialization, variant, max_shard_size)
        _ = self.settings  # refuses a scheduler that hldm does not have
        super().save_pretrained(str(folder))
        if self.segmenter is not None:
            segmenter: SavedModel = self.segmenter
            segmenter.save_pretrained(str(Path(folder) / "segmenter"))
        if self.card is not None:
            (Path(folder) / CARD).write_text(self.card, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).resolve().name, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload an hldm model",
        create_pr: bool = False,
    ) -> str:
        """Publish as `owner/name` on the hub, with a card; returns the address of the commit.

        The card is that of the folder it was loaded from (`hldm export` writes one with scores), else a short one.
        Raises ValueError, one line.
        """
        given: dict[str, Any] = {"token": token, "private": private, "revision": revision}
        given |= {"commit_message": commit_message, "create_pr": create_pr}
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if self.card is None:
                card = model_card(repo_id, self.parameter_count, is_twin=self.prior is None)
                (Path(folder) / CARD).write_text(card, encoding="utf-8")
            return upload(Path(folder), repo_id, **given)

    @property
    def parameter_count(self) -> int:
        """How many numbers were trained."""
        parts = [part for part in (self.autoencoder, self.prior) if part is not None]
        return sum(p.numel() for part in parts for p in part.parameters())

    @property
    def settings(self) -> GenerationConfig:
        """The generation settings of this pipeline; a scheduler put in by the user is honoured."""
        settings = GenerationConfig(**dict(self.config["defaults"]))
        if self.scheduler is not None:
            order = self.scheduler.config.get("solver_order")
            settings = changed(settings, scheduler=scheduler_name(type(self.scheduler).__name__, order))
        return settings

    # ---- writing

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
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        candidates: int = 1,
        rank: str | Ranker = "mbr",
        keep: int = 1,
        depth: int = 16,
        stop: str | bytes | Sequence[str | bytes] | None = None,
        streamer: Any = None,
        callback_on_step_end: StepEnd | None = None,
        output_type: Literal["text", "bytes"] = "text",
        return_dict: bool = True,
    ) -> HLDMPipelineOutput | tuple[list[str]] | tuple[list[bytes]]:
        """Continue each prompt.

        Row i draws from seed + i, so a batch writes what its prompts write one by one; generator: draws
        the seed instead, as diffusers' users expect, and each of a list that of its row.
        candidates, rank, keep, depth: write the best of several, see `hldm.generation.candidates.Search`
        stop: a text ends before the first of these strings
        streamer: called with (row, text) as text is made, whole UTF-8 characters only; or one of transformers'
        callback_on_step_end: called as (pipeline, step, calls, {"texts", "news"}) after every step, which is a chunk of
        every row; calls: of the denoiser so far. `pipeline._interrupt = True` ends the writing there.
        output_type: what return_dict=False returns; with it texts and bytes are both there
        """
        if output_type not in ("text", "bytes"):
            raise ValueError(f"output_type must be text or bytes, got {output_type!r}")
        models = [self.autoencoder] if self.prior is None else [self.autoencoder, self.prior]
        for parameter in (parameter for part in models for parameter in part.parameters()):
            require_float32(parameter.dtype)
        prompts = [prompt] if isinstance(prompt, str | bytes) else list(prompt)
        texts_so_far = [to_bytes(p) if isinstance(p, str) else p for p in prompts]
        search = Search(candidates=candidates, rank=rank, keep=keep, depth=depth)
        many = num_return_sequences * search.stubs
        require_room_to_write(self.autoencoder, self.prior, texts_so_far, many, max_characters)
        rows = [text for text in texts_so_far for _ in range(num_return_sequences)]
        given = dict(steps=num_inference_steps, guidance=guidance_scale, temperature=temperature)
        given |= dict(decoder_temperature=decoder_temperature, top_p=top_p)
        settings = changed(self.settings, **{k: v for k, v in given.items() if v is not None})
        seeds, stops = row_seeds(seed, generator, len(rows)), stop_bytes(stop)
        stream = stream_to(streamer, rows)
        written: list[Continuation] = []
        handed_on, calls = [0] * len(rows), 0
        self._interrupt = False
        try:
            with default_float32():
                parts = self.autoencoder, self.prior, rows, settings, search
                writing = write_best(*parts, max_characters=max_characters, seed=seeds)
                for step, (written, news, calls) in enumerate(stop_at(writing, stops)):
                    for row, new in enumerate(news):
                        handed_on[row] += len(new)
                        stream.add(row, new)
                    if callback_on_step_end is not None:
                        texts_now = {"texts": [each.text for each in written], "news": news}
                        callback_on_step_end(self, step, calls, texts_now)
                    if self._interrupt:
                        break
            for row, so_far in enumerate(written if self._interrupt else []):
                stream.add(row, so_far.text[handed_on[row] :])  # what might have become a stop string
        finally:
            stream.end()
        sequences, spans = [row.text for row in written], [row.chunk_spans for row in written]
        texts = [text.decode("utf-8", errors="replace") for text in sequences]
        if not return_dict:
            return (texts,) if output_type == "text" else (sequences,)
        return HLDMPipelineOutput(texts, sequences, spans, calls)

    def score(
        self,
        texts: Texts,
        prefix: Texts | None = None,
        *,
        draws: int = 8,
        samples: int = 0,
        seed: int = 0,
        ends_document: bool | None = None,
    ) -> list[Score]:
        """What each text costs in bits, after a prefix or as a document; see `hldm.generation.score.score_texts`."""
        return score_texts(
            self.autoencoder,
            self.prior,
            texts,
            prefix,
            draws=draws,
            samples=samples,
            seed=seed,
            ends_document=ends_document,
        )

    def encode(
        self,
        texts: Texts,
        *,
        kind: Kind = "latents",
        pooled: bool = True,
        normalize: bool = False,
        batch_size: int = 32,
    ) -> Tensor | list[Tensor]:
        """Vectors of texts (texts width); see `hldm.generation.encode.encode_texts`."""
        return encode_texts(
            self.autoencoder, texts, kind=kind, pooled=pooled, normalize=normalize, batch_size=batch_size
        )


def _device_of(device_map: str | None) -> str | None:
    """The device that diffusers' device_map means here. Raises ValueError for one that is not there, or several."""
    if device_map not in (None, "cpu", "cuda", "auto"):
        raise ValueError(
            f"device_map must be cpu, cuda or auto, got {device_map!r}: a model lies on one device"
        )
    has_gpu = torch.cuda.is_available()
    if device_map == "cuda" and not has_gpu:
        raise ValueError("device_map=cuda: torch finds no GPU here (hldm doctor); take cpu or auto")
    return ("cuda" if has_gpu else "cpu") if device_map == "auto" else device_map


def read_pipeline(folder: str | Path, *, allow_code: bool = False) -> HLDMPipeline:
    """Load a saved pipeline from its folder; HLDMPipeline.from_pretrained finds that by a name.

    allow_code: import the classes of someone's own that it names, if any (hldm.plugins)

    diffusers would import whatever classes the folder names; here they must be our own, each part is checked
    before it is used (hldm.runs.saved_model), and the sampler is made anew from its name.
    Raises FileNotFoundError with the command that makes a pipeline, ValueError for a damaged one.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds no trained model: run hldm train with its --config and --name"
        )
    require_consent_of(folder, allow_code)
    try:
        found = read_json(folder / INDEX)
        scheduler = check_index(found, saved_class(folder / "prior"))
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
