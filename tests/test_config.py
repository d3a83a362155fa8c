"""Settings: what is read is what was written, and whatever is wrong is one line that says where."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from hldm.config import (
    Config,
    ConfigError,
    PriorConfig,
    changed,
    load_config,
    section_from_dict,
    to_dict,
    to_yaml,
)


def refusal(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    """The one line that loading this YAML text ends in, with the file's folder left out."""
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config([path], overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message.replace(f"{tmp_path}/", "")


def loaded(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_config([path], overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_takes_its_name_from_its_file(path):
    assert load_config([path]).name == path.stem


def test_later_files_win_and_the_command_line_wins_over_all(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "seed: 1\ndata: {lanes: 2, window_bytes: 64}\nchunking: {max_bytes: 9}\n"
    )
    (tmp_path / "b.yaml").write_text("seed: 2\ndata: {lanes: 3}\n")
    config = load_config([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["seed=3", "seed=4"])
    assert (config.seed, config.data.lanes, config.data.window_bytes, config.chunking.max_bytes) == (
        4,
        3,
        64,
        9,
    )
    assert config.name == "b"


def test_a_file_inherits_from_its_base_but_not_its_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "tiny.yaml").write_text("seed: 7\nautoencoder: {latent_dim: 8, carry_state: false}\n")
    twin = tmp_path / "sub" / "tiny-twin.yaml"
    twin.write_text("base: ../tiny.yaml\nautoencoder: {latent_dim: 0}\n")
    config = load_config([twin])
    assert config.is_twin and config.seed == 7 and config.name == "tiny-twin"


def test_a_base_that_inherits_from_itself_is_refused(tmp_path):
    (tmp_path / "y.yaml").write_text("base: x.yaml\n")
    message = refusal(tmp_path, "base: y.yaml\n")
    assert message.startswith("x.yaml:1:7: base 'y.yaml' ends a chain of more than 50 bases")


def test_a_field_decides_the_type_of_its_text(tmp_path):
    text = "training: {autoencoder: {learning_rate: 1e-3}, mixed_precision: no, gradient_checkpointing: true}\ndata:\n"
    config = loaded(
        tmp_path, text, "data.path=*.txt", 'data.separator="\\n\\n"', "logging.trackers=[tensorboard]"
    )
    training = config.training.of("autoencoder")
    assert (training.learning_rate, training.mixed_precision, training.gradient_checkpointing) == (
        1e-3,
        "no",
        True,
    )
    assert (config.data.path, config.data.separator) == ("*.txt", "\n\n")
    assert config.logging.trackers == ("tensorboard",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1e3", "x.yaml:1:7: seed must be a whole number in digits, got '1e3'"),
        ("seed: true", "x.yaml:1:7: seed must be a whole number in digits, got 'true'"),
        ("seed: 1.0", "x.yaml:1:7: seed must be a whole number in digits, got '1.0'"),
        (
            f"seed: {10**30}",
            f"x.yaml:1:7: seed must be less than {2**31}, got {10**30}",
        ),
        ("training: {prior: {learning_rate: true}}", "learning_rate must be a finite number, got 'true'"),
        ("training: {prior: {learning_rate: nan}}", "learning_rate must be a finite number, got nan"),
        ("diffusion: {gamma_0: .inf}", "diffusion.gamma_0 must be a finite number, got '.inf'"),
        (
            "training: {prior: {learning_rate: 1e30}}",
            "learning_rate must be less than 9223372036854776000, got 1e+30",
        ),
        ("diffusion: {gamma_0: inf}", "diffusion.gamma_0 must be a finite number, got inf"),
        ("data: {stream: 2}", "data.stream must be true or false, got '2'"),
        ("data: {path: [a]}", "data.path must be text, got ('a',)"),
        (
            "autoencoder: {pooling: max}",
            "autoencoder.pooling must be 'mean' or 'strided', got 'max'",
        ),
        (
            "logging: {trackers: tensorboard}",
            "logging.trackers must be a list such as [a, b], got 'tensorboard'",
        ),
        ("autoencoder: {encoder: 5}", "autoencoder.encoder is a section; set the keys below it, such as"),
        ("seed: null", "x.yaml:1:7: null is no setting; leave the key out to keep its default"),
        ("seed: {a: 1}", "x.yaml:1:11: unknown key 'seed.a'; the nearest known is 'seed'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_was_expected(tmp_path, text, expected):
    assert expected in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.lane", "data.lanes"),
        ("autoencoder.encoder.widht", "autoencoder.encoder.width"),
        ("steps", "generation.steps"),
        ("prior.step", "training.prior.steps"),
        ("chunk.max_bytes", "chunking.max_bytes"),
        ("x" * 10_000, ""),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path, key, nearest):
    expected = f"command line: unknown key {key[:100]!r}; the nearest known is '{nearest}"
    assert refusal(tmp_path, "", f"{key}=1").startswith(expected)


def test_an_unknown_key_in_a_file_is_named_with_its_line(tmp_path):
    message = refusal(tmp_path, "seed: 1\ndata:\n  lanse: 3\n")
    assert message == "x.yaml:3:10: unknown key 'data.lanse'; the nearest known is 'data.lanes'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("autoencoder: {decoder: {width: 6}}", "x.yaml:1:32: autoencoder.decoder.width must be divisible by"),
        (
            "training:\n  autoencoder: {steps: 0}",
            "x.yaml:2:24: training.autoencoder.steps must be greater than 0, got 0",
        ),
        ("chunking: {min_bytes: 90}", "x.yaml:1:23: chunking.min_bytes must not exceed max_bytes"),
        ("seed: -1", "x.yaml:1:7: seed must be at least 0, got -1"),
        ("autoencoder: {decoder: {width: 100000}}", "x.yaml:1:32: autoencoder.decoder.width must be at most"),
        ("autoencoder: {decoder: {mlp_ratio: 1e12}}", "x.yaml:1:36: autoencoder.decoder.mlp_ratio must be"),
        ("prior: {layers: 1000000}", "x.yaml:1:17: prior.layers must be at most 512, got 1000000"),
        (
            "autoencoder: {pooling: strided}",
            "x.yaml:1:24: autoencoder.pooling=strided needs chunks of a constant length: set chunking.strategy=fixed",
        ),
        (
            "autoencoder: {pooling: strided}\nchunking: {strategy: fixed, min_bytes: 4, max_bytes: 8}",
            "x.yaml:1:24: autoencoder.pooling=strided needs chunks of a constant length",
        ),
        ("name: ../up", "x.yaml:1:7: name must be a folder name of at most 64"),
    ],
)
def test_a_value_out_of_range_is_refused_under_its_full_key(tmp_path, text, expected):
    assert refusal(tmp_path, text).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", "x.yaml:2:1: duplicate key 'seed', first set at x.yaml:1:1"),
        ("data: {lanes: 1}\ndata: {lanes: 1}", "x.yaml:2:1: duplicate key 'data', first set at x.yaml:1:1"),
        (
            "data.lanes: 1\ndata: {lanes: 1}",
            "x.yaml:2:8: duplicate key 'data.lanes', first set at x.yaml:1:1",
        ),
        ("seed: !!python/object/apply:os.getpid []", "x.yaml:1:7: anchors, aliases and tags"),
        ("seed: !!int 1", "x.yaml:1:7: anchors, aliases and tags"),
        ("a: &a [1]\nb: [*a, *a]", "x.yaml:1:4: anchors, aliases and tags are refused"),
        ("data: {path: *txt}", "x.yaml:1:14: anchors, aliases and tags are refused; quote a value"),
        (
            "data: {path: *.txt}",
            "x.yaml:1:15: not valid YAML: while scanning an alias expected alphabetic or numeric character",
        ),
        ("a: " + "[" * 5000, "x.yaml:1:"),
        ("{a: " * 5000, "x.yaml:1:202: nested deeper than 50"),
        (b"name: caf\xe9", "x.yaml:1:10: byte 0xe9 is not UTF-8"),
        (b"seed: 1\nname: \x07", "x.yaml:2:7: the character"),
        ("seed: [1", "x.yaml:1:9: not valid YAML: while parsing a flow sequence expected ',' or ']'"),
        (
            "seed: 1\n\tdata: 2",
            "x.yaml:2:1: not valid YAML: while scanning for the next token found character '\\t'",
        ),
        ("# comment\n---\nseed: 1\n---\nseed: 2", "x.yaml:4:1: not valid YAML: expected a single document"),
        ("- seed", "x.yaml:1:1: expected lines of `key: value`"),
        ("? [a]\n: 1", "x.yaml:1:3: expected a single value"),
        ("#" * 100_001, "x.yaml: longer than 100000 bytes"),
    ],
)
def test_what_is_no_config_is_refused_at_its_place(tmp_path, text, expected):
    assert refusal(tmp_path, text).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "command line: expected key=value, such as seed=1, got 'seed'"),
        ("=1", "command line: expected key=value"),
        ("seed=", "command line: seed must be a whole number in digits, got ''"),
        ("name=caf\udce9", "command line: 'name=caf\\udce9' is not UTF-8"),
        ('name="x', "command line: not valid YAML: "),
        ("logging.trackers=[&a b]", "command line: anchors, aliases"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, override, expected):
    assert refusal(tmp_path, "", override).startswith(expected)


