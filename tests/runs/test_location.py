"""A model asked for by name is found where it lies, or one line says where it was looked for."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from hldm.generation.pipeline import HLDMPipeline
from hldm.runs import hub
from hldm.runs.folder import shipped_run
from hldm.runs.location import find_model, pipeline_of
from hldm.sources.notes import TextNote


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cache(saved_pipeline, tmp_path) -> Path:
    """A cache of the hub with one snapshot of a model, owner/name, as huggingface_hub keeps it."""
    model = tmp_path / "cache/models--owner--name"
    shutil.copytree(saved_pipeline, model / "snapshots" / ("a" * 40))
    for name in ("main", "v1"):
        (model / "refs" / name).parent.mkdir(exist_ok=True)
        (model / "refs" / name).write_text("a" * 40)
    return tmp_path / "cache"


def test_a_folder_may_be_a_pipeline_a_run_or_one_that_comes_with_hldm(saved_pipeline):
    shutil.copytree(saved_pipeline, "mine")
    shutil.copytree(saved_pipeline, "runs/demo/pipeline")
    assert find_model("mine") == pipeline_of(Path("mine")) == Path("mine")
    assert find_model("runs/demo") == Path("runs/demo")
    assert pipeline_of(Path("runs/demo")) == Path("runs/demo/pipeline")
    for name in ("small", "small-twin"):
        assert find_model(name) == shipped_run(name == "small-twin")
    Path("small").mkdir()  # that holds no model
    assert find_model("small") == shipped_run()
    shutil.copytree(saved_pipeline, "small/pipeline")
    assert find_model("small") == Path("small")


@pytest.mark.parametrize("name", ["nowhere", "runs/nowhere", "./a/b", "/a/b", "a/b/c", "here/empty", "../a"])
def test_what_is_nowhere_is_told_in_one_line_and_no_hub_is_asked(name, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name, **given: pytest.fail("asked the hub"))
    Path("here/empty").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="is no folder here|holds no trained model: run hldm train"
    ) as error:
        find_model(name)
    assert "\n" not in str(error.value)


def test_a_revision_is_of_the_hub():
    with pytest.raises(ValueError, match="small is a folder, which has no revision 'v1'"):
        find_model("small", revision="v1")


def test_without_a_network_the_cache_is_read(cache, monkeypatch):
    given = {"cache_dir": cache, "local_files_only": True}
    for revision in (None, "v1", "a" * 40):
        pipeline = HLDMPipeline.from_pretrained("owner/name", revision=revision, **given)
        assert pipeline("a", max_characters=3).texts[0]
    for name, revision in (("owner/name", "v2"), ("owner/other", None)):
        with pytest.raises(FileNotFoundError, match=f"{name}.*no copy in the cache .*asks no hub") as error:
            HLDMPipeline.from_pretrained(name, revision=revision, **given)
        assert str(cache) in str(error.value) and "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_said_and_the_cache_read(cache, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(TextNote, match="the copy in the cache .* is used .*127.0.0.1:9 cannot be reached"):
        assert find_model("owner/name", cache_dir=cache).name == "a" * 40
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="127.0.0.1:9 cannot be reached"):
        find_model("owner/other", cache_dir=cache)
    assert time.monotonic() - began < 10


def test_what_the_hub_refuses_is_one_line(cache, monkeypatch):
    class Missing(errors.RepositoryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404\n\nnot found")

    asked: dict[str, object] = {}

    def refuse(name, **given):
        asked.update(given)
        raise Missing

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "hub_failure", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="no such repository, or it is private") as error:
        find_model("owner/name", revision="v1", token="secret", cache_dir=cache)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert (asked["revision"], asked["token"]) == ("v1", "secret")
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
