"""The extended mixture is a density, texts have probabilities that sum to one, and nothing looks ahead."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_model import tiny_pipeline

from hldm.chunking.reading import held_out_windows
from hldm.generation.memory import Gate, Neighbours, SourceGate, fit_gate, query_of
from hldm.generation.remembering import (
    EarlierChunks,
    Memory,
    Past,
    RememberingWriter,
    document_neighbours,
    read_past,
)
from hldm.generation.writer import make_writer, row_generators, write_on
from hldm.text.corpus import make_corpus

GAMMA_0 = -2.2
GATE = Gate(0.2, {"document": SourceGate(bias=0.5, log_sharpness=1.0, match=0.7, log_deviation=-1.5)})


def some_neighbours(b: int = 3, j: int = 4, z: int = 1, seed: int = 0) -> Neighbours:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(b, j, z, generator=generator, dtype=torch.float64)
    distance = torch.rand(b, j, generator=generator, dtype=torch.float64)
    distance[-1] = torch.inf  # nothing was retrieved
    return Neighbours(latents, distance, torch.randint(0, 4, (b, j), generator=generator))


def normal(z: torch.Tensor) -> torch.Tensor:
    """log N(z; 0, I) of (... z)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=-1)


@pytest.mark.parametrize("z", [1, 2])
def test_the_extended_mixture_integrates_to_one(z):
    step = 0.02 if z == 1 else 0.06
    line = torch.arange(-7, 7, step, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * z).view(1, -1, z).expand(3, -1, z)
    weighed = GATE.weigh({"document": some_neighbours(z=z)})
    share = 1 - weighed.log_kept.exp()
    assert (share[:2] > 0.3).all() and share[2] == 0  # the memory has a say, where it has anything to say
    mass = weighed.log_density(normal(grid), grid, GAMMA_0).exp().sum(dim=1) * step**z
    torch.testing.assert_close(mass, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_without_neighbours_nothing_changes():
    z_0 = torch.randn(3, 5, 1, dtype=torch.float64)
    weighed = GATE.weigh({"document": some_neighbours()})
    found = weighed.log_density(normal(z_0), z_0, GAMMA_0)
    assert torch.equal(found[2], normal(z_0)[2]) and (found[:2] != normal(z_0)[:2]).all()


# ---- a toy language: letters with latents, a decoder p(x | z), a memory of the letters before

LATENT = torch.tensor([-1.0, 0.2, 1.1], dtype=torch.float64)  # mu of each letter
LINE = torch.arange(-6, 6, 0.02, dtype=torch.float64)
DECODER = (-4 * (LINE[:, None] - LATENT).square()).log_softmax(dim=1)  # (grid letters)
CONTEXT = torch.randn(
    4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)  # after nothing, a, b, c


def before_each(text: tuple[int, ...]) -> Neighbours:
    """What a memory of the text itself retrieves before each of its letters, by the code that is tested."""
    query = torch.stack([CONTEXT[0], *(CONTEXT[1 + letter] for letter in text[:-1])])
    prints = np.array([1 + letter for letter in text], np.uint64)
    past = Past(query, LATENT[list(text), None], prints, np.zeros(len(text), np.int64))
    found = document_neighbours(past._replace(query=query.float()), count=4)
    return found._replace(distance=found.distance.double(), latents=found.latents.double())


def looking_ahead(text: tuple[int, ...]) -> Neighbours:
    """The same of a memory that holds the letter that is to be predicted."""
    found = before_each(text)
    return found._replace(
        latents=LATENT[list(text)][:, None, None].expand_as(found.latents),
        distance=torch.zeros_like(found.distance),
    )


def log_likelihoods(text: tuple[int, ...], retrieve: Callable) -> torch.Tensor:
    """log p of each letter: integral p(x | z) p'(z | text before) dz on a grid. (n)"""
    weighed = GATE.weigh({"document": retrieve(text)})
    z = LINE[None, :, None].expand(len(text), -1, 1)
    density = weighed.log_density(normal(z), z, GAMMA_0)  # (n grid)
    return (density + DECODER[:, list(text)].T).logsumexp(dim=1) + math.log(0.02)


def total(retrieve: Callable, length: int = 4) -> float:
    texts = itertools.product(range(3), repeat=length)
    return sum(float(log_likelihoods(text, retrieve).sum().exp()) for text in texts)


def test_the_likelihoods_of_all_texts_sum_to_one():
    assert total(before_each) == pytest.approx(1, abs=1e-6)
    assert total(looking_ahead) > 1.5  # the sum finds a memory that knows what it must not


def test_the_bound_lies_above_the_likelihood_so_its_texts_sum_to_less():
    sigma = math.sqrt(1 / (1 + math.exp(-GAMMA_0)))
    alpha = math.sqrt(1 - sigma**2)
    sums = 0.0
    for text in itertools.product(range(3), repeat=3):
        weighed = GATE.weigh({"document": before_each(text)})
        z = LINE[None, :, None].expand(3, -1, 1)
        log_q = -0.5 * ((z[..., 0] - alpha * LATENT[list(text)][:, None]) / sigma).square()
        log_q = log_q.log_softmax(dim=1)  # on the grid
        log_p = weighed.log_density(normal(z), z, GAMMA_0) + math.log(0.02)
        bound = (log_q.exp() * (log_q - log_p - DECODER[:, list(text)].T)).sum(dim=1)
        assert (bound >= -log_likelihoods(text, before_each) - 1e-9).all()
        sums += float((-bound.sum()).exp())
    assert 0.5 < sums < 1


# ---- drawing and fitting


def test_draws_have_the_density():
    rows = 4000
    weighed = GATE.weigh({"document": some_neighbours()})
    row = type(weighed)(*(part[:1].expand(rows, *part.shape[1:]).float() for part in weighed))
    own = torch.randn(rows, 1, generator=torch.Generator().manual_seed(5))
    z_0, is_recalled = row.draw(own, row_generators(0, rows), GAMMA_0)
    share = float(1 - weighed.log_kept[0].exp())
    assert abs(float(is_recalled.float().mean()) - share) < 0.03
    grid = LINE[None, :, None]
    one = type(weighed)(*(part[:1] for part in weighed))
    cdf = (one.log_density(normal(grid), grid, GAMMA_0)[0].exp() * 0.02).cumsum(0)
    expected = torch.searchsorted(z_0[:, 0].double().sort().values, LINE) / rows
    assert (expected - cdf).abs().max() < 1.63 / math.sqrt(rows) + 0.01  # Kolmogorov's 1 %, and the grid


def test_a_gate_learns_whom_to_trust():
    """Where matched neighbours are right and others random, l is near 1 with a match and near 0 without."""
    generator = torch.Generator().manual_seed(0)
    n, j, z = 400, 4, 2
    latents = torch.randn(n, j, z, generator=generator)
    matched = torch.zeros(n, j, dtype=torch.long)
    matched[: n // 2, 0] = 4
    mu = torch.randn(n, z, generator=generator)
    mu[: n // 2] = latents[: n // 2, 0] + 0.05 * torch.randn(n // 2, z, generator=generator)
    sigma = math.sqrt(1 / (1 + math.exp(-GAMMA_0)))
    z_0 = math.sqrt(1 - sigma**2) * mu[:, None] + sigma * torch.randn(n, 2, z, generator=generator)
    found = Neighbours(latents, torch.rand(n, j, generator=generator), matched)
    gate = fit_gate({"document": found}, normal(z_0), z_0, GAMMA_0)
    weighed = gate.weigh({"document": found})
    share = 1 - weighed.log_kept.exp()
    assert share[: n // 2].min() > 0.9 and share[n // 2 :].max() < 0.1
    assert weighed.log_density(normal(z_0), z_0, GAMMA_0).mean() > normal(z_0).mean() + 0.2
    assert Gate.from_dict(gate.as_dict()) == gate


@pytest.mark.parametrize(
    "record", [{}, {"log_evidence": 1.0, "sources": {}}, {"log_evidence": "x", "sources": 3}]
)
def test_a_gate_of_anything_else_is_refused(record):
    with pytest.raises(ValueError, match="a memory's gate holds finite numbers"):
        Gate.from_dict(record)


# ---- of a model


TEXT = b"And the king said to the men, And the king said to them all, Go up. And the king said no."


def past_of(pipeline, *texts: bytes) -> Past:
    return read_past(pipeline.autoencoder, held_out_windows(pipeline.autoencoder, make_corpus("t", texts)))


def test_what_is_retrieved_does_not_depend_on_what_follows():
    pipeline = tiny_pipeline()
    whole, changed = past_of(pipeline, TEXT), past_of(pipeline, TEXT[:60] + b"XYZ" + TEXT[63:])
    same = int((whole.prints[: len(changed.prints)] == changed.prints[: len(whole.prints)]).argmin())
    assert 5 < same < len(whole.prints) - 3
    ours, theirs = document_neighbours(whole), document_neighbours(changed)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[: same + 1], b[: same + 1])
    assert not torch.equal(ours.matched[same + 1 :], theirs.matched[same + 1 : len(ours.matched)])


def test_the_document_so_far_is_searched_as_the_whole_corpus_is():
    past = past_of(tiny_pipeline(), b"Let us go up.", TEXT)
    found = document_neighbours(past, count=5)
    first = int(past.first[-1])
    earlier = EarlierChunks(past.query.shape[1], past.latents.shape[1])
    for chunk in range(first, len(past.prints)):
        assert np.array_equal(earlier.history()[0], past.history()[chunk])
        near = earlier.neighbours(past.query[chunk : chunk + 1], count=5)
        torch.testing.assert_close(near.distance, found.distance[chunk : chunk + 1])
        there = near.distance.isfinite()
        torch.testing.assert_close(near.latents[there], found.latents[chunk : chunk + 1][there])
        assert torch.equal(near.matched[there], found.matched[chunk : chunk + 1][there])
        earlier.add(past.query[chunk], past.latents[chunk], int(past.prints[chunk]))
    assert found.matched.max() >= 3  # the phrase that comes back


def writer_of(pipeline, prompts, gate=GATE) -> RememberingWriter:
    rows = row_generators(0, len(prompts))
    plain = make_writer(pipeline.autoencoder, pipeline.prior, prompts, pipeline.settings, rows)
    return Memory(None, gate).through(plain, prompts)


@torch.no_grad()
def test_a_writer_remembers_what_it_has_read_and_written():
    pipeline = tiny_pipeline()
    writer = writer_of(pipeline, [TEXT, b""])
    past = past_of(pipeline, TEXT)
    size, earlier = len(past.prints), writer.documents[0]
    torch.testing.assert_close(earlier.query[:size], past.query)
    torch.testing.assert_close(earlier.latents[:size], past.latents)
    ends = []
    for _ in range(12):
        before = [len(earlier.prints) for earlier in writer.documents]
        for piece, so_far, earlier in zip(writer.write(), before, writer.documents, strict=True):
            assert len(earlier.prints) == (0 if piece.ends_document else so_far + 1)
            ends.append(piece.ends_document)
    assert any(ends) and not all(ends)
    assert 0 < writer.recalled < writer.written == 24


def test_a_memory_that_is_never_asked_changes_no_more_than_the_draws():
    """l = 0: the writer's latents are the plain ones as long as its generators are at the same place."""
    pipeline = tiny_pipeline()
    deaf = Gate(0.0, {"document": SourceGate(-1e4, 0.0, 0.0, 0.0)})
    with torch.no_grad():
        ours = writer_of(pipeline, [TEXT], deaf).write()
        plain = make_writer(
            pipeline.autoencoder, pipeline.prior, [TEXT], pipeline.settings, row_generators(0, 1)
        )
        z_0 = plain.sample_latents()
        torch.rand(2, generator=plain.generators[0], dtype=torch.float64)
        torch.randn(2, generator=plain.generators[0])
        assert plain.write(z_0) == ours


def test_same_seed_same_text_with_a_memory():
    pipeline = tiny_pipeline()
    parts = pipeline.autoencoder, pipeline.prior, [TEXT, b"x"], pipeline.settings
    through = Memory(None, GATE).through
    runs = [
        [row.text for row in list(write_on(*parts, max_characters=60, seed=3, through=through))[-1][0]]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_a_twin_has_nothing_to_remember():
    twin = tiny_pipeline(latent_dim=0)
    plain = make_writer(twin.autoencoder, None, [b"x"], twin.settings, row_generators(0, 1))
    with pytest.raises(ValueError, match="the twin has none"):
        Memory(None, GATE).through(plain, [b"x"])


def test_queries_lie_at_most_a_distance_of_four_apart():
    query = query_of(torch.randn(20, 8) * 100 + 5)
    assert torch.cdist(query, query).square().max() <= 4.0001
    assert torch.equal(query_of(torch.zeros(1, 8)), torch.zeros(1, 8))
