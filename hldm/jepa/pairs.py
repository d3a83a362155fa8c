"""Two views of one meaning (LLM-JEPA, arXiv 2509.14252): next-byte loss, plus a distance between two readings.

    L = CE(B END | START A SEP) + lambda D(h[START A PRED_1 .. PRED_k]_last, h[START B END]_last)

One plain Griffin language model, the twin, reads both; each view is read from a fresh state, so that neither knows of
the other. The end symbol is trained, for what is measured is an exact match of all that is written. Without lambda
it is the baseline, by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hldm.config import AutoencoderConfig, changed
from hldm.jepa.collapse import skill, spread
from hldm.jepa.config import JepaConfig
from hldm.jepa.encoder import NULL, follow, follower_of, momentum_at
from hldm.jepa.objective import JepaCarry, JepaStep, distance
from hldm.jepa.text_pairs import PairBatch
from hldm.model.autoencoder import Autoencoder
from hldm.model.ops import softmax_nats, take_rows
from hldm.text.bytes import END_OF_CHUNK, END_OF_DOCUMENT, START

SEP = END_OF_CHUNK  # between the two views
END = END_OF_DOCUMENT


def twin_of(config: JepaConfig) -> Autoencoder:
    """The language model of a config: attention sees pairs.window bytes back."""
    settings = changed(AutoencoderConfig(), latent_dim=0, decoder=vars(config.encoder))
    chunking = changed(config.chunking, strategy="words", max_bytes=config.pairs.window)
    return Autoencoder.from_settings(settings, chunking)


def joined(
    *pieces: Tensor | tuple[Tensor, Tensor] | int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pieces one after another in every row: (b l) with lengths (b), or one symbol. Symbols (b t) and lengths (b)."""
    laid: list[tuple[Tensor, Tensor]] = []
    for piece in pieces:
        if isinstance(piece, tuple):
            laid.append(piece)
        else:
            one = torch.full((rows, 1), piece, device=device) if isinstance(piece, int) else piece
            laid.append((one, torch.full((rows,), one.shape[1], device=device)))
    lengths = torch.stack([length for _, length in laid])  # (pieces b)
    begin = lengths.cumsum(dim=0) - lengths
    size = int(lengths.sum(dim=0).max())
    out = torch.zeros(rows, size + 1, dtype=torch.long, device=device)  # a spare column for padding
    for (symbols, length), first in zip(laid, begin, strict=True):
        place = torch.arange(symbols.shape[1], device=device).expand_as(symbols)
        out.scatter_(1, torch.where(place < length[:, None], first[:, None] + place, size), symbols)
    return out[:, :size], lengths.sum(dim=0)


