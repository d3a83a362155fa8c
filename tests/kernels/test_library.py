"""The library is built whole or not at all, by any number of processes, and its absence is no fault."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hldm.kernels import library as kernels
from hldm.kernels.scan import linear_scan_by
from hldm.model.ops import linear_scan

ASK = "from hldm.kernels import library as kernels; print(kernels.kernels())"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path, plain_torch):
    """A cache folder of one's own, and nothing remembered before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.kernels.cache_clear()
    yield
    kernels.kernels.cache_clear()


def test_two_processes_build_one_library_and_a_third_finds_it(tmp_path):
    asking = [subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE) for _ in range(2)]
    told = [process.communicate()[0].decode() for process in asking]
    (library,) = (tmp_path / "hldm").iterdir()  # and no scratch is left
    assert all(str(library) in answer for answer in told)
    before = library.stat().st_mtime_ns
    assert kernels.library() is not None
    assert library.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("HLDM_KERNELS", "0", "off"),
        ("CXX", "false", "none, torch"),
        ("CXX", "no-such-compiler", "none, torch"),
    ],
)
def test_without_kernels_all_goes_on_in_torch(monkeypatch, tmp_path, variable, value, told):
    monkeypatch.setenv(variable, value)
    assert kernels.library() is None and kernels.kernels().told.startswith(told)
    h, _ = linear_scan(torch.full((1, 9, 2), 0.5), torch.ones(1, 9, 2))
    torch.testing.assert_close(h[0, :, 0], 2 - 0.5 ** torch.arange(9))
    with pytest.raises(ValueError, match="needs a CPU and a C\\+\\+ compiler"):
        linear_scan_by("cpp", h, h)
    assert not list(tmp_path.rglob("*.so"))


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path):
    (tmp_path / "hldm").mkdir()
    (tmp_path / "hldm").chmod(0o777)
    assert kernels.library() is None and "no other's to write to" in kernels.kernels().told
