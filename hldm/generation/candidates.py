"""The best of several continuations: a beam whose branches are latents.

At each place every branch that is kept draws N latents for the next chunk and writes on from each, `depth` chunks, all
of them in one batch; a rule ranks these stubs (hldm.generation.ranking), the worst are discarded, and the best `keep`
are the branches of the next place. States are copied by rows. Rules that judge a stub by itself discard while it is
written, down to `keep` in equal ratios; those that compare stubs wait until all are finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, cast

import numpy as np
import torch

from hldm.config import GenerationConfig
from hldm.generation.chunk import Piece, Written
from hldm.generation.own_bits import bits_after, cost_of, residuals_of
from hldm.generation.ranking import Ranker, Rule, Stub, rule_of, scores_of
from hldm.generation.streams import Writing
from hldm.generation.writer import (
    ByteWriter,
    Continuation,
    LatentWriter,
    Stretch,
    make_writer,
    nothing_written,
    row_generators,
    write_on,
)
from hldm.model.autoencoder import Autoencoder
from hldm.model.prior import Prior
from hldm.text.bytes import count_characters

MOST_STUBS = 512  # of a place: 0.3 MB of state each with configs/small.yaml, and again while they are copied
MOST_DEPTH = 1_000

Watch = Callable[[dict[str, Any]], object]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How many candidates stand at each place, and which go on. Raises ValueError for what cannot be."""

    candidates: int = 1  # of each branch
    rank: str | Ranker = "mbr"  # a name of hldm.generation.ranking.RULES, or a function of stubs
    keep: int = 1  # branches that go on from each place
    depth: int = 16  # chunks that are written before the last choice; of the twin, stretches as long

    def __post_init__(self) -> None:
        for name, most in (("candidates", MOST_STUBS), ("keep", MOST_STUBS), ("depth", MOST_DEPTH)):
            try:
                value = index(getattr(self, name))
            except TypeError:
                value = 0
            if not 1 <= value <= most:
                why = ": each holds a state of its own in memory" if most == MOST_STUBS else ""
                raise ValueError(f"{name} must lie in 1..{most}{why}, got {getattr(self, name)!r:.40}")
        if self.keep > self.candidates:
            raise ValueError(f"keep must be at most candidates, got {self.keep} of {self.candidates}")
        if self.stubs > MOST_STUBS:
            raise ValueError(
                f"candidates times keep must be at most {MOST_STUBS}: each holds a state of its own in memory, got "
                f"{self.candidates} x {self.keep} = {self.stubs}"
            )
        rule_of(self.rank)

    @property
    def stubs(self) -> int:
        """How many are written at once for a prompt, at most."""
        return self.candidates * self.keep

    def rule(self, prior: Prior | None) -> Rule:
        """What ranks. Raises ValueError where a model has nothing that the rule could look at."""
        rule = rule_of(self.rank)
        if rule.needs == "residuals" and (prior is None or prior.mixture is None):
            model = "a twin, which has no latents" if prior is None else "a model without a mixture"
            raise ValueError(
                f"rank={self.rank} compares latents with what a mixture predicts, and this is {model}"
            )
        if rule.needs == "pairs" and self.keep > 1:
            raise ValueError(
                f"rank={self.rank} reads one stub after another from one place: keep must be 1, got {self.keep}"
            )
        return rule


@dataclass
class _Branch:
    """A stub, and where it stands."""

    stub: Stub
    row: int = 0  # of the writer
    slot: int = 0  # whose generator it draws from
    parent: int = 0  # which branch of the place it goes on from
    score: float = 0.0
    is_finished: bool = False  # its document has ended, or it has all the characters that are wanted
    is_discarded: bool = False

    def copied(self, **changes: Any) -> _Branch:
        """Another that goes on from the same stub."""
        return replace(self, stub=self.stub.of_pieces(0), **changes)


