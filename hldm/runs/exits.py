"""How a command ends: what a user can fix becomes one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable

from hldm.runs.signals import is_first_rank, leave_in_one_line
from hldm.sources.notes import TextNote
from hldm.text.bytes import printable

# what torch says, lower case: its CPU allocator, its own exceptions, mmap, C++, and a thread that finds no stack
OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
)


_PYTHONS_FORMAT = warnings.formatwarning


class RunEnded(RuntimeError):
    """A run that ends for a reason its message gives in one line. Each reason is a class with an exit code."""

    exit_code = 1
    is_agreed = True  # every rank ends in the same way, so that one of them says it


class Interrupted(RunEnded):
    """A signal asked a run to stop, and it can go on from what is saved."""

    def __init__(self, signum: int, path: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {path}: go on with --resume")
        self.exit_code = 128 + signum


def guarded(work: Callable[[], int]) -> int:
    """Run a command; errors that a user can fix, and signals, become one line and an exit code.

    2: bad input, or a file or disk that fails (also a full one);  3: numbers stay not finite;
    4: out of memory;  5: another process of the run hangs or has died;  128 + n: signal n.
    """
    return leave_in_one_line(lambda: _guarded(work))


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A note on the text as a sentence; any other warning as Python shows it."""
    if issubclass(category, TextNote):
        return f"note: {message}\n"
    return _PYTHONS_FORMAT(message, category, filename, lineno, line)


def _guarded(work: Callable[[], int]) -> int:
    warnings.formatwarning = _format_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # LANG=C must not stop a report that names a file
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = work()
        if sys.stdout is not None:  # None: closed by the caller
            sys.stdout.flush()  # a full disk is to be met here, not at exit
        return code
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        _drop_output()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # it is standard output that is full or closed
            _drop_output()
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return _out_of_memory(error)
        return _fail(_one_line(error), 2)
    except MemoryError as error:
        return _out_of_memory(error)
    except ImportError as error:
        return _fail(f"{_one_line(error)}: hldm doctor looks at the installation", 2)
    except RunEnded as error:
        code = _fail(str(error), error.exit_code, error.is_agreed)
        if not error.is_agreed and "RANK" in os.environ:
            # The process group's destructor would wait for what is still queued, a timeout for each.
            os._exit(code)
        return code
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            return _out_of_memory(error)
        if str(error).startswith(
            "Failed to import"
        ):  # diffusers: python -OO, or what a variable asks of a library
            return _fail(f"{_one_line(error)}: hldm doctor looks at the installation", 2)
        raise


def _out_of_memory(error: BaseException) -> int:
    return _fail(
        f"out of memory ({_one_line(error)}): raise training's accumulation and go on with --resume, or lower "
        "data.lanes or the widths; checkpoints are intact",
        4,
    )


def _drop_output() -> None:
    """Send what is still buffered nowhere: at exit it would fail once more, loudly."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int, agreed: bool = False) -> int:
    """Say why, and return the code. agreed: every rank ends in the same way, so that one of them says it."""
    if sys.stderr is not None and (not agreed or is_first_rank()):
        print(f"hldm: {printable(message)}", file=sys.stderr, flush=True)
    return code
