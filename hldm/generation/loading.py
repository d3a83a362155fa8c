"""A pipeline by the name of its run: a folder, or one of those that come with hldm."""

from __future__ import annotations

from pathlib import Path

from hldm.generation.pipeline import HLDMPipeline, read_pipeline
from hldm.runs.folder import shipped

SHIPPED = ("small", "small-twin")


def load_run(name: str | Path) -> HLDMPipeline:
    """The pipeline of a run folder, of a folder that is a pipeline, or of SHIPPED; a folder here comes first.

    Raises FileNotFoundError or ValueError, one line.
    """
    folder = Path(name)
    if str(name) in SHIPPED and not folder.exists():
        folder = shipped(str(name))
    return read_pipeline(folder if (folder / "model_index.json").is_file() else folder / "pipeline")
