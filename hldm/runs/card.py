"""The card of a model to share: README.md with the front matter that hubs read. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

CARD = "README.md"
KINDS = {
    False: "a latent-diffusion language model: it draws a latent for the next chunk of text by denoising, and writes "
    "that chunk's bytes from it",
    True: "a plain autoregressive language model over bytes, the baseline (`twin`) of a latent-diffusion model",
}
LIMITS = (
    "It knows the text it was trained on and nothing else. It was not tuned to follow instructions or to be safe: what "
    "it writes may be false, and as offensive as that text is."
)


def model_card(
    name: str,
    parameters: int,
    *,
    is_twin: bool,
    licence: str = "",
    sections: Mapping[str, str] | None = None,
    is_run: bool = False,
) -> str:
    """Markdown that says what a model is, how it is used, and whatever else is known of it.

    licence: SPDX in lower case, "" where nobody said;  sections: more of the page, text by heading
    is_run: whether it has what evaluate, diagnose and judge ask for, beside the weights
    """
    head = {
        "license": licence or "unknown",
        "library_name": "hldm",
        "pipeline_tag": "text-generation",
        "tags": ["hldm", "byte-level", "griffin", *(() if is_twin else ("latent-diffusion",))],
    }
    use = f"""```python
from hldm import HLDMPipeline

pipe = HLDMPipeline.from_pretrained({name!r})
print(pipe("And so", max_characters=200).texts[0])
```"""
    if is_run:
        commands = [f"hldm generate --run {name} --prompt 'And so'"]
        commands += [f"hldm evaluate --run {name} --text FILE"]
        commands += [] if is_twin else [f"hldm diagnose --run {name} --text FILE"]
        commands += [f"hldm judge --run {name} --text FILE"]
        use += "\n\n```\n" + "\n".join(commands) + "\n```"
    use += "\n\nThe weights are safetensors; loading them runs no code of this folder."
    parts = {"Use": use, **(sections or {}), "Limits": LIMITS}
    if not licence:
        parts["Licence"] = "Not said by those who shared it: ask them before you build on it."
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in parts.items())
    front = yaml.safe_dump(head, sort_keys=False)
    return f"---\n{front}---\n\n# {name}\n\n{parameters:,} parameters, {KINDS[is_twin]}.\n\n{body}\n"
