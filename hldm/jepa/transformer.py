"""A transformer of Hugging Face's library as the encoder of sentences: `sentences.encoder=hf:FOLDER`.

Its tokens take the place of chunks, its last hidden states that of their vectors. Read from a folder on this machine:
weights as safetensors, a fast or slow tokenizer, never code of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hldm.config import ConfigError
from hldm.jepa.config import JepaConfig
from hldm.sources.notes import first_line, some
from hldm.text.windows import Window

HF = "hf:"  # before the folder, in the setting
LONGEST_TOKENS = 256  # of a text; a longer one keeps its end, which is nearest to what is predicted


class TokenVectors(NamedTuple):
    """What a transformer makes of texts."""

    vectors: Tensor  # (b n z) of each token
    mask: Tensor  # (b n) bool: tokens, and not padding


class TextTransformer(nn.Module):
    """Windows of whole texts to one vector a token."""

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        # its output is not read: it would be a parameter that never has a gradient
        if isinstance(pooler := getattr(model, "pooler", None), nn.Module):
            pooler.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: Path) -> TextTransformer:
        """The transformer of a folder. Raises FileNotFoundError or ConfigError, one line, where there is none.

        On torch's meta device its shape alone.
        """
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # of a file that is read in a second
        require_transformer(folder)
        tokenizer = _read_tokenizer(folder)
        if torch.get_default_device().type == "meta":
            return cls(AutoModel.from_config(AutoConfig.from_pretrained(folder)), tokenizer)
        try:
            model, info = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"{folder}: its weights cannot be read as safetensors: {first_line(error)}"
            ) from None
        # the library draws what is missing; the pooler is not read
        if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
            raise ConfigError(f"{folder}: its weights lack {some(missing)}: save the whole model there")
        return cls(model.float(), tokenizer)

    @property
    def vector(self) -> int:
        """z, the width of a token's vector."""
        return int(self.model.config.hidden_size)

    def forward(self, window: Window) -> TokenVectors:
        """Vectors of every row's tokens, special ones included. Bytes that are no UTF-8 become U+FFFD."""
        rows = zip(window.bytes.tolist(), window.length.tolist(), strict=True)
        texts = [bytes(row[:size]).decode(errors="replace") for row, size in rows]
        limits = {"truncation": True, "max_length": min(LONGEST_TOKENS, self.tokenizer.model_max_length)}
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt", **limits).to(window.bytes.device)
        return TokenVectors(self.model(**tokens).last_hidden_state, tokens["attention_mask"].bool())

    def save_pretrained(self, folder: str) -> None:
        """Weights and tokenizer, so that the folder is one that `from_pretrained` and the library read."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def folder_of(config: JepaConfig) -> Path | None:
    """The folder that the settings name; None for the encoder of the family."""
    name = config.sentences.encoder
    return Path(name.removeprefix(HF)) if name else None


def require_transformer(folder: Path, vector: int | None = None) -> None:
    """Raise FileNotFoundError or ConfigError, one line, unless the folder holds an encoder with its tokenizer.

    vector: what its hidden size must be. Reads no weights.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no transformer: a folder with config.json, model.safetensors and a tokenizer is needed"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json describes no transformer: {first_line(error)}") from None
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise ConfigError(
            f"{folder} holds a {config.model_type}, which does not make one vector a token: an encoder such as BERT or "
            "RoBERTa, or a decoder such as GPT-NeoX, does"
        )
    _read_tokenizer(folder)
    if vector is not None and config.hidden_size != vector:
        raise ConfigError(
            f"vector must be {config.hidden_size}, the hidden size of {folder}, got {vector}: set "
            f"vector={config.hidden_size}"
        )


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    way_out = "save it there by its save_pretrained"
    # the library makes an empty one where a folder has none
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ConfigError(f"{folder} has no tokenizer, such as tokenizer.json: {way_out}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, truncation_side="left")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: its tokenizer cannot be read: {first_line(error)}; {way_out}") from None
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"{folder}: its tokenizer has no pad token, and rows of a batch differ in length: set one, and {way_out}"
        )
    return tokenizer
