"""The cache over the pyramid: a density, causal, the same in pieces, and worth something where text repeats itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hldm import cli
from hldm.config import HierarchyConfig
from hldm.evaluation.worth import Clusters
from hldm.studies.far_cache import CHUNKS, NEAREST, Chunks, PyramidCache, fit, gains

SHAPE = HierarchyConfig(levels=2, ratio=2, window=3)
WIDTH, COMPONENTS = 6, 5


def chunks_of(n: int, seed: int = 0, period: int = 0) -> Chunks:
    """Made-up chunks; with a period their keys and shares come again after so many."""
    g = torch.Generator().manual_seed(seed)
    size = period or n
    key = torch.randn(1, size, WIDTH, generator=g)
    which = torch.randint(COMPONENTS, (1, size), generator=g)
    key, which = (x.repeat(1, -(-n // size), *[1] * (x.ndim - 2))[:, :n] for x in (key, which))
    shares = torch.nn.functional.one_hot(which, COMPONENTS).float()
    component = 4 * shares - 4  # z_0 is likely under its own component
    log_p = component.logsumexp(dim=-1) - np.log(COMPONENTS)
    opens = torch.zeros(1, n, dtype=torch.bool)
    opens[:, 0] = True
    return Chunks(key, shares, log_p, component, opens, Clusters(np.arange(n) // 20, np.full(n // 20, 120)))


def loosened(cache: PyramidCache) -> PyramidCache:
    """All its numbers at random."""
    for parameter in cache.parameters():
        torch.nn.init.normal_(parameter)
    return cache


def test_weights_of_mixture_and_cache_together_sum_to_one():
    chunks = chunks_of(60)
    # where every component is as likely the density is the sum of the weights
    flat = chunks._replace(log_p=torch.zeros(1, 60), log_component=torch.zeros(1, 60, COMPONENTS))
    gain = gains(loosened(PyramidCache(WIDTH, SHAPE)), flat)
    np.testing.assert_allclose(gain, 0, atol=1e-5)


def test_pieces_give_what_the_whole_gives_and_documents_know_nothing_of_each_other():
    torch.manual_seed(0)
    cache, n = loosened(PyramidCache(WIDTH, SHAPE)), CHUNKS + 70
    chunks = chunks_of(n)
    chunks.opens[0, 150] = True
    in_pieces = gains(cache, chunks)
    whole, _ = cache(chunks, slice(0, n), cache.initial_state(chunks))
    np.testing.assert_allclose(in_pieces, whole[0].detach().numpy(), atol=1e-4)
    last = Chunks(*(part[:, 150:] for part in chunks[:-1]), chunks.clusters)
    np.testing.assert_allclose(gains(cache, last), in_pieces[150:], atol=1e-4)


def test_a_chunk_is_no_news_before_it_is_written():
    torch.manual_seed(0)
    cache, chunks = loosened(PyramidCache(WIDTH, SHAPE)), chunks_of(60)
    changed = chunks._replace(shares=chunks.shares.clone())
    changed.shares[0, 40] = changed.shares[0, 40].roll(1)
    differs = np.abs(gains(cache, changed) - gains(cache, chunks)) > 1e-6
    assert not differs[:41].any() and differs[41]


@pytest.mark.parametrize("blocks", [0, 2])
def test_what_comes_again_is_found_also_where_means_choose_what_is_read(blocks):
    torch.manual_seed(0)
    chunks = chunks_of(300, period=30)
    cache = PyramidCache(WIDTH, HierarchyConfig(levels=0, ratio=2, window=64), blocks)
    fit(cache, chunks)
    near = gains(cache, chunks, lambda level, away: away >= NEAREST)  # nothing has come again yet
    assert gains(cache, chunks)[60:].mean() > near[60:].mean() + 0.3


def test_means_of_a_level_can_be_hidden():
    torch.manual_seed(0)
    cache, chunks = loosened(PyramidCache(WIDTH, SHAPE)), chunks_of(60)
    shown = gains(cache, chunks)
    hidden = gains(cache, chunks, lambda level, away: (level == 2).expand_as(away))
    first = SHAPE.window * 3  # before any chunk is that far away
    assert np.allclose(hidden[:first], shown[:first]) and not np.allclose(hidden[30:], shown[30:])


def test_the_command_prints_and_saves(trained_run, tmp_path, capsys):
    path = tmp_path / "far.json"
    assert cli.main(["far", "--run", str(trained_run), "--levels", "1", "--json", str(path)]) == 0
    assert "level 1, means of 8 chunks" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert set(found["worth"]) == {"cache", "level-1", "levels"} and found["chunks"] > 100


def test_documents_of_a_text_of_ones_own_are_what_they_are(trained_run, refused):
    assert "text of its own" in refused(cli.main(["far", "--run", str(trained_run), "--documents", "books"]))


def test_blocks_are_of_single_chunks(trained_run, refused):
    assert "pass --levels 0" in refused(cli.main(["far", "--run", str(trained_run), "--blocks", "2"]))
