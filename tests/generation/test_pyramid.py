"""The index over a document's chunks: what it finds, what it costs, and that writing and reading search alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hldm.generation.pyramid import NEAREST, NONE, Growing, Index, pooled, search
from hldm.generation.remembering import EarlierChunks, Past, compared_with, document_neighbours

SMALL = Index(ratio=2, levels=3, beam=2)


def keys_of(n: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def past_of(documents: list[int]) -> Past:
    n = sum(documents)
    document = np.repeat(np.arange(len(documents)), documents)
    return Past(keys_of(n) / 8**0.5, keys_of(n, 3, seed=1), np.arange(1, n + 1, dtype=np.uint64), document)


def test_a_mean_stands_for_whole_blocks_and_for_those_alone():
    keys = keys_of(13)
    levels = pooled(keys, SMALL)
    assert [len(level) for level in levels] == [13, 6, 3, 1]
    for mean, block in ((levels[2][1], keys[4:8]), (levels[3][0], keys[:8])):
        torch.testing.assert_close(mean, block.mean(dim=0) / block.mean(dim=0).norm())


def test_what_is_found_was_written_before_and_is_found_once():
    keys = keys_of(200)
    written = torch.arange(200)
    found = search(pooled(keys, SMALL), keys_of(200, seed=1), written, SMALL)
    for row, before in enumerate(written.tolist()):
        chunks = found.chunk[row][found.chunk[row] != NONE].tolist()
        assert len(set(chunks)) == len(chunks) and all(0 <= chunk < before for chunk in chunks)
        assert set(range(max(before - NEAREST, 0), before)) <= set(chunks)


def test_a_wide_beam_finds_every_chunk_and_none_the_nearest_alone():
    keys, written = keys_of(150), torch.tensor([0, 1, 77, 150])
    everything = search(pooled(keys, SMALL), keys_of(4), written, SMALL._replace(beam=10**6)).chunk
    assert [(row != NONE).sum().item() for row in everything] == written.tolist()
    nearest = search(pooled(keys, SMALL), keys_of(4), written, SMALL._replace(beam=0)).chunk
    assert [(row != NONE).sum().item() for row in nearest] == [0, 1, NEAREST, NEAREST]


def test_what_stands_alone_in_its_direction_is_found_however_far_back():
    keys = keys_of(5000, 64) / 8
    query = torch.nn.functional.one_hot(torch.tensor([0]), 64).float()
    keys[:, 0] = 0
    keys[123] = 8 * query
    found = search(pooled(keys, Index(8, 3, 4)), query, torch.tensor([5000]), Index(8, 3, 4))
    assert 123 in found.chunk
    assert found.compared < 200


def test_comparisons_hardly_grow_with_the_document():
    index = Index(ratio=8, levels=4, beam=16)
    near, far = (compared_with(past_of([n]), index) for n in (4_000, 32_000))
    assert far < 1.5 * near < 500  # all: eight times as many, 2,000 and 16,000


def test_a_document_that_grows_is_searched_as_one_that_is_there():
    keys, growing = keys_of(90), Growing(8, SMALL)
    for n in range(90):
        query = keys_of(1, seed=n)
        at_once = search(pooled(keys, SMALL), query, torch.tensor([n]), SMALL)
        step = growing.search(query)
        assert set(step.chunk[0].tolist()) - {NONE} == set(at_once.chunk[0].tolist()) - {NONE}
        assert step.compared == at_once.compared
        growing.add(keys[n])


@pytest.mark.parametrize("index", [None, SMALL, SMALL._replace(beam=0)])
def test_writing_remembers_what_reading_does_and_no_other_document(index):
    past = past_of([70, 45])
    read = document_neighbours(past, 10, index)
    for document, begin in ((0, 0), (1, 70)):
        earlier = EarlierChunks(8, 3, index)
        for chunk in np.flatnonzero(past.document == document):
            near = earlier.neighbours(past.query[chunk : chunk + 1], 10)
            torch.testing.assert_close(near.distance[0], read.distance[chunk], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(near.latents[0], read.latents[chunk])
            earlier.add(past.query[chunk], past.latents[chunk], int(past.prints[chunk]))
        assert begin == 0 or not read.distance[begin].isfinite().any()
