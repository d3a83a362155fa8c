"""`state_change`, `gate` and `entropy` by a trained run: its encoder or its twin gives the signal, nothing is trained.

For a look at cuts without waiting (`hldm chunk`): the shipped run by default. A run to be trained takes a segmenter
of its own (hldm.chunking.strategies): its chunks must be known before its encoder is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hldm.chunking.entropy import entropy_in_bits
from hldm.chunking.recurrence import fall_of_memory, watched
from hldm.chunking.segmenter import Rule, SegmenterState, Signaller
from hldm.chunking.strategies import SEGMENTERS
from hldm.config import ChunkingConfig, changed
from hldm.model.autoencoder import Autoencoder
from hldm.runs.folder import shipped, shipped_run
from hldm.text.bytes import START

BYTES = 256  # of the twin's symbols; the others end things, and the text goes on


class AskedModel(Signaller, nn.Module):
    """An autoencoder, asked: the encoder's last recurrence, all channels; or its twin's next byte.

    Its attention, which a run cuts at chunks, reads on over any border: where chunks lie is what is asked.
    """

    def __init__(self, chunking: ChunkingConfig, model: Autoencoder) -> None:
        super().__init__()
        self.chunking, self.model = chunking, model
        self.rule: Rule = "movement" if chunking.strategy == "state_change" else "level"
        self.register_buffer("threshold", torch.zeros(()))

    def initial_state(self, batch: int) -> SegmenterState:
        stack = self.model.encoder if self.model.latent_dim else self.model.decoder
        nothing = self.model.write.weight.new_zeros(batch, 1)
        return SegmenterState(stack.initial_state(batch), nothing, nothing)

    def signal(self, text: Tensor, doc_start: Tensor, state: SegmenterState) -> tuple[Tensor, SegmenterState]:
        if not self.model.latent_dim:
            return self.entropy(text, doc_start, state)
        with watched(self.model.encoder) as found:
            _, griffin = self.model.encoder(self.model.read(text), state.griffin, doc_start, doc_start)
        state = state._replace(griffin=griffin)
        if self.rule == "movement":
            return found[-1].states, state
        fall, carry = fall_of_memory(found[-1].gates, state.carry)
        return fall, state._replace(carry=carry)

    def entropy(
        self, text: Tensor, doc_start: Tensor, state: SegmenterState
    ) -> tuple[Tensor, SegmenterState]:
        """Of the twin's next byte, in bits; the last byte is carried."""
        before = torch.cat([state.carry.long(), text[:, :-1]], dim=1)
        symbol = before.masked_fill(doc_start, START)
        logits, griffin = self.model.decode_symbols(symbol, doc_start, doc_start, state.griffin)
        log_p = logits[..., :BYTES].log_softmax(dim=-1)
        carry = text[:, -1:].to(state.carry.dtype)
        return entropy_in_bits(log_p), state._replace(griffin=griffin, carry=carry)


ASKED = ("state_change", "gate", "entropy")  # strategies that a run, or its twin, can be asked for


def shipped_signaller(chunking: ChunkingConfig, documents: Sequence[np.ndarray]) -> Signaller:
    """What comes with hldm for a strategy, its threshold set on these documents.

    The shipped run or, for `entropy`, its twin, where they have a signal; else a small segmenter within these limits.
    Raises FileNotFoundError in a copy of hldm without it.
    """
    strategy = chunking.strategy
    signaller: Signaller
    if strategy in ASKED:
        folder = shipped_run(twin=strategy == "entropy") / "pipeline" / "autoencoder"
        signaller = AskedModel(chunking, Autoencoder.from_pretrained(folder).eval())
    else:
        signaller = SEGMENTERS[strategy].from_pretrained(shipped(f"segmenters/{strategy}")).eval()
        limits = {name: getattr(chunking, name) for name in ("min_bytes", "max_bytes", "target_bytes")}
        signaller.chunking = changed(signaller.chunking, **limits)
    signaller.calibrate(documents)
    return signaller