@pytest.mark.parametrize("path", ["no-such.yaml", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(path):
    with pytest.raises(ConfigError, match="cannot be read as a config"):
        load_config([path])


@pytest.mark.parametrize(
    "tree", [{"seed": None}, {"data": {"lanes": object()}}, {"seed": True}, {"seed": 1.5}]
)
def test_a_dict_is_as_strict_as_a_file(tree):
    with pytest.raises(ConfigError, match=r"^settings: "):
        section_from_dict(Config, tree)


def test_a_dict_nested_without_end_is_refused():
    tree: dict = {}
    tree["seed"] = tree
    with pytest.raises(ConfigError, match="nested deeper"):
        section_from_dict(Config, tree)


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    number=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_config_written_and_read_again_is_the_same(tmp_path_factory, text, number, seed):
    config = changed(Config(name="no"), seed=seed)
    config = changed(
        config,
        data=changed(config.data, path=text, separator=text),
        diffusion=changed(config.diffusion, gamma_0=-min(number, 20.0)),
        logging=changed(config.logging, trackers=(text, "null")),
    )
    assert section_from_dict(Config, to_dict(config)) == config
    path = tmp_path_factory.mktemp("config") / "x.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_to_dict_holds_plain_values_only():
    tree = to_dict(Config())
    assert type(tree["autoencoder"]["encoder"]["blocks"]) is list
    assert type(tree["training"]["prior"]) is dict


@pytest.mark.parametrize(
    "override",
    [
        "autoencoder.writes=bytes",
        "prior.one_step=none",
        "prior.energy.samples=3",
        "autoencoder.byte_dropout=0",
        "data.cache_latents=false",
        "prior.self_conditioning=0.0",
        "training.prior.joint=0.0",
    ],
)
def test_a_retired_setting_that_says_what_is_left_is_dropped(override):
    assert load_config([], [override]) == load_config([])


@pytest.mark.parametrize(
    "override",
    [
        "autoencoder.writes=chunks",
        "autoencoder.rate=diffusion",
        "autoencoder.clean_latents=0.2",
        "chunking.learned_form=hnet",
        "prior.one_step=energy",
        "diffusion.target=eps",
        "generation.scheduler=energy",
        "generation.scheduler=flow",
        "data.cache_latents=true",
        "prior.self_conditioning=0.5",
    ],
)
def test_a_form_that_was_removed_is_refused_by_name(override, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"^command line: {override} is a form that was removed: .* train again$"
    ):
        load_config([], [override])
    section, key, value = re.split("[.=]", override, maxsplit=2)
    file = tmp_path / "old.yaml"
    file.write_text(f"{section}: {{{key}: {value}}}")
    with pytest.raises(ConfigError, match=rf"old.yaml:1:\d+: {override} is a form"):
        load_config(file)
    with pytest.raises(ConfigError, match=rf"settings: {override} is a form"):
        section_from_dict(type(getattr(Config(), section)), {key: value})


def test_a_saved_section_with_retired_settings_loads():
    old = to_dict(PriorConfig()) | {"one_step": "none", "energy": {"width": 128, "samples": 8}}
    assert section_from_dict(PriorConfig, old) == PriorConfig()


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        (
            "chunking: {strategy: word}",
            "chunking.strategy must be one of fixed, words, .*phrase, or your own module:Class, got 'word'",
        ),
        (
            "autoencoder: {encoder: {blocks: [mlp]}}",
            "autoencoder.encoder.blocks must be 'recurrent' or 'attention', got 'mlp'",
        ),
    ],
)
def test_a_wrong_choice_is_refused_with_all_right_ones(tmp_path, text, choices):
    assert re.search(choices, refusal(tmp_path, text))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("training.gradient_checkpointing", ("no", "off", "1", "")),
        ("data.lanes", ("0", "-1", "0x10", "4.0", str(2**63))),
        ("generation.temperature", ("nan", "-inf", "1e300", "-1", "warm")),
        ("training.ema_decay", ("1", "-0.1", "nan")),
    ],
)
def test_a_number_without_sense_and_another_word_for_false_are_refused(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^command line: {key} must be .*, got "):
            load_config([], [f"{key}={value}"])


def test_settings_below_a_stage_keep_the_defaults_of_that_stage():
    config = load_config([], ["training.prior.steps=7"])
    assert config.training.prior == changed(Config().training.prior, steps=7)
    assert config.training.prior.learning_rate == 8e-3


def test_a_changed_section_is_checked_and_keeps_its_fields():
    config = load_config([], ["seed=3", "prior.width=128"])
    assert to_dict(changed(config, seed=4)) == to_dict(config) | {"seed": 4}
    with pytest.raises(ConfigError, match=r"^prior\.layers must be greater than 0, got 0$"):
        changed(config.prior, layers=0)
    with pytest.raises(ConfigError, match=r"^prior\.width must be a whole number in digits, got '8'$"):
        changed(config.prior, width="8")
    with pytest.raises(ConfigError, match=r"^prior\.layer is no setting, got 2$"):
        PriorConfig(layer=2)
    with pytest.raises(ConfigError, match=r"^seed must be "):
        Config(seed=-1)
    with pytest.raises(ValueError, match="frozen"):
        config.prior.width = 8


def test_a_saved_section_is_refused_under_its_full_key():
    with pytest.raises(ConfigError, match=r"^settings: prior\.layers must be greater than 0, got 0$"):
        section_from_dict(PriorConfig, {"layers": 0})
    with pytest.raises(ConfigError, match=r"^settings: unknown key 'prior\.layer'; .* 'prior\.layers'$"):
        section_from_dict(PriorConfig, {"layer": 1})
    with pytest.raises(ConfigError, match=r"^settings: prior\.width must be divisible"):
        section_from_dict(PriorConfig, {"width": 6})


def test_a_gated_mlp_without_a_hidden_unit_is_refused():
    with pytest.raises(ConfigError, match=r"decoder.mlp_ratio must be at least 0.25, got 1e-30"):
        load_config([], ["autoencoder.decoder.mlp_ratio=1e-30"])
