"""Random bit flips over all files of a checkpoint of a real training: each found out, the one before is used."""

from __future__ import annotations

import shutil
from pathlib import Path

from hldm.runs.checkpoints import CheckpointError, checkpoints_in, load_checkpoint, newest_checkpoint
from tests.torture import children, small
from tests.torture.trial import Trial

FLIPS = 500
RESUMES = 5  # of them also resumed by the training itself, to the end


def torture(trial: Trial) -> None:
    text = small.write_text(trial.folder)
    straight = small.train_straight(trial.folder / "straight", text, ("autoencoder",))
    stopped = stop_early(trial.folder / "stopped", text)
    folder = small.stage_folder(stopped, "autoencoder")
    newest = max(checkpoints_in(folder).items())[1]
    files = sorted(newest.iterdir())
    resumes = trial.count(RESUMES)
    for number in range(trial.count(FLIPS)):
        file = trial.draw.choice(files)
        data = file.read_bytes()
        at, bit = trial.draw.randrange(len(data)), trial.draw.randrange(8)
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        file.write_bytes(flipped)
        wrong = check_found_out(folder)
        if number < resumes:
            wrong += check_resumes(stopped, trial.folder / "resumed", text, straight)
        trial.record(f"bit {bit} of byte {at} of {file.name}", wrong)
        file.write_bytes(data)
    assert load_checkpoint(newest)  # everything has been put back: each flip was alone
    trial.note = f"over {len(files)} files; {resumes} resumed to the end"


def stop_early(folder: Path, text: Path, at: int = 20) -> Path:
    """A run stopped by its own kill before step `at` + 1; it keeps that step and the one half way."""
    from hldm.training.trainer import Trainer
    from tests.torture.disk import die

    small.start_folder(folder, "autoencoder")
    step = Trainer.step

    def work() -> int:
        def step_or_die(self: Trainer, progress: float) -> dict[str, float] | None:
            if self.totals.steps == at:
                die()
            return step(self, progress)

        Trainer.step = step_or_die  # type: ignore[method-assign]
        return small.train(folder, text, "autoencoder", f"checkpoint.every={at // 2}")()

    children.run(work, folder / "log")
    assert list(checkpoints_in(small.stage_folder(folder, "autoencoder"))) == [at // 2, at]
    return folder


def check_found_out(folder: Path) -> list[str]:
    """The newest checkpoint is refused when asked for, and passed over with one line that names it."""
    (before, _), (damaged, path) = checkpoints_in(folder).items()
    wrong = []
    try:
        load_checkpoint(path)
        wrong.append("was loaded")
    except CheckpointError as error:
        if str(path) not in str(error):
            wrong.append(f"the error does not name {path.name}: {error}")
    said: list[str] = []
    found = newest_checkpoint(folder, said.append)
    if found is None or found.step != before:
        wrong.append(f"step {found and found.step} was used instead of {before}")
    if len(said) != 1 or path.name not in said[0]:
        wrong.append(f"step {damaged} was passed over with {said}")
    return wrong


def check_resumes(stopped: Path, folder: Path, text: Path, straight: Path) -> list[str]:
    """A run whose newest checkpoint is damaged goes on from the one before and ends as if nothing had been."""
    shutil.copytree(stopped, folder)
    status = children.run(small.train(folder, text, "autoencoder", resume=True), folder / "resumed.log")
    said = (folder / "resumed.log").read_text()
    wrong = (
        small.differences(folder, straight, "autoencoder")
        if status == 0
        else [f"ended with {status}: {said}"]
    )
    if "falling back to the checkpoint before it" not in said:
        wrong.append("the resumed training did not say that it falls back")
    shutil.rmtree(folder)
    return wrong
