"""`tunery workers` and `tunery models`: who trains, and on what."""

from __future__ import annotations

from typing import Annotated

import typer

from common.cli import state

app = typer.Typer(invoke_without_command=True, help="List the workers; let one leave.")


@app.callback()
def workers(ctx: typer.Context, output: state.Output = None) -> None:
    """List the workers, or `drain` one."""
    if ctx.invoked_subcommand is None:
        _list(ctx)


@app.command("list")
def list_workers(ctx: typer.Context, output: state.Output = None) -> None:
    """List the workers, and when they were last heard."""
    _list(ctx)


@app.command()
def drain(
    ctx: typer.Context,
    worker: Annotated[str, typer.Argument(help="Id of the worker.", metavar="WORKER")],
    output: state.Output = None,
) -> None:
    """Let a worker leave.

    It takes no further job; one that runs is checkpointed and given back.
    """
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        found = client.workers.drain(worker)
    if options.as_json:
        screen.as_json(found)
    else:
        typer.echo(f"{found.id}: {screen.sentence(found.state)}")


def _list(ctx: typer.Context) -> None:
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        page = client.workers.list()
    if options.as_json:
        screen.as_json(page)
        return
    columns = [
        screen.Column("WORKER", lambda item: item.id),
        screen.Column("STATE", lambda item: item.state, styled=True),
        screen.Column("KIND", lambda item: item.kind, spare=1),
        screen.Column("DEVICE", lambda item: item.device_name or item.device, spare=2),
        screen.Column("MEMORY", lambda item: screen.size(item.vram_bytes), spare=6, right=True),
        screen.Column("FREE", lambda item: screen.size(item.free_bytes), spare=7, right=True),
        screen.Column("JOB", lambda item: item.job, spare=3),
        screen.Column("BASE", lambda item: item.base_model, spare=4),
        screen.Column("NAME", lambda item: item.name, spare=5),
        screen.Column("HEARD", lambda item: screen.ago(item.heartbeat_at), spare=3),
    ]
    screen.table(columns, page)
    if not page.data:
        screen.stderr().print("no workers: `tunery worker` starts one")


def models(ctx: typer.Context, output: state.Output = None) -> None:
    """List the base models that the server holds.

    Others are fetched from the hub when a job names them as org/name.
    """
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        page = client.base_models.list()
    if options.as_json:
        screen.as_json(page)
        return
    columns = [
        screen.Column("MODEL", lambda item: item.id),
        screen.Column("SOURCE", lambda item: item.source, spare=2),
        screen.Column("NAME", lambda item: item.name, spare=1),
        screen.Column("REVISION", lambda item: item.revision, spare=4),
        screen.Column("SIZE", lambda item: screen.size(item.bytes), spare=3, right=True),
    ]
    screen.table(columns, page)