@dataclass
class _Beam:
    """The branches of one prompt."""

    continuation: Continuation
    generators: list[torch.Generator]
    branches: list[_Branch]
    committed: list[Piece]  # that all branches share, not handed on yet
    origin: int = 0  # row of the first branch before the place, in the writer that all go on from

    @property
    def goes_on(self) -> bool:
        return self.continuation.left > 0 and not self.continuation.ended

    @property
    def standing(self) -> list[_Branch]:
        return [branch for branch in self.branches if not branch.is_discarded]

    def expand(self, count: int) -> None:
        """`count` candidates of each branch; one that is finished stays as it is."""
        expanded: list[_Branch] = []
        self.origin = self.branches[0].row
        for parent, branch in enumerate(self.branches):
            copies = 1 if branch.is_finished else count
            expanded += [branch.copied(slot=parent * count + j, parent=parent) for j in range(copies)]
        self.branches = expanded

    def rank(self, rule: Rule) -> None:
        """Give every branch that stands its score."""
        standing = self.standing
        for branch, score in zip(
            standing, scores_of(rule, [branch.stub for branch in standing]), strict=True
        ):
            branch.score = score

    def discard(self, keep: int, distinct: bool = False) -> None:
        """All but the best `keep`. distinct: texts that differ, where there are so many."""
        order = sorted(self.standing, key=lambda branch: -branch.score)  # stable: the first of equals
        if distinct:
            texts = [branch.stub.text for branch in order]
            order = [order[i] for i in sorted(range(len(order)), key=lambda i: texts[i] in texts[:i])]
        for branch in order[keep:]:
            branch.is_discarded = True

    def commit(self) -> None:
        """Hand on what all branches share; all of the best, if that is finished."""
        self.branches = sorted(self.standing, key=lambda branch: -branch.score)
        best = self.branches[0]
        if best.is_finished:
            self.branches = [best]
        shared = 0
        for pieces in zip(*(branch.stub.pieces for branch in self.branches), strict=False):
            if any(piece != pieces[0] for piece in pieces):
                break
            shared += 1
        self.committed += best.stub.pieces[:shared]
        for branch in self.branches:
            branch.stub = branch.stub.of_pieces(shared)


@torch.no_grad()
def write_best(
    autoencoder: Autoencoder,
    prior: Prior | None,
    prompts: Sequence[bytes],
    settings: GenerationConfig,
    search: Search,
    *,
    max_characters: int,
    seed: int | Sequence[int] = 0,
    through_ends: bool = False,
    watch: Watch | None = None,
) -> Iterator[Writing]:
    """Continue each prompt by the best of several candidates; yields what `write_on` does, chunk by chunk.

    One candidate is plain writing. Of several, candidate 0 of the first branch draws as that does, and each other has a
    generator of its own, made of the row's seed: a batch writes what its prompts write one by one.
    What several branches share is handed on as soon as they do.
    watch: called with each place of each row: what stood there, its scores, what was kept
    Raises ValueError, one line, for a rule that the model has nothing for.
    """
    rule = search.rule(prior)
    if search.candidates == 1:
        parts = autoencoder, prior, prompts, settings
        yield from write_on(*parts, max_characters=max_characters, seed=seed, through_ends=through_ends)
        return
    rows = nothing_written(prompts, max_characters)
    seeds = range(seed, seed + len(rows)) if isinstance(seed, int) else seed
    writer = cast(
        "LatentWriter | ByteWriter",
        make_writer(autoencoder, prior, prompts, settings, row_generators(seed, len(prompts))),
    )
    beams = [
        _Beam(row, _slot_generators(each, search.stubs), [_Branch(Stub(row.prompt), number)], [])
        for number, (row, each) in enumerate(zip(rows, seeds, strict=True))
    ]
    place = 0
    while any(beam.goes_on for beam in beams):
        going = [beam for beam in beams if beam.goes_on]
        for beam in going:
            beam.expand(search.candidates)
        writer = _write_stubs(writer, going, rule, search, place, through_ends)
        place += search.depth
        for number, beam in enumerate(beams):
            if not beam.goes_on:
                continue
            beam.rank(rule)
            beam.discard(search.keep, distinct=True)
            if watch is not None:
                watch(_seen(number, beam))
            beam.commit()
        longest = max(len(beam.committed) for beam in going)
        for at in range(max(longest, 1)):
            yield rows, [_hand_on(beam, at, through_ends) for beam in beams], writer.calls
        for beam in beams:
            beam.committed = []


