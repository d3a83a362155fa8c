"""A transformer of a folder is an encoder of sentences like the family's own: trained, followed, saved, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from jepa_small import SMALL
from safetensors.torch import load_file, save_file

from hldm import cli
from hldm.config import ConfigError, changed
from hldm.jepa.config import load_jepa_config
from hldm.jepa.similarity import sources_of
from hldm.jepa.train import read_objective, train_jepa
from hldm.jepa.transformer import TextTransformer, require_transformer
from hldm.runs.checkpoints import newest_checkpoint
from hldm.runs.exits import Interrupted
from hldm.text.windows import window_of
from hldm.training.trainer import Trainer


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """A RoBERTa of random weights and a few words."""
    from transformers import BertTokenizerFast, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("transformer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "king", "said", "water", "the", "and", "of", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=len(words), pad_token_id=0, **sizes)).save_pretrained(
        folder / "model"
    )
    return folder / "model"


@pytest.fixture
def arguments(corpus_path: Path, roberta: Path, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    text = [f"data.path={corpus_path}", 'data.separator="\\n\\n"']
    few = ["sentences.min_bytes=4", "sentences.max_bytes=60", "training.jepa.steps=4", "checkpoint.every=1"]
    settings = [*SMALL, *text, "encoder.width=128", *few, f"sentences.encoder=hf:{roberta}"]
    return ["--config", str(ROOT / "configs/jepa-sentences.yaml"), *settings]


def config_of(arguments: list[str], *overrides: str):
    return changed(load_jepa_config([arguments[1]], [*arguments[2:], *overrides]), name="run")


def test_a_text_has_the_same_vectors_in_any_company(roberta):
    encoder = TextTransformer.from_pretrained(roberta).eval()
    texts = [b"the king said", b"water"]

    def read(some: list[bytes]):
        return encoder(
            window_of(some, [[True] + [False] * (len(text) - 1) for text in some], [True] * len(some))
        )

    together, alone = read(texts), read(texts[1:])
    assert together.mask.sum(dim=1).tolist() == [5, 3]  # with [CLS] and [SEP]
    torch.testing.assert_close(together.vectors[1, :3], alone.vectors[0])


def test_it_is_trained_followed_and_saved_and_a_decoder_reads_it(arguments, roberta, capsys):
    shutil.copytree(roberta, "start")
    moved = [*arguments, "sentences.encoder=hf:start", "objective.momentum=0.5", "--name", "one"]
    assert cli.jepa(["train", *moved]) == 0
    run = Path("runs/one")
    first, last = (
        TextTransformer.from_pretrained(path).state_dict() for path in (roberta, run / "jepa/model")
    )
    target = TextTransformer.from_pretrained(run / "jepa/target").state_dict()
    name = "model.embeddings.word_embeddings.weight"
    assert 0 < (last[name] - first[name]).abs().max() < 0.2
    assert 0 < (target[name] - last[name]).abs().max() < (first[name] - last[name]).abs().max()
    saved = newest_checkpoint(run / "jepa")
    assert saved is not None
    torch.testing.assert_close(saved.tensors["model"][f"target.{name}"], target[name], rtol=0, atol=0)
    assert [source.name for source in sources_of([run])] == ["start", "one", "one (target)"]
    shutil.rmtree("start")  # a run stands on its own
    assert [source.name for source in sources_of([run])] == ["one", "one (target)"]
    assert sources_of([run])[0].encode(["the king", "water"])["features"].shape == (2, 16)
    assert cli.jepa(["decoder", *moved]) == 0
    assert cli.jepa(["concepts", "--run", "runs/one", "--sentences", "4"]) == 0
    assert "predicted" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_stopped_and_resumed_is_bit_equal_to_an_uninterrupted_one(arguments, tmp_path, monkeypatch):
    config = config_of(arguments)
    straight = train_jepa(config, root=tmp_path / "straight")
    taken, original = [], Trainer.step

    def step_then_stop(self, progress):
        taken.append(progress)
        if len(taken) == 3:
            raise Interrupted(15, "")
        return original(self, progress)

    monkeypatch.setattr(Trainer, "step", step_then_stop)
    with pytest.raises(Interrupted):
        train_jepa(config, root=tmp_path / "halted")
    halted = train_jepa(config, resume=True, root=tmp_path / "halted")
    found = [read_objective(run, config).state_dict() for run in (straight, halted)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("sentences.encoder=hf:nowhere", "nowhere holds no transformer"),
        ("sentences.encoder=roberta-base", "must be empty or hf:FOLDER"),
        ("sentences.encoder=hf:", "names no folder"),
        ("vector=8", "vector must be 16, the hidden size of"),
        ("objective.option=encoder_decoder", "objective.option must be one of latents"),
        ("views.kind=null-spans", "views.kind must be one of none"),
        ("task=chunks", "task must be one of sentences, views"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(setting, says, arguments, refused):
    assert says in refused(cli.jepa(["train", *arguments, setting]))
    assert not Path("runs").exists()


def test_a_folder_without_a_tokenizer_or_of_another_kind_is_refused_in_one_line(roberta, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(roberta / name, folder / name)
    with pytest.raises(ConfigError, match="bare has no tokenizer"):
        require_transformer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="its tokenizer cannot be read"):
        require_transformer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 16}))
    with pytest.raises(ConfigError, match="does not make one vector a token"):
        require_transformer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "none such"}))
    with pytest.raises(ConfigError, match="describes no transformer"):
        require_transformer(folder)
    shutil.copytree(roberta, tmp_path / "torn")
    (tmp_path / "torn/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="weights cannot be read"):
        TextTransformer.from_pretrained(tmp_path / "torn")
    weights = load_file(roberta / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "torn/model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="its weights lack encoder.layer.0.output.dense.weight"):
        TextTransformer.from_pretrained(tmp_path / "torn")
