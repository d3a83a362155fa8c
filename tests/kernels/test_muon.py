"""Muon in batches is torch's Muon: weights, states, matrices of every shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hldm.kernels import muon

SHAPES = [(32, 32), (64, 32), (32, 64), (32, 32), (48, 160), (64, 32), (160, 48), (32, 32)]


def train(kind: type[torch.optim.Muon], steps: int, **options) -> list[torch.Tensor]:
    """Weights and momenta after some steps on noisy gradients; the third matrix gets none of them."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = kind(weights, lr=0.05, **options)
    for _ in range(steps):
        for place, weight in enumerate(weights):
            noise = torch.randn(weight.shape, generator=generator)
            weight.grad = None if place == 2 else weight.detach() + 0.1 * noise
        optimizer.step()
    momenta = [optimizer.state[weight]["momentum_buffer"] for weight in weights if weight.grad is not None]
    return [weight.detach() for weight in weights] + momenta


# bfloat16, which torch's runs in, has 8 binary digits, of updates about 0.05 large
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 5e-4), (torch.float32, 2e-3)])
@pytest.mark.parametrize("at_once", [muon.NUMBERS_AT_ONCE, 2 * 32 * 32])
@pytest.mark.parametrize(
    "options",
    [
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1},
        {"adjust_lr_fn": "original", "weight_decay": 0.0, "nesterov": False},
        {"ns_steps": 3, "momentum": 0.5},
    ],
)
def test_a_step_is_that_of_torch(monkeypatch, dtype, atol, at_once, options):
    monkeypatch.setattr(muon, "NUMBERS_AT_ONCE", at_once)
    monkeypatch.setattr(muon, "dtype_on", lambda device: dtype)
    ours, torchs = train(muon.Muon, 3, **options), train(torch.optim.Muon, 3, **options)
    for found, wanted in zip(ours, torchs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cpu", "AVX2", torch.float32),
        ("cpu", "DEFAULT", torch.float32),
        ("cpu", "AVX512", torch.bfloat16),
        ("cuda", "AVX2", torch.bfloat16),
    ],
)
def test_no_cpu_emulates_bfloat16(monkeypatch, device, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert muon.dtype_on(torch.device(device)) == dtype


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_step_runs_in_what_the_cpu_multiplies(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = []
    orthogonalise = muon.orthogonalise
    monkeypatch.setattr(
        muon, "orthogonalise", lambda x, *rest: found.append(x.dtype) or orthogonalise(x, *rest)
    )
    train(muon.Muon, 1)
    assert set(found) == {muon.dtype_on(torch.device("cpu"))}


def test_the_singular_values_come_near_one():
    x = torch.randn(3, 40, 100, generator=torch.Generator().manual_seed(0))
    options = torch.optim.Muon([nn.Parameter(x[0])]).defaults
    coefficients = options["ns_coefficients"]
    for shaped in (x, x.mT.contiguous()):
        values = torch.linalg.svdvals(muon.orthogonalise(shaped, coefficients, options["ns_steps"], 1e-7))
        assert values.min() > 0.6 and values.max() < 1.3


def test_states_are_those_of_torch():
    weight = nn.Parameter(torch.randn(32, 32))
    ours, torchs = muon.Muon([weight]), torch.optim.Muon([weight])
    weight.grad = torch.randn(32, 32)
    torchs.step()
    ours.load_state_dict(torchs.state_dict())
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    torch.testing.assert_close(
        ours.state[weight]["momentum_buffer"], torchs.state[weight]["momentum_buffer"], rtol=0, atol=0
    )
    ours.step()
