"""Workflows, image and hooks ask for what is there: make targets, files, the commands of `make lint`."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w./-]+):(?!=)", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def steps_of(path) -> list[str]:
    """What the jobs of a workflow run, as shell."""
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_makes_targets_that_are_there(path):
    made = [target for step in steps_of(path) for target in re.findall(r"\bmake ([\w./-]+)", step)]
    assert made and set(made) <= TARGETS
    if linter := shutil.which("actionlint"):
        subprocess.run([linter, str(path)], check=True)


def test_the_tests_run_on_every_python_and_system_that_is_promised():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    [least] = re.findall(r'requires-python = ">=([\d.]+)"', pyproject)
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"] and matrix["python"][0] == least
    assert {"macos-latest"} == {case["os"] for case in matrix["include"]}
    assert jobs["wheel"]["strategy"]["matrix"]["kernels"] == ["1", "0"]
    assert {"lint", "test", "wheel", "docs", "image"} == jobs.keys()


def test_the_image_is_made_by_the_makefile_of_files_that_it_may_have():
    made = re.findall(r"(?:&&|RUN)[^&\n]*\bmake ([\w./-]+)$", DOCKERFILE, re.MULTILINE)
    assert made == [".venv/installed"] and set(made) <= TARGETS
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    copied = [w for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for w in line.split()[:-1]]
    assert set(copied) == set(allowed) and all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER hldm$", DOCKERFILE, re.MULTILINE)  # nobody's root
    for word in ("Makefile", "pyproject.toml", "constraints.txt", "hldm"):  # what the target needs
        assert any(fnmatch.fnmatch(word, name) for name in copied)


def test_hooks_before_a_commit_run_what_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    lint = re.findall(
        r"^\t\$\(BIN\)/(.+)$", MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0], re.MULTILINE
    )
    found = [hook["entry"].removeprefix(".venv/bin/") for hook in hooks]
    assert [words.split()[:2] for words in found] == [["ruff", "check"], ["ruff", "format"], ["mypy"]]
    assert [words.split()[0] for words in lint] == [words.split()[0] for words in found]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_for_something(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem != "config":
        assert form["name"] and form["description"]
        kinds = {"textarea", "input", "dropdown", "checkboxes", "markdown"}
        assert {field["type"] for field in form["body"]} <= kinds
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids) and any(
            f.get("validations", {}).get("required") for f in form["body"]
        )
