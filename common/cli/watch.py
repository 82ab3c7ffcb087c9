"""Follow a job to its end; the exit code is its result. Used by `watch`, `submit --watch`, `logs` and `demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import failures, state

if TYPE_CHECKING:
    from common.client import Job, Tunery

_CODES = {"succeeded": 0, "failed": failures.FAILED, "cancelled": failures.CANCELLED}


def watch(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")],
    after: Annotated[int, typer.Option(help="Leave out events up to this cursor.", min=0)] = 0,
    output: state.Output = None,
) -> None:
    """Show a job's progress until it ends. Ctrl-C detaches; the job goes on.

    The exit code is the job's result: 0 succeeded, 1 failed, 3 cancelled.
    """
    options = state.of(ctx)
    with options.connect() as client:
        ended = follow(client, job, options.as_json, after)
    conclude(ended, options.as_json)


def logs(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")],
    follow_on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    after: Annotated[int, typer.Option(help="Leave out events up to this cursor.", min=0)] = 0,
    output: state.Output = None,
) -> None:
    """Show what happened to a job, oldest first."""
    from common.cli import boards, screen
    from common.schemas.jobs import Event

    options = state.of(ctx)
    with options.connect() as client:
        if not follow_on and options.as_json:
            screen.as_json({"data": client.jobs.events(job, after)})
            return
        plain = boards.JsonLines() if options.as_json else boards.PlainLines(screen.stdout())
        updates = client.jobs.watch(job, after) if follow_on else client.jobs.events(job, after)
        for update in updates:
            if isinstance(update, Event):
                plain.show(update)


def follow(client: Tunery, job: str, as_json: bool, after: int = 0) -> Job:
    """Show a job until it has ended and return it. Ctrl-C says how to come back and leaves."""
    from common.cli import screen

    try:
        return shown_to_the_end(client, job, as_json, after)
    except KeyboardInterrupt:
        # A line for each command, so that it can be copied from a narrow terminal.
        console = screen.stderr()
        console.print(f"detached: {screen.sentence(job)} goes on")
        console.print(f"come back: tunery watch {screen.sentence(job)}", soft_wrap=True)
        console.print(f"stop it:   tunery cancel {screen.sentence(job)}", soft_wrap=True)
        raise typer.Exit(failures.INTERRUPTED) from None


def shown_to_the_end(client: Tunery, job: str, as_json: bool, after: int = 0) -> Job:
    """Show a job until it has ended and return it."""
    from common.cli.boards import board
    from common.client import Job

    ended = client.jobs.get(job)
    with board(as_json) as shown:
        for update in client.jobs.watch(job, after):
            shown.show(update)
            ended = update if isinstance(update, Job) else ended
    return ended


def conclude(job: Job, as_json: bool) -> None:
    """Say how a job ended and leave with the exit code for it."""
    from common.cli import screen
    from common.cli.bad_rows import show_bad_rows, summary

    console = screen.stderr()
    if job.error is not None:
        console.print(f"error: {screen.paragraph(summary(job.error))}", style="red")
        show_bad_rows(job, console)
        if job.error.hint:
            console.print(f"hint: {screen.sentence(job.error.hint)}")
    elif job.status == "succeeded" and not as_json:
        # What an export made is fetched with the rest of its source.
        screen.stdout().print(f"succeeded: `tunery download {job.source_job or job.id}` fetches what it made")
    raise typer.Exit(_CODES.get(job.status, failures.FAILED))
