"""What stands between two texts: drawn as any text is, ranked by what comes after, and nothing else is touched."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_model import tiny_pipeline

from hldm.config import changed
from hldm.generation import fill
from hldm.generation.bound import ChunkBounds
from hldm.text.bytes import END_OF_DOCUMENT

TEXT = b"And the king said to them, Let us go up to the town."


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline(trunk_layers=1)
    pipe.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = -1e9
    return pipe


@pytest.mark.parametrize("seed", [0, 5])
def test_one_candidate_is_plain_writing_of_that_length(pipe, seed):
    plain = pipe("And", max_characters=20, seed=seed)
    (only,) = pipe.fill("And", "the end", characters=20, candidates=1, seed=seed)
    assert only.text == plain.sequences[0]
    (only,) = pipe.fill("And", "the end", chunks=4, candidates=1, seed=seed)
    assert only.chunks == [plain.sequences[0][a:b] for a, b in plain.chunk_spans[0][:4]]


def test_candidates_are_those_of_their_seeds_and_sorted_by_what_the_right_text_costs(pipe):
    found = pipe.fill(TEXT, b"and so on", characters=12, candidates=6, seed=3)
    plain = pipe([TEXT], max_characters=12, num_return_sequences=6, seed=3).sequences
    assert sorted(each.text for each in found) == sorted(plain)
    assert [each.right for each in found] == sorted(each.right for each in found)
    assert len({each.right for each in found}) > 1
    assert found == pipe.fill(TEXT, b"and so on", characters=12, candidates=6, seed=3)


@pytest.mark.parametrize(
    "kind", [dict(), dict(components=0), dict(latent_dim=0, components=0, carry_state=True)]
)
def test_costs_are_those_that_score_gives_for_the_same_chunks(kind):
    components = kind.pop("components", 4)
    pipe = tiny_pipeline(components, **kind)
    left, middle, right = b"And the king ", b"said", b" to them all"
    costs = fill.cost_candidates(
        pipe.autoencoder, pipe.prior, left, [[b"sa", b"id"], [b"wr", b"ote"]], right, samples=4, seed=2
    )
    tight = pipe.prior is not None and pipe.prior.mixture is not None
    given = dict(draws=2, samples=4 if tight else 0, seed=2)
    score = pipe.score([right], prefix=left + middle, **given)[0]
    chunks = fill.split_text(pipe.autoencoder, left + middle)
    if pipe.prior is None or b"".join(chunks[-2:]) == middle:  # else the chunker cuts it otherwise
        assert costs.right[0] == pytest.approx(score.importance if tight else score.bits, rel=1e-5)
    own = pipe.score([middle], prefix=left, draws=2, samples=0)[0].bits
    assert costs.middle.shape == (2,) and (
        pipe.prior is not None or costs.middle[0] == pytest.approx(own, rel=1e-5)
    )


def test_where_the_right_context_decides_it_does(pipe, monkeypatch):
    """A law known by hand: a chunk costs 1 nat after one that ends with the letter it begins with, else 9."""

    def bound_chunks(autoencoder, prior, windows, *, draws, samples, generator):
        text = windows.corpus.text.tobytes()
        first = np.flatnonzero(windows.chunk_start)
        nats = np.array([1.0 if at and text[at - 1] == text[at] else 9.0 for at in first])
        none = np.zeros_like(nats)
        return ChunkBounds(none, nats, none, none, np.arange(len(nats)), nats, none)

    monkeypatch.setattr(fill, "bound_chunks", bound_chunks)
    drawn = [[b"ab", b"ba"], [b"ab", b"bc"], [b"xy", b"zq"]]
    monkeypatch.setattr(fill, "draw_candidates", lambda *_, **__: drawn)
    by_c = pipe.fill("..", "ccdd", chunks=2, candidates=3)
    assert by_c[0].chunks == drawn[1] and by_c[1].chunks == drawn[0]  # equals keep their order
    assert pipe.fill("..", "aadd", chunks=2, candidates=3)[0].chunks == drawn[0]
    assert pipe.fill("..", "qqdd", chunks=2, candidates=3)[0].chunks == drawn[2]
    count = len(fill.split_text(pipe.autoencoder, "ccdd"))
    costs = fill.cost_candidates(pipe.autoencoder, pipe.prior, b"..", drawn, b"ccdd")
    np.testing.assert_allclose(costs.middle * math.log(2), [10, 10, 18])
    assert costs.right[0] - costs.right[1] == pytest.approx(8 / math.log(2)) and count >= 1


def test_an_edit_leaves_every_other_chunk_as_it_was(pipe):
    chunks = fill.split_text(pipe.autoencoder, TEXT)
    assert b"".join(chunks) == TEXT and len(chunks) > 6
    for first, last in ((1, 2), (3, 5), (len(chunks), len(chunks))):
        found = pipe.edit(TEXT, (first, last), candidates=3, seed=1)
        assert found.before == chunks and len(found.chunks) == len(chunks)
        assert found.chunks[: first - 1] == chunks[: first - 1] and found.chunks[last:] == chunks[last:]
        assert found.chunks[first - 1 : last] == found.candidates[0].chunks
        assert found.text == b"".join(found.chunks) and len(found.candidates) == 3


def test_all_latents_held_at_temperature_0_write_the_same_text_whatever_the_seed(pipe):
    count = len(fill.split_text(pipe.autoencoder, TEXT))
    cold = changed(pipe.settings, temperature=0.0, decoder_temperature=0.0)
    held = {
        pipe.edit(TEXT, (1, count), hold_latents=True, candidates=2, seed=seed, settings=cold).text
        for seed in (0, 1, 2)
    }
    assert len(held) == 1
    drawn = {pipe.edit(TEXT, (1, count), candidates=2, seed=seed).text for seed in (0, 1, 2)}
    assert len(drawn) > 1


def test_candidates_that_end_the_document_are_left_out():
    pipe = tiny_pipeline()
    pipe.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = 1e9
    for length in (dict(chunks=3), dict(characters=30)):
        with pytest.raises(ValueError, match="all of 4 candidates end the document"):
            pipe.fill("And", "then", candidates=4, **length)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p.fill("", "", chunks=2), "right is empty"),
        (lambda p: p.fill("a", "b"), "one of the two"),
        (lambda p: p.fill("a", "b", chunks=2, characters=3), "one of the two"),
        (
            lambda p: p.fill("a", "b", chunks=2, candidates=10_000),
            "candidates must lie in 1..1,024, got 10,000",
        ),
        (lambda p: p.fill("a", "b", chunks=0), "chunks must lie in"),
        (lambda p: p.fill("a", "b", characters=10**9), "characters must lie in"),
        (lambda p: p.fill("a", "b", chunks=1, seed=-1), "seed must lie in"),
        (lambda p: p.edit("", (1, 1)), "text[0] is empty".replace("[", r"\[").replace("]", r"\]")),
        (lambda p: p.edit("And the", (2, 9)), "has chunks 1 to"),
        (lambda p: p.edit("And the", (2, 1)), "has chunks 1 to"),
        (lambda p: p.edit("And the", (0, 1)), "has chunks 1 to"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, says, pipe):
    with pytest.raises(ValueError, match=says) as error:
        call(pipe)
    assert "\n" not in str(error.value)


def test_a_twin_fills_by_characters_alone():
    twin = tiny_pipeline(0, latent_dim=0, carry_state=True)
    twin.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = -1e9
    found = twin.fill("And", "then", characters=9, candidates=3)
    assert len(found) == 3 and all(each.error == 0 for each in found)
    for call in (lambda: twin.fill("And", "then", chunks=2), lambda: twin.edit("And then", (1, 1))):
        with pytest.raises(ValueError, match="twin"):
            call()
