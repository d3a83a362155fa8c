"""The scan in Triton, without a GPU: run in Triton's interpreter, compiled for CUDA, done without where it fails."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hldm.kernels import scan
from hldm.model import ops

by_loop = inspect.unwrap(ops.scan)
ROOT = Path(__file__).resolve().parent.parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)

# Triton reads the variable when it is imported, so each way has a process of its own.
IN_TORCH_COMPILE = """
import torch
from tests.kernels.test_scan import linear_scan_by

def work(a, x):
    h, last = linear_scan_by("triton", a.sigmoid(), x)
    return h.sin().sum() + last.sum()

inputs = [torch.linspace(-1, 1, 2 * 5 * 3).view(2, 5, 3).requires_grad_() for _ in range(2)]
compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, work))
torch.testing.assert_close(found, expected)

from hldm.kernels import triton_scan
a, h0 = torch.rand(2, 5, 3), torch.rand(2, 3)
for operator, arguments in ((triton_scan.scan, (a, a, h0)), (triton_scan.scan_back, (a, h0, a, a, h0))):
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hldm.kernels.triton_scan import OPTIONS, backward_kernel, forward_kernel

for kernel in (forward_kernel, backward_kernel):
    for dtype in ("fp32", "fp64"):
        for capability in (80, 90):
            types = {name: "i32" if name in ("lanes", "t", "d") else f"*{dtype}" for name in kernel.arg_names}
            target = GPUTarget("cuda", capability, 32)
            made = triton.compile(ASTSource(kernel, types), target=target, options=OPTIONS)
            assert made.asm["cubin"] and "cp.async" in made.asm["ptx"], (kernel, dtype, capability)
            print(dtype, capability, made.metadata.shared)
"""


def run(*arguments: str, **variables: str) -> str:
    """What Python says, with warnings as errors, in an environment of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@needs_triton
def test_in_the_interpreter_it_passes_the_tests_of_every_backend():
    # half a millisecond a step: not the long ones, nor the gradients by finite differences of 37
    chosen = "triton and not 523 and not 128 and not 37"
    told = run("-m", "pytest", "-q", "-k", chosen, "tests/kernels/test_scan.py", TRITON_INTERPRET="1")
    assert " passed" in told and "skipped" not in told


@needs_triton
def test_torch_compile_sees_through_its_operators():
    run("-c", IN_TORCH_COMPILE, TRITON_INTERPRET="1")


@needs_triton
def test_it_compiles_for_cuda_and_loads_ahead_of_the_recurrence(tmp_path):
    run("-W", "error", "-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))


@pytest.fixture
def interpreted(monkeypatch):
    """As with TRITON_INTERPRET=1, and with nothing remembered before or after."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    scan._triton_agrees.cache_clear()
    yield
    scan._triton_agrees.cache_clear()


def test_without_triton_all_goes_on_in_torch(interpreted, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "hldm.kernels.triton_scan", None
    )  # what an import finds of a missing package
    x = torch.ones(1, 9, 2)
    assert not scan.runs_in_triton(x)
    h, _ = scan.scan(x / 2, x, torch.zeros(1, 2))
    torch.testing.assert_close(h[0, :, 0], 2 - 0.5 ** torch.arange(9))


def fails(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("PassManager::run failed")


def errs(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    h, last = by_loop(a, b, h0)
    return h + 1e-3 * a.detach(), last


@pytest.mark.parametrize(("work", "can"), [(fails, False), (errs, False), (by_loop, True)])
def test_a_kernel_that_fails_or_errs_on_this_machine_is_not_used(interpreted, monkeypatch, work, can):
    kernels = SimpleNamespace(OnePassScan=SimpleNamespace(apply=work))
    monkeypatch.setitem(sys.modules, "hldm.kernels.triton_scan", kernels)
    with torch.inference_mode():
        assert scan.runs_in_triton(torch.ones(1)) is can
