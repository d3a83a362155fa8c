"""One objective for the family, over windows of chunks.

    c = r(f(T x))                 context: the encoder's vectors of the text with holes T x
    t = norm(r(f'(x)))            targets: those of the clean text, of the target encoder f', no gradient
    p = P(c, hidden)              predictions
    L = latent D(p, t) + predicted CE(dec(p), hidden bytes) + own CE(dec(c), visible bytes) + next CE(next byte) + R(c)

`hldm.jepa.config.OPTIONS` says which terms an option has. D is a mean over hidden chunks and CE over bytes, both by
their expected number, so that rows, micro-batches and ranks add up to the whole. Follows the objectives of
hldm.training.objectives; `hldm.training.trainer` knows no more than those.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.jepa.collapse import gathered, sigreg, skill, spread, squared_covariances, variance_hinge
from hldm.jepa.config import JepaConfig, ObjectiveConfig
from hldm.jepa.decoder import ChunkDecoder, chunk_bytes
from hldm.jepa.encoder import Encoded, JepaEncoder, follow, follower_of, momentum_at
from hldm.jepa.predictor import Predictor
from hldm.jepa.views import View, make_view, reset_before
from hldm.model.ops import softmax_nats
from hldm.model.state import GriffinState, map_carry
from hldm.text.windows import Batch, Window

VIEW_SEED = 0  # of the holes in the held-out text, the same at every step


class JepaCarry(NamedTuple):
    """State of every stream between windows."""

    context: GriffinState
    target: GriffinState | None = None  # where targets know the text before


class JepaStep(NamedTuple):
    """One forward pass over (part of) a batch, as the trainer takes it."""

    loss: Tensor  # scalar: a share of the global batch's
    nats: dict[str, Tensor]  # of bytes, scaled so that the part's characters give bits a character
    characters: Tensor
    carry: JepaCarry


def distance(kind: str, predicted: Tensor, target: Tensor) -> Tensor:
    """D of each pair of vectors (k z) -> (k), by the name that objective.distance gives it."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1)
    forms: dict[str, Any] = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "l2": F.mse_loss}
    return forms[kind](predicted, target, reduction="none").mean(dim=-1)


