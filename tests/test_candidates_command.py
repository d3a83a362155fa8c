"""`hldm generate --candidates`: what it prints, and what it refuses, in one line with code 2."""

from __future__ import annotations

import json

import pytest

from hldm import cli


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(folder, *words):
    return cli.main(["generate", "--run", str(folder), "--prompt", "And", "--max-characters", "12", *words])


SEVERAL = ("--candidates", "3", "--depth", "2")


def test_the_tree_adds_up_to_the_text(saved_pipeline, capfdbinary):
    assert generate(saved_pipeline, *SEVERAL, "--rank", "bound", "--show-candidates", "--json") == 0
    record = json.loads(capfdbinary.readouterr().out)
    kept = [each["text"] for place in record["candidates"] for each in place["candidates"] if each["kept"]]
    assert "".join(kept).startswith(record["text"]) and record["text"]
    scores = [[each["score"] for each in place["candidates"]] for place in record["candidates"]]
    assert all(len(place) == 3 for place in scores)
    assert (
        generate(saved_pipeline, *SEVERAL, "--rank", "bound", "--show-candidates", "--num-samples", "2") == 0
    )
    shown = capfdbinary.readouterr().out
    assert shown.count(b"after 0 characters") == 2 and b"discarded" in shown


def test_without_candidates_nothing_changes(saved_pipeline, capfdbinary):
    assert generate(saved_pipeline) == 0
    plain = capfdbinary.readouterr().out
    assert generate(saved_pipeline, "--candidates", "1", "--show-candidates") == 0
    assert capfdbinary.readouterr().out == plain


def test_a_function_of_ones_own_ranks_where_its_code_may_run(saved_pipeline, tmp_path, capfd):
    (tmp_path / "own_rank.py").write_text(
        "def shortest(stubs):\n    return [-len(stub.text) for stub in stubs]\n"
        "def broken(stubs):\n    return 1 / 0\n"
    )
    own = [*SEVERAL, "--rank", "own_rank:shortest"]
    assert generate(saved_pipeline, *own) == 2
    assert "own_rank:shortest, which is not run unasked" in capfd.readouterr().err
    assert generate(saved_pipeline, *own, "--allow-code", "--show-candidates") == 0
    capfd.readouterr()
    for name, said in (("broken", "ZeroDivisionError"), ("missing", "has no function missing")):
        assert generate(saved_pipeline, *SEVERAL, "--rank", f"own_rank:{name}", "--allow-code") == 2
        error = capfd.readouterr().err
        assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--candidates", "10000"], "candidates must lie in 1..512: each holds a state of its own in memory"),
        (["--candidates", "2", "--keep", "3"], "keep must be at most candidates"),
        (["--candidates", "2", "--depth", "0"], "depth must lie in 1..1000"),
        (["--candidates", "2", "--rank", "best"], "rank must be moments, bound, mbr, agreement, pairwise"),
        (["--candidates", "2", "--memory", "document"], "--memory writes one candidate at a place"),
        (["--candidates", "2", "--draft", "a"], "--draft does not go with --candidates or --memory"),
        (["--draft", "a", "--memory", "document"], "--draft does not go with --candidates or --memory"),
    ],
)
def test_what_cannot_be_is_refused(saved_pipeline, capfd, words, said):
    assert generate(saved_pipeline, *words) == 2
    error = capfd.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_moments_are_refused_for_the_twin(capfd):
    words = ["--run", "small-twin", "--prompt", "And", "--candidates", "2", "--rank", "moments"]
    assert cli.main(["generate", *words]) == 2
    assert "a twin, which has no latents" in capfd.readouterr().err
