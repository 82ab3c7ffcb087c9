"""`tunery serve`: chat completions over one base and the finished jobs of an installation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.cli import state

FourBit = Annotated[
    bool | None,
    typer.Option(
        "--load-in-4bit/--no-load-in-4bit",
        help="Hold the base in 4 bit or in 16; otherwise 4 on a GPU and 16 without.",
        show_default=False,
    ),
]


def serve(
    ctx: typer.Context,
    base: Annotated[
        str, typer.Option("--base", help="A folder, a name under TUNERY_MODEL_DIR, or org/name[@revision].")
    ],
    host: Annotated[str | None, typer.Option(help="Address to listen on; otherwise TUNERY_SERVE_HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; otherwise TUNERY_SERVE_PORT.", min=0, max=65535)
    ] = None,
    load_in_4bit: FourBit = None,
) -> None:
    """Serve chat completions by a base and its finished jobs.

    Answers POST /v1/chat/completions with a base model and the finished jobs that were trained on it.

    In a request, `model` names a job, a weighted sum of jobs (job_a:0.7+job_b:0.3), or the base. Any OpenAI client will
    do, with this address and an API key of Tunery. It finds the jobs by the server's settings, or by those of the
    `tunery up` that runs here.
    """
    require_worker()
    arguments = ["--base", base, *method(load_in_4bit)]
    arguments += [] if host is None else ["--host", host]
    arguments += [] if port is None else ["--port", str(port)]
    sys.stdout.flush()
    os.execve(sys.executable, [*SERVER, *arguments], environment(state.of(ctx).data_dir))


# -P: a folder named `worker` where the user happens to stand must not be imported for ours.
SERVER = (sys.executable, "-P", "-m", "worker.serve")


def require_worker() -> None:
    """Raise ModuleNotFoundError, which names the extra to install, where models cannot be run."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def method(load_in_4bit: bool | None) -> list[str]:
    """Return the server's arguments that say in how many bits it holds the base."""
    return [] if load_in_4bit is None else ["--method", "qlora" if load_in_4bit else "lora"]


def environment(data_dir: Path | None) -> dict[str, str]:
    """Return the environment for the server: this process's, and of the `tunery up` here what that leaves open."""
    from common import settings
    from common.client.address import environment_of_up

    of_up = {} if settings.load().database_url else environment_of_up(data_dir or settings.client_address()[2])
    return {**of_up, **settings.child_environment({})}
