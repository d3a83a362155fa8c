"""Where a model lies that is asked for by name: a folder here, one that comes with hldm, or one of the hub.

A folder may be a pipeline, a run such as runs/demo, or what `hldm export` wrote. Knows no model.
"""

from __future__ import annotations

import re
from pathlib import Path

from hldm.runs import hub
from hldm.runs.folder import shipped

INDEX = "model_index.json"
SHIPPED = ("small", "small-twin")
_HUB_ID = re.compile(r"(?!runs/)[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def pipeline_of(folder: Path) -> Path:
    """The pipeline of a run; the folder itself where it is one."""
    return folder if (folder / INDEX).is_file() else folder / "pipeline"


def find_model(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a run or pipeline. A folder here that holds one comes first, then SHIPPED, then `owner/name`.

    revision, token, cache_dir, local_files_only: of the hub, see `hldm.runs.hub.download`
    Raises FileNotFoundError, one line that says what was tried.
    """
    folder = Path(name)
    if (pipeline_of(folder) / INDEX).is_file():
        found = folder
    elif str(name) in SHIPPED:
        found = shipped(str(name))
    elif not folder.exists() and _HUB_ID.fullmatch(str(name)):
        return hub.download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    else:
        what = "is no folder here"
        if folder.is_dir():
            what = "holds no trained model: run hldm train"
            if (folder / "autoencoder").is_dir():
                what = "has no trained prior: run train_diffusion.py with its --config and --name"
        raise FileNotFoundError(
            f"{name} {what}, or take one that comes with hldm ({', '.join(SHIPPED)}) or one of the hub (owner/name)"
        )
    if revision is not None:
        raise ValueError(
            f"{name} is a folder, which has no revision {revision!r}: that is of the hub's owner/name"
        )
    return found
