"""Every file of a checkpoint cut, longer, emptied, zeroed, missing or swapped: found out, the one before is used."""

from __future__ import annotations

from itertools import combinations

from hldm.runs.checkpoints import checkpoints_in, load_checkpoint
from tests.torture import small
from tests.torture.flips import check_found_out, stop_early
from tests.torture.trial import Trial


def torture(trial: Trial) -> None:
    stopped = stop_early(trial.folder / "stopped", small.write_text(trial.folder))
    folder = small.stage_folder(stopped, "autoencoder")
    newest = max(checkpoints_in(folder).items())[1]
    files = sorted(newest.iterdir())
    damages: list[tuple[str, dict]] = []  # what is done, and what the files hold then; None: missing
    for file in files:
        data = file.read_bytes()
        for cut in (0, 1, 8, len(data) // 2, len(data) - 1):
            damages.append((f"{file.name} cut to {cut} bytes", {file: data[:cut]}))
        damages.append((f"{file.name} a byte longer", {file: data + b"\0"}))
        damages.append((f"{file.name} zeroed", {file: bytes(len(data))}))
        damages.append((f"{file.name} deleted", {file: None}))
    for one, two in combinations(files, 2):
        swapped = {one: two.read_bytes(), two: one.read_bytes()}
        damages.append((f"{one.name} and {two.name} swapped", swapped))
    for injection, damage in trial.sample(damages):
        whole = {file: file.read_bytes() for file in damage}
        for file, data in damage.items():
            file.write_bytes(data) if data is not None else file.unlink()
        trial.record(injection, check_found_out(folder))
        for file, data in whole.items():
            file.write_bytes(data)
    assert load_checkpoint(newest)  # everything has been put back: each damage was alone
    trial.note = f"{len(files)} files"
