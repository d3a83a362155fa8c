"""`python -m tests.torture`: run the faults, print a table, exit 1 when any promise was broken."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

FAULTS = ("strace", "enospc", "tmpfs", "flips", "truncations", "threads", "memory")
FAULTS += ("signals", "matrix", "fuzz", "kill", "environment", "files", "settings", "libraries")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--only", default=",".join(FAULTS), help=f"some of {','.join(FAULTS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the injections (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--seed", type=int, default=0, help="of times, positions and samples (default 0)")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    if unknown := sorted(set(names) - set(FAULTS)):
        parser.error(f"no fault called {', '.join(unknown)}: choose from {', '.join(FAULTS)}")
    if not 0 < chosen.scale <= 1:
        parser.error(f"--scale must lie in (0, 1], got {chosen.scale:g}")

    # Before torch is imported: a fork of a process with threads may hang, and all runs must have as many.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    figures = {}
    print(f"{'fault':<12} {'tried':>7} {'survived':>8} {'bad':>5} {'seconds':>8}", flush=True)
    for name in names:
        figures[name] = found = run_fault(name, chosen.scale, chosen.seed)
        cells = (
            f"{found['tried']:>7,} {found['survived']:>8,} {len(found['bad']):>5,} {found['seconds']:>8.1f}"
        )
        print(f"{name:<12} {cells}  {found['note']}", flush=True)
        for line in found["bad"][:5]:
            print(f"    {line}", flush=True)
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"scale": chosen.scale, "seed": chosen.seed, "faults": figures}) + "\n"
        )
    return int(any(found["bad"] for found in figures.values()))


def run_fault(name: str, scale: float, seed: int) -> dict:
    """One fault's figures: tried, survived, bad (a line each), seconds, note."""
    from tests.torture.trial import Skipped, Trial

    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"torture-{name}-"))
    trial = Trial(name, scale, seed, folder)
    try:
        importlib.import_module(f"tests.torture.{name}").torture(trial)
    except Skipped as reason:
        trial.note = f"skipped: {reason}"
    except Exception:  # a fault that cannot be tried is not survived; the others still run
        trial.bad.append(traceback.format_exc().replace("\n", "\n    "))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bad = trial.bad
    survived = max(0, trial.tried - len(bad))
    seconds = round(time.monotonic() - began, 1)
    return {"tried": trial.tried, "survived": survived, "bad": bad, "seconds": seconds, "note": trial.note}


if __name__ == "__main__":
    sys.exit(main())
