"""The door to speed: which form runs, and what becomes of a package that is missing or broken."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from conftest import plain_only
from torch import Tensor

from hldm.model import speed
from hldm.model.speed import fastest, has_faster_form


@has_faster_form
def double(x: Tensor) -> Tensor:
    return 2 * x


def double_faster(x: Tensor) -> Tensor:
    return NotImplemented if len(x) > 1 else x + x + 0.5  # to be told apart


@has_faster_form
def triple(x: Tensor) -> Tensor:
    return 3 * x


@pytest.fixture
def table(monkeypatch):
    """A table of faster forms in place of the real one."""
    forms = ModuleType("forms")
    forms.current = lambda: {double: double_faster, dict: type("FasterDict", (dict,), {})}
    monkeypatch.setattr(speed, "_FORMS", {})
    monkeypatch.setitem(sys.modules, "hldm.kernels.forms", forms)
    speed._fill.cache_clear()
    yield
    speed._fill.cache_clear()


def test_the_faster_form_runs_unless_it_declines(table):
    assert double(torch.ones(1)).item() == 2.5
    assert double(x=torch.ones(2)).tolist() == [2, 2]  # declined
    assert triple(torch.ones(1)).item() == 3  # no such form
    assert fastest(dict).__name__ == "FasterDict" and fastest(list) is list
    with plain_only():
        assert double(torch.ones(1)).item() == 2
        assert fastest(dict) is dict


def test_torch_compile_sees_through_it(table):
    compiled = torch.compile(lambda x: triple(double(x)), backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 7.5
    assert compiled(torch.ones(2)).tolist() == [6, 6]
    with plain_only():
        assert compiled(torch.ones(1)).item() == 6


def test_without_the_package_the_plain_formula_runs(table, monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    assert double(torch.ones(1)).item() == 2 and fastest(dict) is dict


def test_an_error_within_the_package_is_not_hidden(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "hldm.kernels.forms", None)
    with pytest.raises(ImportError, match="hldm.kernels.forms"):
        double(torch.ones(1))
