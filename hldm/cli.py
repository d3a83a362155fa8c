"""The command line: `hldm COMMAND`, and the scripts, each one of its commands under a name of its own.

Bad input ends in one line on standard error and exit code 2, never in a traceback. Imports no torch by itself.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated

import typer

import hldm
from hldm import plugins
from hldm.commands import benchmarks, drafting, editing, measuring, score, sharing, training, writing
from hldm.commands import jepa as jepa_commands
from hldm.commands import memory as memory_commands
from hldm.commands import steering as steering_commands
from hldm.commands.candidates import candidates
from hldm.commands.decoding import decoding
from hldm.commands.far import far
from hldm.commands.frontier import frontier
from hldm.commands.playground import playground
from hldm.commands.report import report
from hldm.commands.summaries import summaries
from hldm.commands.train import train
from hldm.commands.uncompress import uncompress
from hldm.config import ConfigError
from hldm.doctor import doctor
from hldm.runs.exits import guarded
from hldm.sources.notes import each_once

app = typer.Typer(name="hldm", rich_markup_mode=None)
for command in (  # in the order of the help
    training.demo,
    train,
    training.train_autoencoder,
    training.train_diffusion,
    writing.generate,
    editing.fill,
    editing.edit,
    editing.interpolate,
    drafting.draft,
    measuring.evaluate,
    score.score,
    benchmarks.pairs,
    measuring.diagnose,
    measuring.rate_curve,
    measuring.chunkers,
    frontier,
    jepa_commands.similarity,
    uncompress,
    summaries,
    measuring.judge,
    candidates,
    decoding,
    memory_commands.codebook,
    far,
    report,
    playground,
    writing.chunk,
    measuring.bench,
    sharing.export,
    training.sizes,
    doctor,
):
    app.command()(command)
app.command(context_settings=benchmarks.PASSED_ON)(benchmarks.lm_eval)
app.add_typer(jepa_commands.app, name="jepa")
app.add_typer(steering_commands.app, name="steer")
app.add_typer(memory_commands.app, name="memory")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"hldm {hldm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it and stop")
    ] = False,
) -> None:
    """A latent-diffusion hierarchical language model."""


def main(argv: Sequence[str] | None = None) -> int:
    """`hldm COMMAND ...`; without a command, its help. Returns the exit code, see `hldm.runs.exits.guarded`."""
    return _run(app, "hldm", argv)


def _run_script(command: Callable[..., int | None], name: str, argv: Sequence[str] | None = None) -> int:
    """One command, which calls itself by the script's name."""
    script = typer.Typer(add_completion=False, rich_markup_mode=None)
    script.command()(command)
    return _run(script, name, argv)


train_autoencoder = partial(_run_script, training.train_autoencoder, "train_autoencoder.py")
train_diffusion = partial(_run_script, training.train_diffusion, "train_diffusion.py")
generate = partial(_run_script, writing.generate, "generate.py")
evaluate = partial(_run_script, measuring.evaluate, "python -m hldm.evaluation")


def jepa(argv: Sequence[str] | None = None) -> int:
    """`python -m hldm.jepa`."""
    return _run(jepa_commands.app, "python -m hldm.jepa", argv)


_parser = cache(typer.main.get_command)  # made once: for the commands of `app` it takes a fifth of a second


def _run(commands: typer.Typer, name: str, argv: Sequence[str] | None) -> int:
    """Parse and run. Not by typer's own main: errors, signals and exit codes are those of `guarded`."""
    arguments = (sys.argv[1:] if argv is None else [*argv]) or (["--help"] if commands is app else [])
    parser = _parser(commands)
    if "_HLDM_COMPLETE" in os.environ:  # a shell asks what the word under its cursor may become
        parser.main(prog_name=name)

    def work() -> int:
        try:
            made = parser.make_context
            with (
                plugins.scope(),
                each_once(),
                made(name, arguments, help_option_names=["-h", "--help"]) as context,
            ):
                return parser.invoke(context) or 0
        except typer.Exit as end:  # after --help or --version
            return end.exit_code
        except typer.TyperException as error:
            raise ConfigError(error.format_message()) from None

    code = guarded(work)
    if code > 128 and argv is None:
        # A signal came anywhere, perhaps to a library that was half made: its destructors are not run.
        atexit._run_exitfuncs()
        os._exit(code)
    return code
