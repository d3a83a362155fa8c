"""The pipeline keeps diffusers' and transformers' customs, or refuses in one line what it cannot keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from tiny_model import tiny_pipeline

from hldm.config import changed
from hldm.generation.pipeline import HLDMPipeline
from hldm.model.autoencoder import Autoencoder
from hldm.runs import hub
from hldm.runs.saved_model import default_float32
from hldm.text.bytes import END_OF_DOCUMENT


@pytest.fixture(scope="module")
def pipe(saved_pipeline) -> HLDMPipeline:
    return HLDMPipeline.from_pretrained(saved_pipeline)


@pytest.fixture(scope="module")
def endless() -> HLDMPipeline:
    """One that never closes a document."""
    pipe = tiny_pipeline()
    pipe.autoencoder.outputs.bias.data[END_OF_DOCUMENT] = -1e9
    return pipe


# ---- from and to folders


def test_components_make_the_same_pipeline_settings_and_all(saved_pipeline):
    pipe = HLDMPipeline.from_pretrained(saved_pipeline)
    pipe.register_to_config(defaults={**pipe.config["defaults"], "top_p": 0.5, "steps": 3})
    again = HLDMPipeline(**pipe.components)
    assert again.settings == pipe.settings and again.settings.top_p == 0.5
    assert again("And", max_characters=20).texts == pipe("And", max_characters=20).texts
    assert again.autoencoder is pipe.autoencoder


def test_a_segmenter_is_among_the_components(tmp_path):
    from hldm.chunking.entropy import EntropySegmenter
    from hldm.config import ChunkingConfig

    chunking = ChunkingConfig(strategy="entropy", min_bytes=2, max_bytes=12)
    pipe = tiny_pipeline()
    assert HLDMPipeline(**pipe.components).segmenter is None
    segmenter = EntropySegmenter.from_settings(chunking)
    assert HLDMPipeline(**pipe.with_segmenter(segmenter).components).segmenter is segmenter


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"torch_dtype": torch.bfloat16}, "computes in float32, got bfloat16"),
        ({"dtype": "float16"}, "computes in float32, got float16"),
        ({"device_map": "balanced"}, "device_map must be cpu, cuda or auto, got 'balanced'"),
        ({"device_map": {"prior": 0}}, "device_map must be cpu"),
        ({"variant": "fp16"}, "one form"),
        ({"use_safetensors": False}, "one form"),
    ],
)
def test_loading_refuses(options, says, saved_pipeline):
    with pytest.raises(ValueError, match=says) as error:
        HLDMPipeline.from_pretrained(saved_pipeline, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.float32},
        {"dtype": "auto", "device_map": "cpu"},
        {"device_map": "auto", "use_safetensors": True},
    ],
)
def test_loading_takes(options, saved_pipeline, pipe):
    loaded = HLDMPipeline.from_pretrained(str(saved_pipeline), **options)
    assert loaded("And", max_characters=9).texts == pipe("And", max_characters=9).texts


def test_a_gpu_that_is_not_there_is_refused(saved_pipeline, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU here"):
        HLDMPipeline.from_pretrained(saved_pipeline, device_map="cuda")
    assert HLDMPipeline.from_pretrained(saved_pipeline, device_map="auto").device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_refused_when_it_is_asked_for(dtype, saved_pipeline):
    pipe = HLDMPipeline.from_pretrained(saved_pipeline)
    for ask in (lambda: pipe.to(dtype), lambda: pipe.to("cpu", dtype), lambda: pipe.to(dtype=dtype)):
        with pytest.raises(ValueError, match=f"computes in float32, got {str(dtype)[6:]}"):
            ask()
    assert pipe.to("cpu", torch.float32) is pipe
    pipe.autoencoder.to(dtype)  # past the pipeline
    with pytest.raises(ValueError, match="computes in float32"):
        pipe("And")
    with pytest.raises(ValueError, match=r"weights are saved in float32: call .to\(torch.float32\)"):
        pipe.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


def test_a_default_dtype_changes_nothing(saved_pipeline, pipe):
    expected = pipe("And", max_characters=20).texts
    torch.set_default_dtype(torch.float64)
    try:
        loaded = HLDMPipeline.from_pretrained(saved_pipeline)
        assert {p.dtype for p in loaded.autoencoder.parameters()} == {torch.float32}
        assert loaded("And", max_characters=20).texts == expected
        with default_float32():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [10**9, "1GB", "500 MiB", "2gb", None])
def test_what_is_saved_loads_again(size, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved", safe_serialization=True, max_shard_size=size)
    again = HLDMPipeline.from_pretrained(tmp_path / "saved")
    assert again("And", max_characters=20).texts == pipe("And", max_characters=20).texts
    config = json.loads((tmp_path / "saved/autoencoder/config.json").read_text())
    assert "_name_or_path" not in config
    pipe.autoencoder.save_pretrained(tmp_path / "part")
    assert Autoencoder.from_pretrained(tmp_path / "part").config["chunking"] == config["chunking"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "fp16"}, "no variant='fp16'"),
        ({"safe_serialization": False}, "a pickle can run code"),
        ({"max_shard_size": "1KB"}, "one file, here of .* max_shard_size='1KB' is less"),
        ({"max_shard_size": 1000}, "max_shard_size=1000 is less"),
        ({"max_shard_size": "large"}, "max_shard_size must be bytes or such as '5GB', got 'large'"),
    ],
)
def test_what_would_not_load_again_is_not_saved(options, says, pipe, tmp_path):
    for part in (pipe, pipe.autoencoder):
        with pytest.raises(ValueError, match=says):
            part.save_pretrained(tmp_path / "saved", **options)
    assert not (tmp_path / "saved").exists()


def test_weights_that_are_not_finite_and_unknown_schedulers_are_not_saved(saved_pipeline, tmp_path):
    pipe = HLDMPipeline.from_pretrained(saved_pipeline)
    scheduler, pipe.scheduler = pipe.scheduler, UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="not one of the schedulers"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.scheduler = scheduler
    pipe.autoencoder.outputs.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="outputs.bias is not finite"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# ---- the hub


class FakeApi:
    """A hub of one folder: what is uploaded can be looked at."""

    pushed: dict[str, dict] = {}

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, name, private=None, exist_ok=False):
        assert exist_ok
        if self.token == "wrong":
            raise OSError("401\nUnauthorized")
        return type("Url", (), {"repo_id": name})()

    def upload_folder(self, repo_id, folder_path, **given):
        files = {
            str(p.relative_to(folder_path)): p.read_bytes()
            for p in Path(folder_path).rglob("*")
            if p.is_file()
        }
        self.pushed[repo_id] = {"files": files, **given}
        return f"hub/{repo_id}/commit/1"


@pytest.fixture
def fake_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "pushed", {})
    return FakeApi.pushed


def test_a_pipeline_is_pushed_with_a_card_and_loads_from_what_was_pushed(pipe, fake_hub, tmp_path):
    found = pipe.push_to_hub("me/small", commit_message="First", create_pr=True, token="t")
    assert found == "hub/me/small/commit/1"
    pushed = fake_hub["me/small"]
    assert pushed["commit_message"] == "First" and pushed["create_pr"]
    card = pushed["files"]["README.md"].decode()
    assert card.startswith("---\nlicense: unknown\n") and f"{pipe.parameter_count:,} parameters" in card
    for name, data in pushed["files"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    loaded = HLDMPipeline.from_pretrained(tmp_path)
    assert loaded("And", max_characters=9).texts == pipe("And", max_characters=9).texts
    assert loaded.card == card


def test_an_exported_card_travels_along(saved_pipeline, fake_hub, tmp_path):
    shutil.copytree(saved_pipeline, tmp_path / "slim/pipeline")
    (tmp_path / "slim/README.md").write_text("the card of an export")
    loaded = HLDMPipeline.from_pretrained(tmp_path / "slim")
    loaded.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert (tmp_path / "mine/README.md").read_text() == "the card of an export"
    assert fake_hub["mine"]["files"]["README.md"] == b"the card of an export"
    with pytest.raises(TypeError, match="only with push_to_hub"):
        loaded.save_pretrained(tmp_path / "other", private=True)


def test_a_push_that_fails_is_one_line(pipe, fake_hub, monkeypatch):
    with pytest.raises(ValueError, match="me/small could not be uploaded") as error:
        pipe.push_to_hub("me/small", token="wrong")
    assert "\n" not in str(error.value) and "wrong" not in str(error.value)
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        pipe.push_to_hub("me/small")
    assert not fake_hub


# ---- calls


def test_each_row_draws_from_its_own_generator(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipe(["And", "Then"], max_characters=20, generator=generators(5, 6)).texts
    alone = [
        pipe(text, max_characters=20, generator=generator).texts[0]
        for text, generator in zip(["And", "Then"], generators(5, 6), strict=True)
    ]
    assert both == alone
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"one for each text, got {count} for 2"):
            pipe(["And", "Then"], generator=generators(*range(count)))


def test_a_seed_may_be_any_whole_number_in_range(pipe):
    assert pipe("a", seed=np.int64(3), max_characters=9).texts == pipe("a", seed=3, max_characters=9).texts
    for wrong in (-1, 2**31):
        with pytest.raises(ValueError, match=f"seed must lie in 0..2\\^31-1, got {wrong}"):
            pipe("a", seed=wrong)


def test_a_stop_string_ends_each_text_and_what_a_streamer_hears(endless):
    whole = endless(["And", "Then"], max_characters=60, seed=4)
    stop = whole.sequences[0][20:22]
    heard = ["", ""]

    def listen(row, text):
        heard[row] += text

    found = endless(["And", "Then"], max_characters=60, seed=4, stop=stop, streamer=listen)
    assert found.sequences == [text.partition(stop)[0] for text in whole.sequences]
    assert found.texts == heard and len(found.sequences[0]) <= 20
    assert [spans[-1][1] for spans in found.chunk_spans] == [len(text) for text in found.sequences]


def test_a_callback_comes_after_every_chunk_and_may_end_the_writing(endless):
    steps: list[int] = []
    heard: list[str] = []

    def count(pipeline, step, calls, given):
        assert pipeline is endless and calls == (step + 1) * endless.settings.steps
        assert given["texts"][0].endswith(given["news"][0])
        steps.append(step)
        pipeline._interrupt = step == 2

    cut = endless(
        "And",
        max_characters=200,
        callback_on_step_end=count,
        stop="nowhere",
        streamer=lambda _, text: heard.append(text),
    )
    assert steps == [0, 1, 2] and len(cut.chunk_spans[0]) == 3
    assert "".join(heard) == cut.texts[0]
    whole = endless("And", max_characters=200)
    assert whole.texts[0].startswith(cut.texts[0]) and len(whole.chunk_spans[0]) > 3


def test_a_listener_is_told_of_the_end_though_writing_fails(pipe, monkeypatch):
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(None, timeout=5)

    def fail(*_):
        raise RuntimeError("in the callback")

    with pytest.raises(RuntimeError, match="in the callback"):
        pipe("And", max_characters=20, streamer=streamer, callback_on_step_end=fail)
    assert next(streamer) == "And" and len(list(streamer)) >= 1


def test_text_or_bytes_come_out(pipe):
    whole = pipe("And", max_characters=9)
    assert pipe("And", max_characters=9, return_dict=False) == (whole.texts,)
    assert pipe("And", max_characters=9, return_dict=False, output_type="bytes") == (whole.sequences,)
    with pytest.raises(ValueError, match="output_type must be text or bytes, got 'pil'"):
        pipe("And", output_type="pil")


def test_settings_of_a_call_change_nothing_of_the_pipeline(pipe):
    before = pipe.settings
    pipe("And", max_characters=5, num_inference_steps=1, top_p=0.9)
    assert pipe.settings == before == changed(before)