def _slot_generators(seed: int, slots: int) -> list[torch.Generator]:
    """The first is that of plain writing."""
    seeds = [seed]
    for slot in range(1, slots):
        seeds.append(
            int(np.random.SeedSequence([seed, slot]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        )
    return row_generators(seeds, slots)


def _write_stubs(
    writer: LatentWriter | ByteWriter,
    beams: Sequence[_Beam],
    rule: Rule,
    search: Search,
    place: int,
    through_ends: bool,
) -> LatentWriter | ByteWriter:
    """Write `depth` chunks of every branch, fewer where it is finished or discarded; the writer of those left."""
    start, writer = writer, _of_branches(writer, beams)
    counts = [len(beam.branches) for beam in beams]
    for step in range(search.depth):
        if not (live := _live(beams)):
            break
        drawn = writer.draw()
        _note(live, writer, drawn, rule, place + step)
        writer.take_in(drawn)  # type: ignore[arg-type]  # its own
        share = (step + 1) / search.depth
        for beam, count in zip(beams, counts, strict=True):
            for branch in beam.branches:
                _finish(branch, beam.continuation.left, through_ends)
            least = min(search.keep, count)
            _prune(beam, rule, math.ceil(count * (least / count) ** share) if share < 1 else count)
        writer = _of_branches(writer, beams)
    if rule.needs == "pairs":
        for beam in beams:
            _compare(beam, start)
    return writer


def _live(beams: Sequence[_Beam]) -> list[_Branch]:
    """Branches that are still written, in the order of the writer's rows."""
    return [branch for beam in beams for branch in beam.standing if not branch.is_finished]


def _of_branches(writer: LatentWriter | ByteWriter, beams: Sequence[_Beam]) -> LatentWriter | ByteWriter:
    """The writer of these branches alone, each with the generator of its slot."""
    pairs = [(b, beam.generators[b.slot]) for beam in beams for b in beam.standing if not b.is_finished]
    rows, generators = [branch.row for branch, _ in pairs], [generator for _, generator in pairs]
    for row, (branch, _) in enumerate(pairs):
        branch.row = row
    if not pairs or (rows == [*range(len(writer.generators))] and generators == [*writer.generators]):
        return writer
    return writer.pick(rows, generators)


def _note(
    live: Sequence[_Branch],
    writer: LatentWriter | ByteWriter,
    drawn: Written | Stretch,
    rule: Rule,
    place: int,
) -> None:
    """Add what was drawn to the stubs, with what the rule needs to know of it; the writer stands before it."""
    if rule.needs in ("bits", "pairs"):
        for branch, bits in zip(live, cost_of(writer, drawn.pieces, place).bits.tolist(), strict=True):
            branch.stub.bits.append(bits)
    if rule.needs == "residuals":
        assert isinstance(writer, LatentWriter) and isinstance(drawn, Written)
        for branch, residual in zip(live, residuals_of(writer, drawn.latents[:, 0]), strict=True):
            branch.stub.residuals.append(residual)
    for branch, piece in zip(live, drawn.pieces, strict=True):
        branch.stub.pieces.append(piece)


def _finish(branch: _Branch, left: int, through_ends: bool) -> None:
    pieces, text = branch.stub.pieces, branch.stub.text
    ends = bool(pieces) and pieces[-1].ends_document and not through_ends
    is_open = text[-1:] >= b"\x80"  # the last character may not be complete
    branch.is_finished |= ends or count_characters(text) - is_open >= left


def _prune(beam: _Beam, rule: Rule, most: int) -> None:
    """Discard stubs that have left what the context predicts, and the worst beyond `most`; never all."""
    standing = beam.standing
    if rule.leaves is not None and len(standing) > 1:
        gone = [branch for branch in standing if rule.leaves(branch.stub)]
        for branch in gone if len(gone) < len(standing) else []:
            branch.is_discarded = True
    if rule.alone and len(beam.standing) > most:
        beam.rank(rule)
        beam.discard(most)


def _compare(beam: _Beam, start: LatentWriter | ByteWriter) -> None:
    """What the other stubs cost less after each, in bits: their mean. start: the writer before any of them."""
    standing = beam.standing
    pairs = [(a, b) for a in standing for b in standing if a is not b]
    if not pairs:
        standing[0].stub.lift = 0.0
        return
    writer = start.pick([beam.origin] * len(pairs), [start.generators[beam.origin]] * len(pairs))
    texts = [a.stub.pieces + b.stub.pieces for a, b in pairs]
    after = bits_after(writer, texts, [len(a.stub.pieces) for a, _ in pairs]).tolist()
    for branch in standing:
        saved = [sum(b.stub.bits) - bits for (a, b), bits in zip(pairs, after, strict=True) if a is branch]
        branch.stub.lift = sum(saved) / len(saved)


def _hand_on(beam: _Beam, at: int, through_ends: bool) -> bytes:
    """The next chunk that is certain, as `write_on` hands it on."""
    row = beam.continuation
    if at >= len(beam.committed) or row.ended:
        return b""
    piece = beam.committed[at]
    text = row.add(piece.text)
    row.ended |= piece.ends_document and not through_ends and row.left > 0
    return text


# ---- what is shown of it


def _seen(row: int, beam: _Beam) -> dict[str, Any]:
    """A place as it is reported: what stood there, best first."""
    branches = sorted(beam.branches, key=lambda branch: (branch.is_discarded, -branch.score))
    return {
        "row": row,
        "written": count_characters(beam.continuation.text),  # before this place
        "candidates": [
            {
                "branch": branch.parent,
                "text": branch.stub.text.decode("utf-8", "replace"),
                "chunks": len(branch.stub.pieces),
                "score": branch.score,
                "kept": not branch.is_discarded,
            }
            for branch in branches
        ],
    }


def as_tree(places: Sequence[dict[str, Any]]) -> str:
    """Places of one row as text: score, chunks, what was kept, and the text of every candidate."""
    lines = []
    for place in places:
        lines.append(f"after {place['written']:,} characters")
        for each in place["candidates"]:
            mark = "kept     " if each["kept"] else "discarded"
            text = " ".join(each["text"].split("\n"))
            lines.append(
                f"  {mark} {each['score']:10.4f}  branch {each['branch']}, {each['chunks']} chunks: {text}"
            )
    return "\n".join(lines)
