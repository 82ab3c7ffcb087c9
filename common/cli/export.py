"""`tunery export`: merged models of a finished job."""

from __future__ import annotations

from typing import Annotated

import typer

from common.cli import state

FORMS = ("merged", "merged_dequantized", "merged_4bit")


def export(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(help="Id of a job that succeeded.", metavar="JOB")],
    forms: Annotated[
        list[str] | None,
        typer.Option("--as", help=f"{', '.join(FORMS)}. Repeat it for more; otherwise merged.", metavar="FORM"),
    ] = None,
    priority: Annotated[int, typer.Option(help="-100 to 100; higher runs first.")] = 0,
    watching: Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end.")] = False,
    output: state.Output = None,
) -> None:
    """Merge a finished job's adapter into its base, on a worker.

    This is a job of its own. `tunery download JOB` fetches the merged model with the adapter; what is there already is
    not made again.
    """
    from common.cli import boards, screen
    from common.cli.watch import conclude, follow

    options = state.of(ctx)
    with options.connect() as client:
        made = client.jobs.export(job, forms or "merged", priority=priority)
        if made.status != "succeeded":
            typer.echo(f"{made.id}: merging {screen.sentence(job)} as {', '.join(made.export)}", err=options.as_json)
        if watching:
            conclude(follow(client, made.id, options.as_json), options.as_json)
    if options.as_json:
        screen.as_json(made)
    elif made.status == "succeeded":
        typer.echo(f"made already, by {made.id}: `tunery download {job}` fetches it")
    else:
        typer.echo(f"{screen.sentence(boards.phase(made))}; `tunery watch {made.id}` shows its progress")
