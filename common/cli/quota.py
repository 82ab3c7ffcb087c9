"""`tunery quota` and `tunery reorder`: what a tenant may use, and which of its jobs goes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import state

if TYPE_CHECKING:
    from common.schemas.quotas import Quota


def quota(
    ctx: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Another tenant than your own; for administrators.")] = None,
    output: state.Output = None,
) -> None:
    """Show what your tenant may use, and what it uses now."""
    options = state.of(ctx)
    with options.connect() as client:
        found = client.quotas.get(tenant=tenant)
    show_quota(found, options.as_json)


def show_quota(found: Quota, as_json: bool) -> None:
    """Print a tenant's limits and use."""
    from common.cli import screen

    if as_json:
        screen.as_json(found)
        return

    def used(value: float, limit: float | None) -> str:
        return f"{value:g} of {'any number' if limit is None else f'{limit:g}'}"

    screen.fields(
        [
            ("tenant", found.tenant),
            ("running jobs", used(found.running, found.max_running)),
            ("waiting jobs", used(found.queued, found.max_queued)),
            ("GPU hours this month", used(found.gpu_hours, found.max_gpu_hours)),
            ("highest priority", found.max_priority if found.max_priority is not None else 100),
        ]
    )


def reorder(
    ctx: typer.Context,
    jobs: Annotated[list[str], typer.Argument(help="Ids of jobs that wait.", metavar="JOB…")],
    priority: Annotated[int | None, typer.Option(help="-100 to 100; higher runs first.")] = None,
    not_before: Annotated[
        str | None, typer.Option(help="Start them at that moment or later (2026-12-24T02:00, +2h), or `now`.")
    ] = None,
    output: state.Output = None,
) -> None:
    """Move jobs that wait in the queue.

    Give them another priority, or another moment before which they are not started.
    """
    from common.cli import boards, screen
    from common.cli.moments import parse_moment

    order: Any = {}
    if priority is not None:
        order["priority"] = priority
    if not_before is not None:
        order["not_before"] = None if not_before == "now" else parse_moment(not_before, "--not-before")
    options = state.of(ctx)
    with options.connect() as client:
        found = [client.jobs.reorder(job, **order) for job in jobs]
    if options.as_json:
        screen.as_json(found[0] if len(found) == 1 else {"data": found})
        return
    for job in found:
        typer.echo(f"{job.id}: {screen.sentence(boards.phase(job))}")
