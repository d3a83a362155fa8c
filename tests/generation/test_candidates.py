"""A beam of candidates writes what its parts say: one draw is plain writing, the rule chooses, rows do not mix."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from tiny_model import tiny_pipeline

from hldm.generation.candidates import Search, _slot_generators, as_tree, write_best
from hldm.generation.ranking import RULES
from hldm.generation.writer import make_writer, write_on

PROMPTS = [b"And the king said", b"", b"caf\xc3\xa9 \xf0\x9f\x91\x91 \xff\xfe"]


@pytest.fixture(params=["model", "twin"])
def pipeline(request):
    return tiny_pipeline(**({} if request.param == "model" else {"latent_dim": 0}))


def write(pipeline, prompts, search, *, seed=0, characters=24, through_ends=False, watch=None):
    parts = pipeline.autoencoder, pipeline.prior, prompts, pipeline.settings, search
    writing = write_best(*parts, max_characters=characters, seed=seed, through_ends=through_ends, watch=watch)
    return deque(writing, maxlen=1).pop()[0]


def plain(pipeline, prompts, *, seed=0, characters=24, through_ends=False):
    parts = pipeline.autoencoder, pipeline.prior, prompts, pipeline.settings
    writing = write_on(*parts, max_characters=characters, seed=seed, through_ends=through_ends)
    return deque(writing, maxlen=1).pop()[0]


def prefers(number):
    """A rule for which the candidate of one number is the best, wherever it stands."""
    return lambda stubs: [float(at == min(number, len(stubs) - 1)) for at in range(len(stubs))]


def texts(rows):
    return [row.text for row in rows]


@pytest.mark.parametrize("through_ends", [False, True])
def test_one_candidate_is_plain_writing_and_so_is_the_first_of_several(pipeline, through_ends):
    wanted = plain(pipeline, PROMPTS, through_ends=through_ends)
    for search in (Search(), Search(candidates=3, rank=prefers(0), depth=2)):
        found = write(pipeline, PROMPTS, search, through_ends=through_ends)
        assert texts(found) == texts(wanted)
        assert [row.chunks for row in found] == [row.chunks for row in wanted]
        assert [(row.left, row.ended) for row in found] == [(row.left, row.ended) for row in wanted]


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
def test_the_preferred_candidate_is_what_its_generator_draws(pipeline, number):
    found = write(pipeline, PROMPTS[:1], Search(candidates=3, rank=prefers(number), depth=4), seed=5)
    generator = _slot_generators(5, 3)[number]
    parts = pipeline.autoencoder, pipeline.prior, PROMPTS[:1], pipeline.settings
    writer, [row] = make_writer(*parts, [generator]), plain(pipeline, PROMPTS[:1], characters=1)
    written = b""
    while not row.ended and len(written) < len(found[0].text):
        [piece] = writer.write()
        written += piece.text
        row.ended = piece.ends_document
    assert written.startswith(found[0].text) and found[0].text


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("rank", RULES)
def test_a_batch_writes_what_its_prompts_write_one_by_one(pipeline, rank, keep):
    if (rank == "moments" and pipeline.prior is None) or (rank == "pairwise" and keep > 1):
        pytest.skip("refused")
    search = Search(candidates=3, rank=rank, depth=3, keep=keep)
    together = write(pipeline, PROMPTS, search, seed=7)
    alone = [write(pipeline, [prompt], search, seed=7 + i)[0] for i, prompt in enumerate(PROMPTS)]
    assert texts(together) == texts(alone)
    assert texts(together) == texts(write(pipeline, PROMPTS, search, seed=7))
    assert all(row.ended or row.left == 0 for row in together)


def test_fast_and_plain_writers_choose_alike(plain_torch):
    pipeline = tiny_pipeline()
    for search in (
        Search(candidates=4, rank="bound", depth=3, keep=2),
        Search(candidates=3, rank="pairwise", depth=2),
    ):
        fast = texts(write(pipeline, PROMPTS, search))
        with plain_torch():
            assert fast == texts(write(pipeline, PROMPTS, search))


def test_the_rule_gets_what_it_asks_for_and_the_tree_shows_what_it_chose():
    seen, places = [], []

    def longest(stubs):
        seen.append([(stub.before, stub.text) for stub in stubs])
        return [len(stub.text) for stub in stubs]

    pipeline = tiny_pipeline()
    [row] = write(pipeline, [b"And"], Search(candidates=4, rank=longest, depth=2), watch=places.append)
    text = b""
    for stubs, place in zip(seen, places, strict=True):
        assert all(before == b"And" + text for before, _ in stubs)
        [kept] = [each for each in place["candidates"] if each["kept"]]
        assert len(place["candidates"]) == 4 and kept["score"] == max(len(stub) for _, stub in stubs)
        text += max((stub for _, stub in stubs), key=len)
    assert text.startswith(row.text)
    tree = as_tree(places)
    assert tree.count("kept") == len(places) and tree.count("discarded") == 3 * len(places)


def test_a_wider_beam_finds_what_one_choice_at_a_time_misses():
    """The best is known: the text with most of one letter. More branches reach at least as many, and more in all."""
    pipeline = tiny_pipeline()
    letter = b"e"

    def most(stubs):
        return [float((stub.before + stub.text).count(letter)) for stub in stubs]

    found = {}
    for keep in (1, 4):
        rows = write(
            pipeline, [b"e"] * 24, Search(candidates=4, rank=most, depth=1, keep=keep), through_ends=True
        )
        found[keep] = sum(text.count(letter) for text in texts(rows))
    drawn = sum(text.count(letter) for text in texts(plain(pipeline, [b"e"] * 24, through_ends=True)))
    assert drawn < found[1] < found[4]


def test_what_is_handed_on_adds_up_and_stops_where_it_is_told():
    pipeline = tiny_pipeline()
    handed = []
    search = dict(candidates=3, rank="agreement", keep=2, depth=3)
    whole = pipeline("And", max_characters=40, streamer=lambda row, new: handed.append(new), **search).texts[
        0
    ]
    assert "".join(handed) == whole
    stop = whole[len(whole) // 2 :][:2]
    assert pipeline("And", max_characters=40, stop=stop, **search).texts[0] == whole[: whole.find(stop)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            dict(candidates=10_000),
            "candidates must lie in 1..512: each holds a state of its own in memory, got 10000",
        ),
        (dict(candidates=2, keep=3), "keep must be at most candidates, got 3 of 2"),
        (dict(candidates=64, keep=32), "candidates times keep must be at most 512.*64 x 32 = 2048"),
        (dict(candidates=2, depth=0), "depth must lie in 1..1000, got 0"),
        (dict(candidates=2.5), "candidates must lie in 1..512.*got 2.5"),
        (
            dict(candidates=2, rank="best"),
            "rank must be moments, bound, mbr, agreement, pairwise, or a function",
        ),
        (dict(candidates=2, keep=2, rank="pairwise"), "keep must be 1, got 2"),
        (dict(candidates=2, rank=lambda stubs: [1.0]), r"one number for each of its stubs.*got \[1.0\]"),
        (dict(candidates=2, rank=lambda stubs: [float("nan")] * 2), "one number for each"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(asked, said):
    with pytest.raises(ValueError, match=said) as error:
        tiny_pipeline()("And", max_characters=8, **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [dict(latent_dim=0), dict(components=0)])
def test_moments_need_a_mixture(kind):
    with pytest.raises(ValueError, match="rank=moments .* a (twin|model without a mixture)"):
        tiny_pipeline(**kind)("And", max_characters=8, candidates=2, rank="moments")


def test_guidance_reaches_every_candidate():
    pipeline = tiny_pipeline()
    pipeline.register_to_config(defaults={**pipeline.config["defaults"], "guidance": 1.5})
    search = Search(candidates=3, rank=prefers(0), depth=2)
    guided = texts(plain(pipeline, PROMPTS))
    assert texts(write(pipeline, PROMPTS, search)) == guided != texts(plain(tiny_pipeline(), PROMPTS))