class JepaObjective(nn.Module):
    """Latents only, with a decoder of what is predicted, with a decoder in the encoder, and the two controls."""

    untrained_rank: Tensor
    letters: Tensor
    may_leave_out = True  # a batch may hide nothing, and then nothing is decoded

    def __init__(self, config: JepaConfig, letters: Tensor, bytes_a_chunk: float):
        """letters: (256) counts of bytes in the training text;  bytes_a_chunk: their mean there."""
        super().__init__()
        self.config = config
        self.settings: ObjectiveConfig = config.objective
        self.terms = self.settings.terms
        self.bytes_a_chunk = bytes_a_chunk
        self.encoder = self.make_encoder()
        self.predictor: Predictor | None = None
        if self.settings.has_predictor:
            self.predictor = Predictor.from_settings(config.predictor, config.vector)
        self.decoder: ChunkDecoder | None = None
        if self.terms.predicted or self.terms.own:
            self.decoder = ChunkDecoder.from_settings(config.decoder, config.chunking, config.vector)
        if self.settings.next_byte_weight:
            self.next_byte = nn.Linear(config.encoder.width, 256)
        self.target: nn.Module | None = None
        if self.has_follower:
            self.target = follower_of(self.encoder)
        self.register_buffer("letters", letters)
        self.register_buffer("untrained_rank", torch.zeros((), dtype=torch.float64))
        self.momentum = self.settings.momentum
        self.held_out: Any = None  # a batch

    def make_encoder(self) -> Any:
        """The encoder of the settings before any training."""
        config = self.config
        return JepaEncoder.from_settings(config.encoder, config.chunking, config.vector)

    @property
    def has_follower(self) -> bool:
        """Whether targets come from a moving average of the encoder."""
        return self.terms.latent and self.settings.target == "ema"

    @property
    def target_carries(self) -> bool:
        """Whether targets know the text before the window."""
        return self.terms.latent and not self.settings.reset_targets

    def train(self, mode: bool = True) -> JepaObjective:
        """Training mode, but for the target encoder: it has no dropout."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def initial_carry(self, rows: int, device: torch.device) -> JepaCarry:
        """State before the first window."""
        state = self.encoder.initial_state(rows, device)
        return JepaCarry(state, map_carry(torch.clone, state) if self.target_carries else None)

    def end_step(self, skipped: bool) -> None:
        """Once an optimizer step, before it: the target encoder follows, the targets' statistics are folded in."""
        if self.terms.latent and self.predictor is not None:
            self.predictor.scale.update(skipped)
        if self.target is not None and not skipped:
            follow(self.target, self.encoder, self.momentum)

    # --- parts ---------------------------------------------------------------------------------

    def targets(self, window: Window, wanted: Tensor, state: GriffinState | None) -> Encoded:
        """What the target encoder makes of the clean text, not yet normalised."""
        if self.settings.reset_targets:
            window = reset_before(window, wanted)
        return self.read_target(window, state)

    def read_target(self, window: Window, state: GriffinState | None = None) -> Encoded:
        """The target encoder on a window, from a fresh state when None."""
        encoder = self.encoder if self.target is None else self.target
        if state is None:
            state = self.fresh_state(window)
        with torch.set_grad_enabled(self.settings.target == "gradient" and torch.is_grad_enabled()):
            return encoder(window, state)

    def fresh_state(self, window: Window) -> GriffinState:
        """The encoder's state before any text, for the rows of a window."""
        return self.encoder.initial_state(len(window.bytes), window.bytes.device)

    def normalised(self, targets: Tensor) -> Tensor:
        """Targets (... z) at the scale that they are predicted at."""
        if self.settings.normalise == "layer_norm":
            return F.layer_norm(targets, targets.shape[-1:])
        if self.settings.normalise == "standardise":
            assert self.predictor is not None
            return self.predictor.scale(targets)
        return targets

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """D of each pair (k z) -> (k)."""
        return distance(self.settings.distance, predicted, target)

    def byte_nats(self, window: Window, vectors: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of the chosen chunks' bytes from their vectors (b n z), and how many bytes those are."""
        assert self.decoder is not None
        text, length = chunk_bytes(window, chosen)
        return self.decoder.nats(vectors[chosen], text, length).sum(), length.sum()

    def next_byte_nats(self, window: Window, features: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of every visible byte from the feature before it, and how many bytes those are."""
        target = window.bytes[:, 1:]
        counted = window.is_real[:, 1:] & (target < 256) & ~window.doc_start[:, 1:]
        logits = self.next_byte(features[:, :-1][counted])
        return softmax_nats(logits.float(), target[counted]).sum(), counted.sum()

    def regulariser(self, vectors: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """R of the whole batch's vectors, whichever rank they are on."""
        settings, total = self.settings, vectors.new_zeros(())
        if not settings.compares_chunks:
            return total
        vectors = gathered(vectors.float(), mask)
        if len(vectors) < 2:
            return total
        if settings.variance:
            total = total + settings.variance * variance_hinge(vectors)
        if settings.covariance:
            total = total + settings.covariance * squared_covariances(vectors)
        if settings.sigreg:
            total = total + settings.sigreg * sigreg(vectors, generator)
        return total

    # --- the loss ------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, carry: JepaCarry, generator: torch.Generator, progress: float
    ) -> JepaStep:
        """Loss of one window."""
        settings, share = self.settings, self.predicted_share
        self.set_progress(progress)
        view = make_view(batch, self.config.views, generator, self.letters)
        context = self.encoder(view.window, carry.context)
        losses: list[Tensor] = []
        nats: dict[str, Tensor] = {}
        target_state = carry.target
        if self.predictor is not None:
            predicted = self.predict(view, context.vectors)
            if self.terms.latent:
                encoded = self.targets(batch, view.wanted, carry.target)
                raw, target_state = encoded.vectors[view.wanted], carry.target and encoded.state
                if self.training:
                    self.predictor.scale.observe(raw)
                distance = self.distance(predicted[view.wanted], self.normalised(raw))
                expected_chunks = share * batch.total_bytes / self.bytes_a_chunk
                losses.append(settings.latent_weight * distance.sum() / expected_chunks)
            if self.terms.predicted:
                self.add_nats("predicted", self.byte_nats(batch, predicted, view.wanted), batch, losses, nats)
        visible = batch.is_chunk & ~view.hidden
        if self.terms.own:
            self.add_nats("own", self.byte_nats(batch, context.vectors, visible), batch, losses, nats)
        if settings.next_byte_weight:
            found = self.next_byte_nats(view.window, context.features)
            self.add_nats("next_byte", found, batch, losses, nats)
        losses.append(self.regulariser(context.vectors, visible, generator))
        carried = map_carry(torch.detach, JepaCarry(context.state, target_state))
        return JepaStep(torch.stack(losses).sum(), nats, batch.characters, carried)

    @property
    def predicted_share(self) -> float:
        """Of all chunks, those that are predicted, about."""
        views = self.config.views
        return views.share if views.hides_chunks else 1.0

    def set_progress(self, progress: float) -> None:
        """Where on its schedule the moving average is at the end of this step."""
        self.momentum = momentum_at(self.settings.momentum, progress)

    def add_nats(
        self,
        term: Literal["predicted", "own", "next_byte"],
        found: tuple[Tensor, Tensor],
        batch: Batch,
        losses: list[Tensor],
        nats: dict[str, Tensor],
    ) -> None:
        """Add a term of the loss, nats over the bytes that it is expected to have in the global batch.

        found: its nats, and how many bytes it has here
        """
        settings, hides = self.settings, self.config.views.hides_chunks
        share = {
            "predicted": self.predicted_share,
            "own": 1 - self.predicted_share if hides else 1.0,
            "next_byte": 1.0,
        }[term]
        weight = settings.next_byte_weight if term == "next_byte" else settings.decoder_weight
        losses.append(weight * found[0] / (share * batch.total_bytes))
        # as if it had all of the part's bytes: the trainer divides by their characters
        nats[term] = found[0].detach() * batch.length.sum() / found[1].clamp(min=1)

    def predict(self, view: View, vectors: Tensor) -> Tensor:
        """p (b n z) from the context's vectors (b n z)."""
        assert self.predictor is not None
        window = view.window
        return self.predictor(vectors, view.wanted, window.opens_document, window.count)

    # --- figures on held-out text --------------------------------------------------------------

    @torch.no_grad()
    def watch(self, held_out: Any) -> None:
        """Keep the batch that `signs` looks at, and the rank that the untrained encoder has on it."""
        self.held_out = held_out
        self.untrained_rank.fill_(spread(self.own_vectors(held_out))["rank"])

    @torch.no_grad()
    def signs(self) -> dict[str, float]:
        """How spread vectors, targets and predictions are, and what the predictor is worth, on the held-out text."""
        batch, was_training = self.held_out, self.training
        if batch is None:
            return {}
        self.eval()
        signs = spread(self.own_vectors(batch))
        signs["untrained_rank"] = float(self.untrained_rank)
        if self.predictor is not None:
            predicted, target, length = self.predictions(batch)
            signs |= {f"predicted_{name}": value for name, value in spread(predicted).items()}
            signs |= {f"target_{name}": value for name, value in spread(target).items()}
            if self.terms.latent:
                signs["distance"] = float(self.distance(predicted, target).mean())
                if self.settings.distance == "cosine":  # which leaves the size open
                    predicted, target = F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)
                signs |= skill(predicted, target, length)._asdict()
        self.train(was_training)
        return signs

    def own_vectors(self, window: Any) -> Tensor:
        """The encoder's vectors (k z) of the chunks of a window without holes, from a fresh state."""
        return self.encoder(window, self.fresh_state(window)).vectors[window.is_chunk]

    def predictions(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of held-out chunks: predicted vectors (k z), normalised targets (k z), and lengths (k) in bytes."""
        view = self.held_out_view(batch)
        predicted = self.predict(view, self.encoder(view.window, self.fresh_state(batch)).vectors)
        # a masked language model has no targets: its own vectors stand in, for figures alone
        target = self.normalised(self.targets(batch, view.wanted, None).vectors[view.wanted])
        return predicted[view.wanted], target, chunk_bytes(batch, view.wanted)[1]

    def parts(self) -> dict[str, Any]:
        """The models to save, by the folder of each."""
        parts: dict[str, Any] = {"model": self.encoder}
        if self.predictor is not None:
            parts["predictor"] = self.predictor
        if self.decoder is not None:
            parts["decoder"] = self.decoder
        if self.target is not None:
            average = self.make_encoder()
            average.load_state_dict(self.target.state_dict())
            parts["target"] = average
        return parts

    def held_out_view(self, batch: Batch) -> View:
        """The same holes at every call."""
        return make_view(batch, self.config.views, torch.Generator().manual_seed(VIEW_SEED), self.letters)


class DecoderObjective(nn.Module):
    """A decoder afterwards, on a frozen encoder: from its vectors of the clean text and from what is predicted."""

    may_leave_out = False

    def __init__(self, jepa: JepaObjective, decoder: ChunkDecoder):
        super().__init__()
        self.jepa, self.decoder = jepa.requires_grad_(False).eval(), decoder

    def train(self, mode: bool = True) -> DecoderObjective:
        """Training mode for the decoder; the encoder stays as it will be used."""
        super().train(mode)
        self.jepa.eval()
        return self

    def initial_carry(self, rows: int, device: torch.device) -> JepaCarry:
        """State before the first window: of the encoder on the clean text, and on the text with holes."""
        state = self.jepa.encoder.initial_state(rows, device)
        return JepaCarry(state, map_carry(torch.clone, state))

    def end_step(self, skipped: bool) -> None:
        """Nothing is kept between steps."""

    def signs(self) -> dict[str, float]:
        """None: the encoder is frozen."""
        return {}

    def forward(
        self, batch: Batch, carry: JepaCarry, generator: torch.Generator, progress: float
    ) -> JepaStep:
        """Nats of every chunk from its own vector, and of hidden ones from the predicted vector."""
        jepa = self.jepa
        assert carry.target is not None
        with torch.no_grad():
            own = jepa.encoder(batch, carry.context)
            view = make_view(batch, jepa.config.views, generator, jepa.letters)
            holed = jepa.encoder(view.window, carry.target)
        text, length = chunk_bytes(batch, batch.is_chunk)
        total = self.decoder.nats(own.vectors[batch.is_chunk], text, length).sum()
        nats = {"own": total.detach()}
        if jepa.predictor is not None:
            with torch.no_grad():
                predicted = jepa.predict(view, holed.vectors)[view.wanted]
                predicted = jepa.predictor.at_encoder_scale(predicted)
            text, length = chunk_bytes(batch, view.wanted)
            found = self.decoder.nats(predicted, text, length).sum()
            nats["predicted"] = found.detach() * batch.length.sum() / length.sum().clamp(min=1)
            total = total + found
        carried = map_carry(torch.detach, JepaCarry(own.state, holed.state))
        return JepaStep(total / batch.total_bytes, nats, batch.characters, carried)


def letters_of(text: Any) -> Tensor:
    """(256) how often each byte stands in a text (t) uint8."""
    return torch.bincount(torch.as_tensor(text.copy()).long(), minlength=256)
