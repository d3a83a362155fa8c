"""What a pipeline does with text that is there: fill, edit, interpolate, steer; methods of `HLDMPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath

from hldm.config import GenerationConfig
from hldm.generation.fill import Candidate, Edited, edit_chunks, fill_between
from hldm.generation.interpolate import Path, Step, interpolate_texts
from hldm.generation.score import Texts, as_list
from hldm.generation.steer import Guide, Method, read_guide, write_steered
from hldm.generation.writer import Continuation
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.runs.saved_model import default_float32
from hldm.text.bytes import to_bytes


class Editing:
    """Methods that need models and settings, and nothing else of a pipeline."""

    autoencoder: Autoencoder
    prior: Prior | None

    @property
    def settings(self) -> GenerationConfig:
        """Of generation."""
        raise NotImplementedError

    def fill(
        self,
        left: str | bytes,
        right: str | bytes,
        *,
        characters: int | None = None,
        chunks: int | None = None,
        candidates: int = 16,
        seed: int = 0,
        settings: GenerationConfig | None = None,
    ) -> list[Candidate]:
        """Texts that may stand between two, the best first; see `hldm.generation.fill.fill_between`."""
        with default_float32():
            return fill_between(
                self.autoencoder,
                self.prior,
                left,
                right,
                settings or self.settings,
                characters=characters,
                chunks=chunks,
                candidates=candidates,
                seed=seed,
            )

    def edit(
        self,
        text: str | bytes,
        redraw: tuple[int, int],
        *,
        hold_latents: bool = False,
        candidates: int = 16,
        seed: int = 0,
        settings: GenerationConfig | None = None,
    ) -> Edited:
        """Some chunks of a text written anew, numbered from 1; see `hldm.generation.fill.edit_chunks`."""
        with default_float32():
            return edit_chunks(
                self.autoencoder,
                self.prior,
                text,
                redraw,
                settings or self.settings,
                hold_latents=hold_latents,
                candidates=candidates,
                seed=seed,
            )

    def interpolate(
        self, first: str | bytes, second: str | bytes, *, steps: int = 7, path: Path = "linear"
    ) -> list[Step]:
        """From one text to another by their latents; see `hldm.generation.interpolate.interpolate_texts`."""
        parts = self.autoencoder, self.prior, first, second, self.settings
        with default_float32():
            return interpolate_texts(*parts, steps=steps, path=path)

    def steer(
        self,
        prompts: Texts,
        guide: str | FilePath | Guide,
        value: str,
        *,
        strength: float = 1.0,
        method: Method = "mixture",
        particles: int = 16,
        max_characters: int = 400,
        seed: int = 0,
        settings: GenerationConfig | None = None,
    ) -> list[Continuation]:
        """Each prompt continued toward a value of an attribute; see `hldm.generation.steer.write_steered`.

        guide: a file of `hldm steer fit`, or what `read_guide` makes of one
        """
        if not isinstance(guide, Guide):
            guide = read_guide(FilePath(guide), self.autoencoder, self.prior)
        given: Sequence[str | bytes] = as_list(prompts, "prompts")
        with default_float32():
            return write_steered(
                self.autoencoder,
                self.prior,
                [to_bytes(text) if isinstance(text, str) else text for text in given],
                settings or self.settings,
                guide,
                value,
                strength=strength,
                method=method,
                particles=particles,
                max_characters=max_characters,
                seed=seed,
            )