class PairObjective(nn.Module):
    """The language model's loss on the second view, and the distance of the two."""

    may_leave_out = True  # steps whose distance is dropped leave the prediction symbols alone
    untrained_rank: Tensor

    def __init__(self, config: JepaConfig):
        super().__init__()
        self.config, self.settings = config, config.objective
        self.twin = twin_of(config)
        width = config.encoder.width
        if config.pairs.predictions:
            self.prediction = nn.Parameter(0.5 * torch.randn(config.pairs.predictions, width))
        self.target: nn.Module | None = None
        if self.settings.target == "ema" and self.settings.latent_weight:
            self.target = follower_of(self.twin)
        self.register_buffer("untrained_rank", torch.zeros((), dtype=torch.float64))
        self.momentum = self.settings.momentum
        self.held_out: Any = None  # a batch of pairs

    def train(self, mode: bool = True) -> PairObjective:
        """Training mode, but for the target: it has no dropout."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def initial_carry(self, rows: int, device: torch.device) -> JepaCarry:
        """Nothing: every pair is read from a fresh state."""
        return JepaCarry(())

    def end_step(self, skipped: bool) -> None:
        """The target follows."""
        if self.target is not None and not skipped:
            follow(self.target, self.twin, self.momentum)

    def forward(
        self, batch: PairBatch, carry: JepaCarry, generator: torch.Generator, progress: float
    ) -> JepaStep:
        """Loss of a batch of pairs."""
        self.momentum = momentum_at(self.settings.momentum, progress)
        is_dropped = float(torch.rand((), generator=generator)) < self.config.pairs.loss_dropout
        nats, counted = self.next_byte_nats(batch)
        rows = batch.context.total_rows
        read = batch.target.total_bytes + rows  # the end symbols
        if self.config.pairs.source == "halves":  # one text, all of which is learned
            read += batch.context.total_bytes + rows
        loss = nats / read
        if self.settings.latent_weight and not is_dropped:
            apart = distance(self.settings.distance, self.predicted(batch), self.encoded(batch))
            loss = loss + self.settings.latent_weight * apart.sum() / rows
        # as if every character of the part had been asked for, for the trainer divides by them
        shown = nats.detach() * batch.target.length.sum() / counted
        return JepaStep(loss, {"next_byte": shown}, batch.target.characters, carry)

    def next_byte_nats(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Nats of the second view and its end, after the first; of both where they are halves of one text."""
        a, b = self._views(batch)
        symbols, length = joined(START, a, SEP, b, END, rows=len(a[1]), device=a[1].device)
        hidden = read_symbols(self.twin, self.twin.write(symbols[:, :-1]), length - 1)
        place = torch.arange(symbols.shape[1] - 1, device=symbols.device)
        counted = (place < length[:, None] - 1) & (
            (place > a[1][:, None]) if self.config.pairs.source != "halves" else True
        )
        logits = self.twin.outputs(hidden[counted])
        return softmax_nats(logits.float(), symbols[:, 1:][counted]).sum(), counted.sum()

    def predicted(self, batch: PairBatch) -> Tensor:
        """Pred(A) (b d): the state at the last prediction symbol after the first view."""
        (a, size), _ = self._views(batch)
        k = self.config.pairs.predictions
        holes = torch.full((len(a), k), NULL, device=a.device)
        symbols, length = joined(START, (a, size), holes, rows=len(a), device=a.device)
        x = self.twin.write(symbols)
        if k:
            number = (torch.arange(symbols.shape[1], device=a.device) - 1 - size[:, None]).clamp(0, k - 1)
            x = torch.where((symbols == NULL)[..., None], self.prediction[number], x)
        return last_of(read_symbols(self.twin, x, length), length)

    def encoded(self, batch: PairBatch) -> Tensor:
        """Enc(B) (b d): the state at the end symbol after the second view, of the target's weights."""
        _, (b, size) = self._views(batch)
        symbols, length = joined(START, (b, size), END, rows=len(b), device=b.device)
        twin: Any = self.twin if self.target is None else self.target
        with torch.set_grad_enabled(self.settings.target == "gradient" and torch.is_grad_enabled()):
            return last_of(read_symbols(twin, twin.write(symbols), length), length)

    @staticmethod
    def _views(batch: PairBatch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        a, b = batch.context, batch.target
        return (a.bytes, a.length), (b.bytes, b.length)

    def parts(self) -> dict[str, Any]:
        """The models to save, by the folder of each."""
        return {"model": self.twin}

    @torch.no_grad()
    def watch(self, held_out: Any) -> None:
        """Keep the pairs that `signs` looks at, and the rank that the untrained model has on them."""
        self.held_out = held_out
        self.untrained_rank.fill_(spread(self.encoded(held_out))["rank"])

    @torch.no_grad()
    def signs(self) -> dict[str, float]:
        """How spread the second views' vectors are, and whether the first views' predictions are theirs."""
        if self.held_out is None:
            return {}
        was_training = self.training
        self.eval()
        predicted, encoded = self.predicted(self.held_out), self.encoded(self.held_out)
        signs = spread(encoded) | {"untrained_rank": float(self.untrained_rank)}
        if self.settings.latent_weight:
            signs["distance"] = float(distance(self.settings.distance, predicted, encoded).mean())
            unit = F.normalize(predicted, dim=-1), F.normalize(encoded, dim=-1)
            signs["shuffle_gap"] = skill(*unit, torch.zeros_like(self.held_out.target.length)).shuffle_gap
        self.train(was_training)
        return signs


def read_symbols(twin: Any, x: Tensor, length: Tensor) -> Tensor:
    """The twin's hidden states (b t d) of embedded symbols (b t d), each row from a fresh state."""
    opens = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    opens[:, 0] = True
    return twin.decoder(x, twin.decoder.initial_state(len(x), x.device), opens, opens, length)[0]


def last_of(hidden: Tensor, length: Tensor) -> Tensor:
    """The states (b d) at the last position of each row."""
    return take_rows(hidden, length[:, None] - 1)[:, 0]


@torch.no_grad()
def write_views(twin: Autoencoder, texts: Sequence[bytes], max_bytes: int) -> list[bytes]:
    """The likeliest second view of each first view, byte by byte, to its end or max_bytes."""
    device = twin.write.weight.device
    size = torch.tensor([len(text) for text in texts], device=device)
    rows = [torch.tensor(list(text), dtype=torch.long, device=device) for text in texts]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    symbols, length = joined(START, (padded, size), SEP, rows=len(texts), device=device)
    opens = torch.zeros_like(symbols, dtype=torch.bool)
    opens[:, 0] = True
    state = twin.decoder.initial_state(len(texts), device)
    hidden, state = twin.decoder(twin.write(symbols), state, opens, opens, length)
    hidden = take_rows(hidden, length[:, None] - 1)
    none = torch.zeros(len(texts), 1, dtype=torch.bool, device=device)
    has_ended = none.clone()
    written: list[Tensor] = []
    while len(written) < max_bytes and not has_ended.all():
        symbol = twin.outputs(hidden).argmax(dim=-1)
        has_ended |= symbol >= SEP
        written.append(symbol)
        hidden, state = twin.decoder(twin.write(symbol), state, none, none)
    lines = torch.cat(written, dim=1).tolist() if written else [[] for _ in texts]
    ends = (next((at for at, s in enumerate(line) if s >= SEP), None) for line in lines)
    # one that never ends matches nothing: a NUL says so, which no view holds
    return [
        bytes(s for s in line[:end] if s < 256) + (b"\0" if end is None else b"")
        for line, end in zip(lines, ends, strict=True)
    ]
