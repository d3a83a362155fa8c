"""Models of the Hugging Face hub, fetched and published. Whatever goes wrong there becomes one line.

Only JSON, YAML, safetensors and the card are fetched: nothing that could run. Knows no model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hldm.sources.hub import hub_failure
from hldm.sources.notes import first_line, note

FETCHED = ("*.json", "*.yaml", "*.safetensors", "README.md")


def is_offline() -> bool:
    """Whether the environment says to ask no hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def download(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a snapshot of `owner/name`, from the hub or from its cache on this machine.

    local_files_only: ask the cache alone; so does HF_HUB_OFFLINE, and so a hub that cannot be reached, which is said
    Raises FileNotFoundError, one line that says what was tried.
    """
    from huggingface_hub import constants, snapshot_download

    place = name if revision is None else f"{name}@{revision}"
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    said = {True: "local_files_only asks no hub", False: "HF_HUB_OFFLINE asks no hub"}[local_files_only]
    asks_hub = not (local_files_only or is_offline())
    if asks_hub:
        said = hub_failure()  # huggingface_hub itself would try for a minute
    given: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache}
    given["allow_patterns"] = list(FETCHED)
    if not said:
        try:
            return Path(snapshot_download(name, **given))
        except Exception as error:  # what the network layer raises has no common base
            said = _reason(error)
    try:
        found = Path(snapshot_download(name, **given, local_files_only=True))
    except Exception:
        raise FileNotFoundError(
            f"{place}: no folder of that name here, no copy in the cache {cache}, and not from the hub ({said}); a "
            "folder that was downloaded by hand loads by its path"
        ) from None
    if asks_hub:
        note(f"{place}: the copy in the cache {cache} is used ({said})")
    return found


def upload(
    folder: Path,
    name: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload an hldm model",
    create_pr: bool = False,
) -> str:
    """Publish a folder as `owner/name`, which is made where it is not there. Returns the address of the commit.

    Raises ValueError, one line.
    """
    from huggingface_hub import HfApi

    if is_offline():
        raise ValueError(f"{name}: HF_HUB_OFFLINE is set, so nothing is uploaded")
    try:
        api = HfApi(token=token)
        made = api.create_repo(name, private=private, exist_ok=True).repo_id
        given: dict[str, Any] = {"revision": revision, "commit_message": commit_message}
        return str(api.upload_folder(repo_id=made, folder_path=folder, create_pr=create_pr, **given))
    except Exception as error:
        raise ValueError(f"{name} could not be uploaded ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Why the hub did not do it, in a few words."""
    from huggingface_hub import errors

    for kind, words in (
        (errors.GatedRepoError, "access has to be asked for on its page; then pass token="),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private: pass token="),
        (errors.RevisionNotFoundError, "it has no such revision"),
    ):
        if isinstance(error, kind):
            return words
    return first_line(error)
