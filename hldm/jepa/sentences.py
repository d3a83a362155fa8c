"""The objective where one vector stands for a sentence: predicted from a view of it, or from the sentences before it.

    c = f(T x)             the chunks' vectors of what is read
    t = norm(mean f'(x))   the target: the mean of the clean sentence's chunks, of the target encoder
    p = P([c; hole])       the predictor reads on to a hole at the end, which is the prediction

With `task=sentences` T x are the k sentences before (LANG-JEPA); with `task=views` a changed copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hldm.jepa.encoder import mean_over
from hldm.jepa.objective import JepaCarry, JepaObjective, JepaStep
from hldm.jepa.text_pairs import PairBatch
from hldm.jepa.transformer import TextTransformer, folder_of
from hldm.jepa.views import make_view
from hldm.text.windows import Window

LENGTH_CLASS = 16  # bytes: sentences whose lengths share a class are alike from outside


class SentenceObjective(JepaObjective):
    """As the objective of chunks, with sentences for chunks; no state is carried from pair to pair."""

    def initial_carry(self, rows: int, device: torch.device) -> JepaCarry:
        """Nothing: every text is read from a fresh state."""
        return JepaCarry(())

    def forward(  # type: ignore[override]
        self, batch: PairBatch, carry: JepaCarry, generator: torch.Generator, progress: float
    ) -> JepaStep:
        """Loss of a batch of pairs."""
        self.set_progress(progress)
        view = make_view(batch.context, self.config.views, generator, self.letters)
        vectors, mask = self.read(view.window)
        losses: list[Tensor] = []
        nats: dict[str, Tensor] = {}
        if self.predictor is not None:
            predicted, target = (
                self.predict_sentence(vectors, mask),
                self.sentence_target(batch.target),
            )
            if self.training:
                self.predictor.scale.observe(target)
            distance = self.distance(predicted, self.normalised(target))
            losses.append(self.settings.latent_weight * distance.sum() / batch.context.total_rows)
        if self.terms.own:
            visible = batch.context.is_chunk & ~view.hidden
            self.add_nats("own", self.byte_nats(batch.context, vectors, visible), batch.context, losses, nats)
        pooled = mean_over(vectors, mask)[:, None]  # (b 1 z)
        losses.append(self.regulariser(pooled, torch.ones_like(pooled[..., 0], dtype=torch.bool), generator))
        return JepaStep(torch.stack(losses).sum(), nats, batch.context.characters, carry)

    def make_encoder(self) -> Any:
        """The encoder of the settings before any training here."""
        folder = folder_of(self.config)
        return super().make_encoder() if folder is None else TextTransformer.from_pretrained(folder)

    def read(self, window: Window, encoder: Any = None) -> tuple[Tensor, Tensor]:
        """Vectors (b n z) of a window's chunks, or of a transformer's tokens, and which there are (b n).

        encoder: the target encoder; the context's when None
        """
        encoder = self.encoder if encoder is None else encoder
        if isinstance(encoder, TextTransformer):
            return encoder(window)
        return encoder(window, self.fresh_state(window)).vectors, window.is_chunk

    def predict_sentence(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """p (b z) at a hole after the last of each row's vectors (b n z), which are those of the mask (b n)."""
        assert self.predictor is not None
        count = mask.sum(dim=1)
        # those that are there come first
        place = torch.arange(mask.shape[1] + 1, device=vectors.device)
        hole, first = place == count[:, None], (place == 0).expand(len(vectors), -1)
        at_all = self.predictor(F.pad(vectors, (0, 0, 0, 1)), hole, first, count + 1)
        return at_all[hole]

    def sentence_target(self, window: Window) -> Tensor:
        """t (b z), not yet normalised."""
        with torch.set_grad_enabled(self.settings.target == "gradient" and torch.is_grad_enabled()):
            return mean_over(*self.read(window, self.target))

    def own_vectors(self, batch: PairBatch) -> Tensor:
        """The encoder's vectors (b z) of the sentences as they are."""
        return mean_over(*self.read(batch.target))

    def predictions(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Of held-out sentences: predicted vectors (b z), normalised targets (b z), classes of length (b)."""
        window = self.held_out_view(batch.context).window
        predicted = self.predict_sentence(*self.read(window))
        target = self.normalised(self.sentence_target(batch.target))
        return predicted, target, batch.target.length // LENGTH_CLASS
