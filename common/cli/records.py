"""`tunery metrics`, `checkpoints`, `precision` and `rm`: what a job has left behind, and the end of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from common.cli import state
from common.cli.jobs import JobId, JobIds
from common.cli.removing import remove_each

if TYPE_CHECKING:
    from common.cli.screen import Column


def metrics(
    ctx: typer.Context,
    job: JobId,
    kind: Annotated[str, typer.Option(help="train or eval.")] = "train",
    output: state.Output = None,
) -> None:
    """Show what was measured, a line for each step.

    As JSON, a list for each value.
    """
    from common.cli import screen
    from common.client.watching import columns
    from common.errors import InvalidInput

    if kind not in ("train", "eval"):
        raise InvalidInput(f"--kind {kind}: there are train and eval", param="--kind")
    options = state.of(ctx)
    with options.connect() as client:
        found = columns(client.jobs.metrics(job), kind)
    if options.as_json:
        screen.as_json(found)
        return
    rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    titles = [_column(name, place) for place, name in enumerate(found)]
    screen.table(titles, rows)
    if not rows:
        screen.stderr().print(f"no {kind} metrics")


def _column(name: str, place: int) -> Column:
    from common.cli import screen

    def cell(row: dict[str, float | None]) -> str | None:
        value = row[name]
        return None if value is None else str(value) if name == "step" else f"{value:.4g}"

    # The names come from the worker. The first columns, step and loss, stay where room is short.
    return screen.Column(screen.sentence(name).upper(), cell, spare=max(0, place - 1), right=True)


def checkpoints(ctx: typer.Context, job: JobId, output: state.Output = None) -> None:
    """List the checkpoints of a job, the latest first.

    It can go on from each of them. ATTEMPT 0: it came from the job that this one retries.
    """
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        found = client.jobs.checkpoints(job)
    if options.as_json:
        screen.as_json({"data": found})
        return
    screen.table(
        [
            screen.Column("STEP", lambda item: item.step, right=True),
            screen.Column("ATTEMPT", lambda item: item.attempt, right=True),
            screen.Column("SIZE", lambda item: screen.size(item.bytes), right=True),
            screen.Column("CREATED", lambda item: screen.ago(item.created_at)),
        ],
        found,
    )
    if not found:
        screen.stderr().print("no checkpoints")


def precision(ctx: typer.Context, job: JobId, output: state.Output = None) -> None:
    """Show how each module of a job's model was held.

    In how many bits, and whether it was trained. The job has to have succeeded.
    """
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        found = client.jobs.precision(job)
    if options.as_json:
        screen.as_json(found)
        return
    screen.table(
        [
            screen.Column("MODULE", lambda item: item.name, spare=1),
            screen.Column("CLASS", lambda item: item.kind, spare=3),
            screen.Column("DTYPE", lambda item: item.dtype, spare=2),
            screen.Column("BITS", lambda item: item.bits, right=True),
            screen.Column("HELD", lambda item: item.status),
        ],
        found.modules,
    )


def rm(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Remove ended jobs, with everything that they published."""
    remove_each(ctx, jobs, lambda client, job: client.jobs.delete(job))
