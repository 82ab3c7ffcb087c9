"""The commands of `tunery`, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from common.cli import (
    admin,
    chat,
    datasets,
    demo,
    doctor,
    jobs,
    keys,
    quota,
    records,
    servers,
    state,
    webhooks,
    workers,
)
from common.cli.cancel import cancel
from common.cli.download import download
from common.cli.estimate import estimate
from common.cli.export import export
from common.cli.failures import Guarded
from common.cli.serve import serve
from common.cli.submit import submit
from common.cli.watch import logs, watch

app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="TUNERY_URL and TUNERY_API_KEY name the server; without them, the one that `tunery up` started here.\n\n"
    "Exit codes: 0 done, or the job succeeded; 1 the job, the server or a part of the installation failed; 2 the "
    "command, a file or the request is wrong; 3 the job was cancelled; 130 Ctrl-C, and the job goes on.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"tunery {metadata.version('tunery')}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option("--url", help="Address of the server; otherwise TUNERY_URL.")] = None,
    data_dir: state.DataDir = None,
    output: Annotated[
        state.Format, typer.Option("--output", "-o", help="Write a table, or JSON for programs.")
    ] = state.Format.table,
    debug: Annotated[bool, typer.Option("--debug", help="Show where errors come from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune language models on your own GPUs."""
    ctx.obj = state.State(url, data_dir, output is state.Format.json, debug)


_COMMANDS = (
    *(submit, estimate, jobs.ls, jobs.show, watch, logs, cancel, jobs.pause, jobs.resume, jobs.retry, export, download),
    *(records.metrics, records.checkpoints, records.precision, records.rm),
    *(quota.reorder, quota.quota, workers.models),
    *(servers.up, servers.worker, servers.sweeper, serve, chat.chat, doctor.doctor, demo.demo),
)
for _command in _COMMANDS:
    app.command()(_command)
_GROUPS = (
    *((datasets, "datasets"), (workers, "workers"), (webhooks, "webhooks")),
    *((keys, "keys"), (admin, "admin")),
)
for _group, _name in _GROUPS:
    app.add_typer(_group.app, name=_name)
