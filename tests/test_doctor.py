"""The doctor's report: one line a fact, and exit code 1 for what training cannot do without."""

from __future__ import annotations

import importlib.metadata

import pytest

from hldm import doctor


@pytest.fixture(autouse=True)
def hub_out_of_reach(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once


def installed(monkeypatch, *requirements: str) -> None:
    """Make hldm's metadata ask for these."""
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requirements))
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1.0" if name == "hldm" else version(name)
    )


def test_a_machine_without_a_network_is_in_good_health(monkeypatch, capsys):
    installed(monkeypatch, "torch>=2.10", "ruff>=9999; extra == 'dev'")
    assert doctor.doctor() == 0
    report = capsys.readouterr().out
    assert f"ok    torch {importlib.metadata.version('torch')}" in report
    assert "ok    C++ kernels: " in report
    assert "cannot be reached" in report and "verses of the Bible" in report and "ruff" not in report
    assert report.endswith("0 faults found\n")


@pytest.mark.parametrize(
    ("requirement", "line"),
    [
        ("no-such-package>=1", "FAULT no-such-package is missing: pip install 'no-such-package>=1'"),
        ("numpy>=9999", "pip install 'numpy>=9999'"),
    ],
)
def test_a_package_missing_or_too_old_is_a_fault(monkeypatch, capsys, requirement, line):
    installed(monkeypatch, requirement)
    assert doctor.doctor() == 1
    report = capsys.readouterr().out
    assert line in report and report.endswith("1 fault found\n")


def test_a_check_that_cannot_be_imported_is_a_fault_and_the_others_still_run(monkeypatch, capsys):
    def check_machine():
        raise ImportError("libtorch.so:\nno such file")
        yield

    installed(monkeypatch)
    monkeypatch.setattr(doctor, "check_machine", check_machine)
    assert doctor.doctor() == 1
    report = capsys.readouterr().out
    assert "FAULT check_machine could not run: libtorch.so: no such file\n" in report and "verses" in report
