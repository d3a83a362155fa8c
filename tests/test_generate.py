"""generate.py: any bytes are a prompt, one seed writes one text, and what is wrong with a run is one line."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import truncate
from safetensors.torch import load_file, save_file
from tiny_model import tiny_pipeline

from hldm import cli
from hldm.commands import writing

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(trained_run, capsysbinary):
    """Run generate.py's main function on the trained run; returns what it wrote."""

    def run(*arguments: str) -> bytes:
        code = cli.generate(["--run", str(trained_run), "--max-chars", "20", *arguments])
        out, error = capsysbinary.readouterr()
        assert (code, error) == (0, b"")
        return out

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "nowhere", "--prompt", "a"], "nowhere is no folder here"),
        ([], "no prompt given: pass --prompt TEXT"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompt-file", "."], "Is a directory"),
        (["--prompt", "a", "--max-chars", "0"], "--max-characters"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples"),
        (["--prompt", "a", "--steps", "-1"], "generation.steps must be at least 0, got -1"),
        (["--prompt", "a", "--temperature", "-1"], "generation.temperature must be at least 0, got -1"),
        (["--prompt", "a", "--guidance", "nan"], "generation.guidance must be a finite number, got nan"),
        (["--prompt", "a", "--guidance", "inf"], "generation.guidance must be a finite number, got inf"),
        (["--prompt", "a", "--guidance", "1e20"], "generation.guidance must be at most 100, got 1e+20"),
        (["--prompt", "a", "--decoder-temperature", "1e-308"], "must be 0 or at least 1e-6, got 1e-308"),
        (["--prompt", "a", "--top-p", "0"], "generation.top_p must be greater than 0, got 0"),
        (["--prompt", "a", "--seed", str(2**32)], "--seed"),  # would be 0 to torch's generator
        (["--prompt", "a", "--seed", "-1"], "--seed"),
        (["--prompt", "a", "--stop", ""], "an empty stop string stands everywhere"),
    ],
)
def test_generation_refuses(arguments, says, trained_run, refused):
    assert says in refused(cli.generate(["--run", str(trained_run), *arguments]))


def test_generation_refuses_no_steps_of_a_prior_without_a_mixture(tmp_path, refused):
    tiny_pipeline(components=0).save_pretrained(tmp_path / "pipeline")
    arguments = ["--run", str(tmp_path), "--prompt", "a", "--steps", "0"]
    assert "this prior has no mixture to draw from" in refused(cli.generate(arguments))


def test_without_a_run_the_shipped_one_writes_if_there_is_one(trained_run, monkeypatch, capsysbinary):
    def nowhere(twin=False):
        raise FileNotFoundError("pretrained is not there: pass --run")

    monkeypatch.setattr(writing, "shipped_run", nowhere)
    assert cli.generate(["--prompt", "a"]) == 2
    assert b"pass --run" in capsysbinary.readouterr().err
    monkeypatch.setattr(writing, "shipped_run", lambda: trained_run)
    assert cli.generate(["--prompt", "a", "--max-chars", "5"]) == 0
    assert capsysbinary.readouterr().out.startswith(b"a")


def test_a_text_ends_before_the_first_stop_string(write):
    arguments = ("--prompt", "And", "--max-chars", "60", "--seed", "2")
    whole = write(*arguments)[3:-1]
    stop = os.fsdecode(whole[8:10])
    cut = whole[: whole.index(whole[8:10])]
    assert write(*arguments, "--stop", stop, "--stop", "nowhere") == b"And" + cut + b"\n"
    [record] = map(json.loads, write(*arguments, "--stop", stop, "--json").splitlines())
    assert record["text"] == cut.decode("utf-8", "replace") and not record["ended"]
    marked = write(*arguments, "--stop", stop, "--show-chunks")
    spans = record["chunk_spans"]
    assert marked == b"And" + b"".join(b"|" + cut[start:end] for start, end in spans) + b"\n"


@pytest.mark.parametrize("name", ["small", "small-twin"])
def test_a_model_that_comes_with_hldm_has_a_name(name, capsysbinary):
    words = ["--run", name, "--prompt", "And the king", "--max-chars", "9"]
    assert cli.generate(words) == 0
    assert len(capsysbinary.readouterr().out.decode()) == len("And the king") + 9 + 1


