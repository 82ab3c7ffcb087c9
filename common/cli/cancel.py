"""`tunery cancel`: jobs by their ids, or all that meet conditions."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from common.cli import state
from common.cli.jobs import CreatedAfter, CreatedBefore, Labels, Model, Statuses, act, wanted_jobs

_SAID = {
    "cancelled": "cancelled",
    "cancelling": "cancelling",
    "already_cancelled": "was cancelled already",
    "ended": "has ended",
    "not_found": "is not there",
}


def cancel(
    ctx: typer.Context,
    jobs: Annotated[list[str] | None, typer.Argument(help="Ids of jobs.", metavar="[JOB…]")] = None,
    status: Statuses = None,
    metadata: Labels = None,
    model: Model = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen.")] = False,
    output: state.Output = None,
) -> None:
    """Stop jobs for good, these or all that meet every condition.

    A running one ends at its next step; nothing is published.
    """
    wanted = wanted_jobs(status, metadata, model, created_after, created_before)
    if bool(jobs) == bool(wanted):
        raise typer.BadParameter("name jobs, or conditions (--status, --metadata, …), and not both")
    if jobs and not dry_run:
        act(ctx, "cancel", jobs)
        return
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        found = client.jobs.cancel_many(jobs, dry_run=dry_run, **wanted)
    if options.as_json:
        screen.as_json({"data": found, "dry_run": dry_run})
        return
    for outcome in found:
        would = "would be " if dry_run and outcome.result in ("cancelled", "cancelling") else ""
        typer.echo(
            f"{screen.sentence(outcome.id)}: {would}{_SAID.get(outcome.result, screen.sentence(outcome.result))}"
        )
    counts = Counter(outcome.result for outcome in found)
    summary = ", ".join(f"{number} {screen.sentence(result)}" for result, number in counts.items())
    screen.stderr().print(f"{'nothing was done: ' if dry_run else ''}{summary or 'no such jobs'}")
