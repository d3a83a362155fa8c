"""`state_change`, `gate` and `entropy` by a trained run: its encoder or its twin gives the signal, nothing is trained.

For a look at cuts without waiting (`hldm chunk`): the shipped run by default. A run to be trained takes a segmenter
of its own (hldm.chunking.strategies): its chunks must be known before its encoder is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hldm.chunking.entropy import entropy_in_bits
from hldm.chunking.recurrence import Recurrence, fall_of_memory, watched
from hldm.chunking.segmenter import Rule, SegmenterState, Signaller
from hldm.chunking.strategies import SEGMENTERS
from hldm.config import ChunkingConfig, changed
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import GriffinState
from hldm.runs.folder import shipped, shipped_run
from hldm.text.bytes import START

BYTES = 256  # of the twin's symbols; the others end things, and the text goes on


class ModelSegmenter(Signaller, nn.Module):
    """An autoencoder, asked."""

    def __init__(self, chunking: ChunkingConfig, model: Autoencoder) -> None:
        super().__init__()
        self.chunking, self.model = chunking, model
        self.register_buffer("threshold", torch.zeros(()))

    def state(self, griffin: GriffinState, batch: int) -> SegmenterState:
        """The state before any text, of a stack."""
        nothing = self.model.write.weight.new_zeros(batch, 1)
        return SegmenterState(griffin, nothing, nothing)


class EncoderSegmenter(ModelSegmenter):
    """The last recurrence of an encoder, all channels.

    Its attention, which a run cuts at chunks, reads on over any border: where chunks lie is what is asked.
    """

    def initial_state(self, batch: int) -> SegmenterState:
        return self.state(self.model.encoder.initial_state(batch), batch)

    def recurrence(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState
    ) -> tuple[Recurrence, SegmenterState]:
        """Of text (b t), documents of which start where doc_start (b t) says."""
        with watched(self.model.encoder) as found:
            _, griffin = self.model.encoder(self.model.read(text), state.griffin, doc_start, doc_start)
        return found[-1], state._replace(griffin=griffin)


class EncoderStates(EncoderSegmenter):
    """`state_change`: how far the encoder's recurrent state has moved since the open chunk began."""

    rule: Rule = "movement"

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        recurrence, state = self.recurrence(text, doc_start, state)
        return recurrence.states, state


class EncoderGates(EncoderSegmenter):
    """`gate`: how much less the encoder's recurrence gates keep than a byte before."""

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        recurrence, after = self.recurrence(text, doc_start, state)
        fall, carry = fall_of_memory(recurrence.gates, state.carry)
        return fall, after._replace(carry=carry)


class TwinEntropy(ModelSegmenter):
    """`entropy`: of the twin's next byte, in bits."""

    def initial_state(self, batch: int) -> SegmenterState:
        return self.state(self.model.decoder_state(batch).griffin, batch)  # carries the last byte

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        before = torch.cat([state.carry.long(), text[:, :-1]], dim=1)
        symbol = before.masked_fill(doc_start, START)
        logits, griffin = self.model.decode_symbols(symbol, doc_start, doc_start, state.griffin)
        log_p = logits[..., :BYTES].log_softmax(dim=-1)
        carry = text[:, -1:].to(state.carry.dtype)
        return entropy_in_bits(log_p), state._replace(griffin=griffin, carry=carry)


MODEL_SEGMENTERS: dict[str, Callable[[ChunkingConfig, Autoencoder], ModelSegmenter]] = {
    "state_change": EncoderStates,
    "gate": EncoderGates,
    "entropy": TwinEntropy,
}


def shipped_signaller(chunking: ChunkingConfig, documents: Sequence[np.ndarray]) -> Signaller:
    """What comes with hldm for a strategy, its threshold set on these documents.

    The shipped run or, for `entropy`, its twin, where they have a signal; else a small segmenter within these limits.
    Raises FileNotFoundError in a copy of hldm without it.
    """
    strategy = chunking.strategy
    signaller: Signaller
    if strategy in MODEL_SEGMENTERS:
        folder = shipped_run(twin=strategy == "entropy") / "pipeline" / "autoencoder"
        signaller = MODEL_SEGMENTERS[strategy](chunking, Autoencoder.from_pretrained(folder).eval())
    else:
        signaller = SEGMENTERS[strategy].from_pretrained(shipped(f"segmenters/{strategy}")).eval()
        limits = {name: getattr(chunking, name) for name in ("min_bytes", "max_bytes", "target_bytes")}
        signaller.chunking = changed(signaller.chunking, **limits)
    signaller.calibrate(documents)
    return signaller