def test_a_name_that_only_a_hub_could_know_is_one_line_without_one(monkeypatch, refused):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(cli.generate(["--run", "nobody/nothing", "--prompt", "a"]))
    assert "nobody/nothing: no folder of that name here, no copy in the cache" in error
    assert "HF_HUB_OFFLINE asks no hub" in error


def test_generation_refuses_a_run_without_its_second_stage(run_copy, refused):
    shutil.rmtree(run_copy / "pipeline")
    assert "train_diffusion.py" in refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))


@pytest.mark.parametrize("part", ["autoencoder", "prior"])
def test_generation_refuses_damaged_weights(part, run_copy, refused):
    truncate(run_copy / "pipeline" / part / WEIGHTS)
    assert "cannot be loaded" in refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))


def test_generation_refuses_a_damaged_index(run_copy, refused):
    truncate(run_copy / "pipeline/model_index.json")
    assert "cannot be loaded" in refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))


def test_generation_refuses_a_prior_with_another_autoencoder(run_copy, refused):
    path = run_copy / "pipeline/autoencoder" / WEIGHTS
    weights = load_file(path)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
    error = refused(cli.generate(["--run", str(run_copy), "--prompt", "a"]))
    assert "trained on another autoencoder's latents" in error


def test_the_same_seed_writes_the_same_text(write):
    first = write("--prompt", "And the king said", "--seed", "3")
    assert first.startswith(b"And the king said") and first.endswith(b"\n")
    assert first == write("--prompt", "And the king said", "--seed", "3")
    assert first != write("--prompt", "And the king said", "--seed", "4")


def test_prompts_of_any_bytes_are_gone_on_from(write):
    out = write("--prompt", os.fsdecode(b"caf\xc3\xa9 \xff\x00\xfe"))
    assert out.startswith(b"caf\xc3\xa9 \xff\x00\xfe")


def test_an_empty_prompt_starts_a_document(write):
    assert len(write("--prompt", "")) > 1


def test_a_prompt_far_longer_than_any_context_is_read(write):
    text = ("In the beginning God made the heaven and the earth. " * 1000)[:50_000]
    Path("long.txt").write_text(text)
    assert write("--prompt-file", "long.txt").startswith(text.encode())


def test_a_prompt_is_read_from_standard_input(write, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"In the beginning\n"))))
    assert write("--prompt-file", "-") == write("--prompt", "In the beginning")


def test_json_is_one_object_a_continuation(write):
    lines = write("--prompt", "And", "--prompt", "caf\xe9", "--num-samples", "2", "--json").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == ["And", "And", "caf\xe9", "caf\xe9"]
    assert [record["seed"] for record in records] == [0, 1, 2, 3]
    for record in records:
        assert set(record) == {
            *("prompt", "text", "chunk_spans", "ended", "seed"),
            *("seconds", "characters_per_second", "denoising_calls"),
        }
        spans = record["chunk_spans"]
        assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
        assert 0 < len(record["text"]) <= 20 and record["denoising_calls"] >= 2


def test_several_continuations_are_what_their_seeds_write_alone(write):
    both = write("--prompt", "And", "--num-samples", "2")
    alone = [write("--prompt", "And", "--seed", seed) for seed in ("0", "1")]
    assert both == b"[1] " + alone[0] + b"[2] " + alone[1]


def test_chunk_borders_can_be_shown(write):
    arguments = ("--prompt", "And", "--num-samples", "6", "--max-chars", "60")
    plain, marked = write(*arguments), write(*arguments, "--show-chunks")
    records = [json.loads(line) for line in write(*arguments, "--json").splitlines()]
    chunks = [len(record["chunk_spans"]) for record in records]
    assert marked.startswith(b"[1] And|") and max(chunks) > 1
    assert marked.count(b"|") == plain.count(b"|") + sum(chunks)
    assert write("--prompt", "And", "--show-chunks").startswith(b"And|")


def test_a_reader_that_leaves_early_ends_it_quietly(trained_run, without_reader, capsys):
    with without_reader():
        assert cli.generate(["--run", str(trained_run), "--prompt", "And"]) == 0
    assert capsys.readouterr().err == ""
