"""Nothing is let in by a saved model: no pickle, class, setting or header but those that belong there."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hldm.config import ConfigError, load_config
from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.model.autoencoder import Autoencoder
from hldm.runs.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
CANARY = "canary"
PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."  # os.system("touch canary")


@pytest.fixture
def folder(saved_pipeline, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(saved_pipeline, tmp_path / "pipeline"))


def evil(folder: Path) -> bytes:
    """A pickle that leaves a file behind when it is loaded."""
    return PICKLE % str(folder / CANARY).encode()


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "model.pkl"]
)
def test_a_pickle_beside_or_instead_of_weights_is_never_run(name, keep_weights, folder, tmp_path):
    for part in ("autoencoder", "prior"):
        (folder / part / name).write_bytes(evil(tmp_path))
        if not keep_weights:
            (folder / part / WEIGHTS).unlink()
    if keep_weights:
        read_pipeline(folder)
    else:
        with pytest.raises(ValueError, match=f"{WEIGHTS} is missing"):
            read_pipeline(folder)
        with pytest.raises(FileNotFoundError, match="is missing"):
            Autoencoder.from_pretrained(folder / "autoencoder")
    assert not (tmp_path / CANARY).exists()


def test_a_pickle_under_any_name_that_is_read_is_refused_and_never_run(saved_pipeline, tmp_path):
    for number, file in enumerate(
        path.relative_to(saved_pipeline) for path in saved_pipeline.rglob("*") if path.is_file()
    ):
        folder = Path(shutil.copytree(saved_pipeline, tmp_path / str(number)))
        (folder / file).write_bytes(evil(tmp_path))
        with pytest.raises(ValueError, match="cannot be loaded"):
            read_pipeline(folder)
    weight = {"w": torch.ones(2)}
    checkpoint = save_checkpoint(tmp_path, 1, {"model": weight, "optimizer": weight}, {}, keep=1)
    for path in checkpoint.iterdir():
        good = path.read_bytes()
        path.write_bytes(evil(tmp_path))
        with pytest.raises(CheckpointError):
            load_checkpoint(checkpoint)
        path.write_bytes(good)
    (tmp_path / "config.yaml").write_bytes(evil(tmp_path))
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.yaml")
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", ["evil", "Pipeline"]),
        ("_class_name", "StableDiffusionPipeline"),
        ("prior", ["evil", "Prior"]),
        ("prior", ["subprocess", "Popen"]),
        ("scheduler", ["evil", "DDIMScheduler"]),
        ("scheduler", ["diffusers", "UniPCMultistepScheduler"]),
        ("scheduler", [[], {}]),
        ("tokenizer", ["transformers", "BertTokenizer"]),
        ("another", ["evil", "Model"]),
        ("defaults", {"steps": 10**12}),
        ("defaults", {"steps": "many"}),
        ("defaults", 3),
    ],
)
def test_an_index_cannot_name_other_classes_or_settings(key, value, folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, key: value}))
    for place in (folder, folder / "prior"):
        (place / "evil.py").write_text(f"open({str(tmp_path / CANARY)!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        HLDMPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value) and not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config["chunking"].update(max_bytes="4"), None),  # a number in quotes is a number
        (lambda config: config["chunking"].update(max_bytes="six"), "chunking|max_bytes"),
        (lambda config: config["autoencoder"].update(latent_dim=3), "must be F32"),
        (lambda config: config["autoencoder"]["encoder"].update(mlp_ratio=1e30), "mlp_ratio"),
        (
            lambda config: config["autoencoder"]["encoder"].update(blocks=["recurrent"] * 10_000),
            "at most 512",
        ),
        (lambda config: config.update(quantization_config={}), "unknown key 'quantization_config'"),
        (lambda config: config.update(gamma_0=True), "gamma_0 must be of type float"),
        (lambda config: config.update(_class_name="Prior"), "expected the config of a Autoencoder"),
        (lambda config: config.pop("chunking"), "chunking is missing"),
    ],
)
def test_a_model_is_what_its_config_says(change, says, folder):
    path = folder / "autoencoder" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    if says is None:
        Autoencoder.from_pretrained(folder / "autoencoder")
        return
    with pytest.raises(ValueError, match=says) as error:
        Autoencoder.from_pretrained(folder / "autoencoder")
    assert "\n" not in str(error.value)


def headers(good: bytes) -> dict[str, bytes]:
    """Safetensors files that are not what they seem."""
    size = int.from_bytes(good[:8], "little")
    head, body = json.loads(good[8 : 8 + size]), good[8 + size :]
    name = next(key for key in head if key != "__metadata__")
    entry = head[name]
    first, last = entry["data_offsets"]

    def file(text: bytes | dict) -> bytes:
        text = json.dumps(text).encode() if isinstance(text, dict) else text
        return len(text).to_bytes(8, "little") + text + body

    twice = json.dumps(head).encode()[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    return {
        "empty": b"",
        "a few bytes": b"1234567",
        "zeros": bytes(len(good)),
        "length 2^64": b"\xff" * 8 + good[8:],
        "length 99 MB": (99 * 10**6).to_bytes(8, "little") + good[8:],
        "a real header of 20 MB": file(b"{" + b" " * 20_000_000 + b"}"),
        "no tensor": file({}),
        "overlap": file({**head, name: {**entry, "data_offsets": [first + 4, last + 4]}}),
        "hole": file({**head, name: {**entry, "data_offsets": [first, last - 4]}}),
        "shape 2^80": file({**head, name: {**entry, "shape": [2**40, 2**40]}}),
        "negative": file({**head, name: {**entry, "shape": [-1, 4]}}),
        "nested": file(b"[" * 200_000),
        "one name twice": file(twice),
        "one key twice": good.replace(b'"dtype"', b'"shape"', 1),
        "cut": good[: len(good) // 2],
        "longer": good + bytes(100),
    }


@pytest.fixture(scope="module")
def attacks(saved_pipeline) -> dict[str, bytes]:
    return headers((saved_pipeline / "autoencoder" / WEIGHTS).read_bytes())


@pytest.mark.parametrize("name", [*headers(save({"w": torch.ones(2)}))])
def test_weights_with_a_hostile_header_are_refused_at_once_and_cheaply(name, attacks, folder):
    (folder / "autoencoder" / WEIGHTS).write_bytes(attacks[name])
    memory, began = peak_bytes(), time.process_time()
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        read_pipeline(folder)
    assert "\n" not in str(error.value)
    assert time.process_time() - began < 1 and peak_bytes() - memory < 300e6


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("part", ["autoencoder", "prior"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state, name: state.pop(name), "missing tensor"),
        (lambda state, name: state.update(another=torch.ones(1)), "unknown tensor 'another'"),
        (lambda state, name: state.update({name: state[name].double()}), "must be F32"),
        (lambda state, name: state.update({name: state[name][None]}), "must be F32"),
        (lambda state, name: state.update({name: state[name] * float("nan")}), "is not finite"),
        (lambda state, name: state.update({name: state[name] + float("inf")}), "is not finite"),
    ],
)
def test_weights_must_be_exactly_those_of_the_model(part, change, says, folder):
    model = getattr(read_pipeline(folder), part)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state, next(name for name in state if state[name].is_floating_point()))
    (folder / part / WEIGHTS).write_bytes(save(state))
    with pytest.raises(ValueError, match=says) as error:
        read_pipeline(folder)
    assert "\n" not in str(error.value)
