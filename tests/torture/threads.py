"""Resuming with another number of threads is allowed, and said: sums round differently then."""

from __future__ import annotations

import torch

from tests.torture import children, small
from tests.torture.flips import stop_early
from tests.torture.trial import Trial

TOLERANCE = 1e-3  # bits per character, over the thirty steps that follow


def torture(trial: Trial) -> None:
    text = small.write_text(trial.folder)
    straight = small.train_straight(trial.folder / "straight", text, ("autoencoder",))
    for threads in (2, 1):
        folder = stop_early(trial.folder / str(threads), text)

        def work(folder=folder, threads=threads) -> int:
            torch.set_num_threads(threads)
            return small.train(folder, text, "autoencoder", resume=True)()

        status = children.run(work, folder / "resumed.log")
        said = (folder / "resumed.log").read_text()
        wrong = [f"ended with {status}: {said[-300:]}"] if status else []
        if ("resuming with 2 threads instead of 1" in said) != (threads == 2):
            wrong.append("warned without reason" if threads == 1 else "did not warn")
        if threads == 1:
            wrong += small.differences(folder, straight, "autoencoder")
        lines = zip(
            small.metrics(folder, "autoencoder", False),
            small.metrics(straight, "autoencoder", False),
            strict=True,
        )
        apart = max(abs(a[name] - b[name]) for a, b in lines for name in ("decoder", "latent"))
        if apart > TOLERANCE:
            wrong.append(f"losses are {apart:g} apart")
        if threads == 2:
            trial.note = f"with another number losses at most {apart:.1e} bits per character apart"
        trial.record(f"{threads} threads instead of 1", wrong)
