"""One latent of a chunk's bytes: the same for a window and for a chunk as it is written, and on a normal scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hldm.model.readouts import LatentNormaliser, MeanReadout, StridedReadout, pool_by_chunk
from hldm.text.windows import Window, window_of
from tests.text.test_windows import random_window

PLACES = 4


def window_with(lengths: list[list[int]], t: int) -> Window:
    """Rows with chunks of these lengths."""
    starts = []
    for sizes in lengths:
        starts.append(np.zeros(sum(sizes), bool))
        starts[-1][np.cumsum([0, *sizes[:-1]])] = True
    return window_of([bytes(len(start)) for start in starts], starts, [False] * len(starts), width=t)


def read(readout: MeanReadout | StridedReadout, y: Tensor, lengths: list[list[int]]) -> Tensor:
    return readout.of_chunks(y, window_with(lengths, y.shape[1]))


def convolved(readout: StridedReadout, y: Tensor) -> Tensor:
    """conv1d with the readout's matrices as its kernel. (b t d) -> (b n z)."""
    kernel = readout.kernel.weight.unflatten(1, (PLACES, -1)).mT  # (z d k)
    return F.conv1d(y.mT, kernel, readout.kernel.bias, stride=PLACES).mT


def test_a_strided_readout_is_a_convolution_with_that_stride():
    torch.manual_seed(0)
    readout, y = StridedReadout(5, 3, PLACES).double(), torch.randn(2, 12, 5).double()
    torch.testing.assert_close(read(readout, y, [[4, 4, 4]] * 2), convolved(readout, y))


def test_a_short_chunk_is_one_with_zeros_after_it():
    torch.manual_seed(0)
    readout, y = StridedReadout(5, 3, PLACES).double(), torch.randn(2, 12, 5).double()
    found = read(readout, y, [[4, 3, 4], [4, 2]])  # a character was not to be split; a document ends
    whole = torch.zeros(2, 12, 5).double()
    whole[0, :7], whole[0, 8:] = y[0, :7], y[0, 7:11]
    whole[1, :6] = y[1, :6]
    expected = convolved(readout, whole)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :2], expected[1, :2])


@pytest.mark.parametrize("kind", [MeanReadout, StridedReadout])
def test_a_chunk_as_it_is_written_is_read_as_in_a_window(kind):
    torch.manual_seed(0)
    readout, y = kind(5, 3, PLACES), torch.randn(3, PLACES, 5)
    lengths = [1, 3, 4]
    found = readout.of_chunk(y, torch.tensor(lengths))  # whatever lies beyond their ends
    torch.testing.assert_close(found, read(readout, y, [[length] for length in lengths]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_pooling_is_the_mean_of_each_chunk_and_its_gradient(seed):
    window = random_window(b=4, t=13, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 13, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    pooled = pool_by_chunk(x, window)  # (b n d)
    expected = torch.zeros_like(pooled)
    for row in range(4):
        starts = window.chunk_start[row].nonzero()[:, 0].tolist()
        for n, (begin, end) in enumerate(zip(starts, [*starts, int(window.length[row])][1:], strict=True)):
            expected[row, n] = x[row, begin:end].mean(dim=0)
    torch.testing.assert_close(pooled, expected)

    weight = torch.randn(pooled.shape, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad((pooled * weight).sum(), x, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(gradient, expected_gradient)


def test_pooling_keeps_to_the_number_of_chunks_and_the_type():
    window = replace(random_window(b=3, t=11, seed=0), chunks=20)
    wide = pool_by_chunk(torch.ones(3, 11, 2, dtype=torch.bfloat16), window)
    assert wide.shape == (3, 20, 2) and wide.dtype == torch.bfloat16
    assert (wide.sum(dim=(1, 2)) == 2 * window.count).all()  # ones where there is a chunk, zeros elsewhere
    with pytest.raises(ValueError, match="share b and t"):
        pool_by_chunk(torch.zeros(3, 10, 2), window)


def test_the_normaliser_measures_what_it_saw_however_it_was_split():
    raw = 3 + 2 * torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    one, two = LatentNormaliser(5), LatentNormaliser(5)
    one.observe(raw)
    for part in raw.split(300):
        two.observe(part)
    for normaliser in (one, two):
        normaliser.update()
        standardised = normaliser(raw)
        torch.testing.assert_close(standardised.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(standardised.std(0, correction=0), torch.ones(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("pull", [-1.0, 1.0])
def test_raw_latents_stay_at_unit_scale_whichever_way_the_loss_pulls_it(pull):
    generator = torch.Generator().manual_seed(0)
    deviation = {}
    for held in (False, True):
        normaliser = LatentNormaliser(2)
        log_scale, shift = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([log_scale, shift], lr=0.02)
        for _ in range(300):
            raw = log_scale.exp() * torch.randn(64, 2, generator=generator) + shift
            normaliser.observe(raw)
            mu = normaliser(raw)
            loss = pull * 0.3 * mu.square().sum(dim=-1).mean()  # of mu alone, whose scale is always 1
            if held:
                loss = loss + normaliser.hold(mu).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            normaliser.update()
        deviation[held] = normaliser.deviation.log().abs().max()
    assert deviation[False] > 2 > 1 > deviation[True]
