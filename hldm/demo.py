"""`make demo`: from raw text to generated text, the model and its twin, in one table."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from hldm.config import Config, load_config
from hldm.training.sizes import require_room

PROMPTS = 3


def run_demo(path: Path, name: str | None = None, root: Path = Path("runs")) -> None:
    """Train what is not trained yet, evaluate, write. Leaves runs/<name>, runs/<name>-twin."""
    began = time.monotonic()
    name = name or ("demo" if path.stem == "tiny" else f"demo-{path.stem}")
    config = replace(load_config([path]), name=name)
    twin = replace(load_config([path.with_name(f"{path.stem}-twin.yaml")]), name=f"{name}-twin")

    for planned, stage in ((config, "autoencoder"), (config, "prior"), (twin, "autoencoder")):
        require_room(planned, stage, root)  # before the first of them takes an hour

    from hldm.training.stages import train_run

    train_run(config, root=root)
    train_run(twin, root=root)

    from hldm.evaluation.evaluate import compare, evaluate_run
    from hldm.runs.reports import save_report

    columns = {}
    for label, run in (("model", name), ("twin", twin.name)):
        print(f"evaluating {root / run} on the test text", flush=True)
        columns[label] = evaluate_run(root / run)
        save_report(root / run / "evaluation.json", columns[label])
    _write(config, root / name)
    print(compare(columns))
    minutes = (time.monotonic() - began) / 60
    print(f"\n{minutes:.1f} minutes. Everything is in {root / name} and {root / twin.name}.")
    print(f'Next: python generate.py --run {root / name} --prompt "And the king said"')


def _write(config: Config, folder: Path) -> None:
    """Three continuations of held-out prompts."""
    from hldm.evaluation.prompts import held_out_prompts, prompt_chunker
    from hldm.generation.pipeline import HLDMPipelineOutput, read_pipeline
    from hldm.text.bytes import printable

    pipeline = read_pipeline(folder / "pipeline")
    chunker = prompt_chunker(pipeline.autoencoder)
    prompts = [
        prompt for prompt, _ in held_out_prompts(config, chunker, "test", PROMPTS, prompt_characters=80)
    ]
    output = pipeline(prompts, max_characters=240, seed=config.seed)
    assert isinstance(output, HLDMPipelineOutput)
    for prompt, text in zip(prompts, output.texts, strict=True):
        print(printable(f"\n{prompt.decode(errors='replace')} >>>{text}"))
    print()
