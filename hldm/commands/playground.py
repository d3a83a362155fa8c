"""The command that lets one write with a run in a browser."""

from __future__ import annotations

import signal
from typing import Annotated

from typer import Option

from hldm.commands.options import AllowCode, RunOrShipped
from hldm.runs.folder import shipped_run
from hldm.runs.location import find_model, pipeline_of
from hldm.runs.signals import Stopped


def playground(
    *,
    run: RunOrShipped = None,
    port: Annotated[int, Option(min=0, max=65535, help="port of 127.0.0.1; 0: any free one")] = 8123,
    allow_code: AllowCode = False,
) -> None:
    """A local page to write with a run.

    Chunk by chunk: redraw one, hold a latent, choose among candidates. It answers on this machine only.
    """
    folder = shipped_run() if run is None else find_model(run)
    from hldm.app.playground.server import Playground
    from hldm.generation.pipeline import read_pipeline

    pipeline = read_pipeline(pipeline_of(folder))
    try:
        server = Playground(pipeline, folder.resolve().name, port)
    except OSError as error:
        raise ValueError(
            f"port {port} of 127.0.0.1: {error.strerror}; choose another --port, 0 takes any"
        ) from None
    with server:
        print(f"{server.name} is at {server.address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        except Stopped as stopped:
            if stopped.signum != signal.SIGINT:
                raise
    print("the playground is closed")
