"""kill -9 at every system call of one save: afterwards the last acknowledged save is there, or the one in flight.

The calls are those that strace sees, less the ones known to change nothing, so a new kind of call is a new
crash point. Where strace is missing the same process dies at each call of Python's that changes the disk.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import torch

from hldm import cli
from hldm.runs.checkpoints import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from tests.torture import children, disk
from tests.torture.trial import Trial

NAMES = (
    "read pread64 readv lseek mmap munmap mprotect mremap madvise brk close fcntl ioctl dup dup2 dup3 "
    "stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat "
    "getcwd getdents getdents64 getpid gettid getppid getuid geteuid kill tgkill futex exit exit_group "
    "rt_sigaction rt_sigprocmask rt_sigreturn restart_syscall sched_yield sched_getaffinity "
    "clock_gettime getrandom uname sysinfo poll ppoll umask prlimit64 getrusage times rseq "
    "set_robust_list clone clone3 pipe pipe2 select pselect6 "
)
READING = set(NAMES.split())  # change nothing on a disk
# a call and the last component of its last path: of a descriptor, by strace -y, or in quotes
ORDERED = re.compile(r".* (fsync|rename|rmdir)\(.*/([^/]+)[>\"]\) += 0$")
CALL = re.compile(r"^\d+ +(\w+)\(", re.M)


def torture(trial: Trial) -> None:
    points = crash_points(trial.folder)
    if has_strace():
        trial.record("order on disk", order_faults((trial.folder / "strace.log").read_text()))
    for call, number in trial.sample(points):
        folder = trial.folder / f"{call}-{number}"
        status, said = save_under(folder, call, number, "signal=KILL")
        wrong = [] if status == 137 else [f"was not killed, ended with {status}: {said}"]
        trial.record(f"{call} {number}", [*wrong, *check(folder, acknowledged="saved 2" in said)])
        shutil.rmtree(folder)
    calls = Counter(call for call, _ in points)
    trial.note = ", ".join(f"{call} {count}" for call, count in sorted(calls.items()))


def has_strace() -> bool:
    """Whether strace is there and may attach to our children."""
    if not shutil.which("strace"):
        return False
    probe = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True)
    return probe.returncode == 0


def crash_points(folder: Path) -> list[tuple[str, int]]:
    """Every call of one save that may change something, as (name, which one of that name)."""
    if not has_strace():
        return [
            ("any", number) for number in range(1, 1 + disk.calls_of(lambda: second_save(folder / "count")))
        ]
    log = folder / "strace.log"
    status, said = save_under(folder / "count", "", 0, "", log)
    if status:
        raise RuntimeError(f"a save that nothing disturbed ended with {status}: {said}")
    counts = Counter(CALL.findall(log.read_text()))
    return [(call, k) for call in sorted(counts) if call not in READING for k in range(1, counts[call] + 1)]


def order_faults(log: str) -> list[str]:
    """What a power cut could lose: something not synced before the rename, or a rename not before a delete.

    log: of one undisturbed save, by strace -y, which names the file behind every descriptor.
    """
    calls = [(found[1], found[2]) for found in map(ORDERED.match, log.splitlines()) if found]
    placed = calls.index(("rename", "step-000000002")) if ("rename", "step-000000002") in calls else 0
    before = [name for call, name in calls[:placed] if call == "fsync"]
    expected = {*(f"{stem}.safetensors" for stem in some_tensors(2)), "state.json", "MANIFEST.json"}
    wrong = [f"{name} is not synced before the rename" for name in sorted(expected - set(before))]
    if not before or not before[-1].startswith(".tmp-step-2-"):
        wrong.append("the folder is not synced, last, before the rename")
    if calls[placed + 1] != ("fsync", "checkpoints"):
        wrong.append("the folder above is not synced right after the rename")
    return wrong


def some_tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Four files, longer than a block, told apart by their step."""
    stems = ("model", "average", "optimizer-0", "carry")
    return {stem: {"w": torch.full((3000,), float(step)), "b": torch.full((7,), step)} for stem in stems}


def save(folder: Path, step: int) -> int:
    """Save and acknowledge."""
    save_checkpoint(folder, step, some_tensors(step), {"notes": f"{step}" * 5000}, keep=1)
    os.write(1, b"saved %d\n" % step)  # one call: acknowledged or not
    return 0


def second_save(folder: Path) -> int:
    """What is disturbed: the save of step 2, with all that it imports already imported, deleting step 1."""
    return cli.guarded(lambda: save(folder, 2))


def save_under(
    folder: Path, call: str, number: int, injected: str, log: Path | None = None
) -> tuple[int, str]:
    """Save step 1, then step 2 with `injected` at the call; the child's status and what it printed.

    Without a call, all calls are logged to `log`.
    """
    folder.mkdir()

    def work() -> int:
        save(folder, 1)
        if call == "any":
            return disk.disturb(lambda: second_save(folder), number, injected)
        os.kill(os.getpid(), signal.SIGSTOP)  # until strace is there
        return second_save(folder)

    child = children.fork(work, folder / "log")
    if call == "any":
        return children.wait(child, 300), (folder / "log").read_text()
    os.waitpid(child, os.WUNTRACED)
    what = [f"trace={call}", "-e", f"inject={call}:{injected}:when={number}"] if call else ["trace=all"]
    tracer = subprocess.Popen(
        ["strace", "-y", "-f", "-p", str(child), "-o", str(log or os.devnull), "-e", *what],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr
    attached = tracer.stderr.readline()
    os.kill(child, signal.SIGCONT)
    status = children.wait(child, 300)
    tracer.wait(timeout=300)
    tracer.stderr.close()
    if "attached" not in attached:
        raise RuntimeError(f"strace did not attach: {attached.strip()}")
    return status, (folder / "log").read_text()


def check(folder: Path, acknowledged: bool) -> list[str]:
    """Whether the newest checkpoint is a whole one of step 1 or 2, and the next save cleans up."""
    wrong: list[str] = []
    step = whole_step(folder, wrong)
    if step not in ((2,) if acknowledged else (1, 2)):
        wrong.append(f"the newest checkpoint is {step}")
    save_checkpoint(folder, 3, some_tensors(3), {}, keep=1, say=wrong.append)
    if left := temporaries(folder):
        wrong.append(f"the next save leaves {left}")
    return wrong


def whole_step(folder: Path, wrong: list[str]) -> int | None:
    """The step of the newest checkpoint, whose content must be that step's; damaged ones are wrong."""
    try:
        checkpoint = newest_checkpoint(folder, wrong.append)
    except CheckpointError as error:
        wrong.append(str(error))
        return None
    if checkpoint is None:
        return None
    expected = some_tensors(checkpoint.step)
    found = load_checkpoint(checkpoint.path).tensors
    same = found.keys() == expected.keys() and all(
        torch.equal(found[stem][name], tensor) for stem in expected for name, tensor in expected[stem].items()
    )
    return checkpoint.step if same else wrong.append(f"{checkpoint.path.name} holds something else")


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob(".*")]
