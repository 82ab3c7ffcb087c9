"""`tunery ls`, `show`, `cancel`, `pause`, `resume`, `retry`: jobs as they are, and wishes about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import state

if TYPE_CHECKING:
    from common.cli.screen import Column
    from common.schemas.jobs import JobRead

JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]
JobIds = Annotated[list[str], typer.Argument(help="Ids of jobs.", metavar="JOB…")]


def ls(
    ctx: typer.Context,
    status: Annotated[
        list[str] | None, typer.Option("--status", "-s", help="Only jobs in this state. Repeat it for more.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", help="Only jobs with this label.", metavar="KEY=VALUE")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Go on behind this id.")] = None,
    output: state.Output = None,
) -> None:
    """List jobs, newest first."""
    from common.cli import screen
    from common.cli.overrides import parse_labels

    labels = parse_labels(metadata or [])
    options = state.of(ctx)
    with options.connect() as client:
        page = client.jobs.list(status=status, metadata=labels, limit=limit, after=after)
    if options.as_json:
        screen.as_json(page)
        return
    screen.table(_columns(), page)
    if not page.data:
        screen.stderr().print("no jobs" if not (status or labels or after) else "no such jobs")
    if page.has_more and page.next:
        screen.stderr().print(f"more: tunery ls --after {screen.sentence(page.next)}", style="dim")


def _columns() -> list[Column]:
    from common.cli import boards, screen

    return [
        screen.Column("JOB", lambda job: job.id),
        screen.Column("STATUS", lambda job: job.status, styled=True),
        screen.Column("STAGE", lambda job: job.stage if job.status == "running" else None, spare=2),
        screen.Column("STEP", boards.steps, spare=1, right=True),
        screen.Column("LOSS", lambda job: None if job.loss is None else f"{job.loss:.4g}", spare=4, right=True),
        screen.Column("MODEL", lambda job: job.model, spare=3),
        screen.Column("SUFFIX", lambda job: job.suffix, spare=5),
        screen.Column("CREATED", lambda job: screen.ago(job.created_at), spare=2),
    ]


def show(ctx: typer.Context, job: JobId, output: state.Output = None) -> None:
    """Show everything about a job."""
    options = state.of(ctx)
    with options.connect() as client:
        found = client.jobs.get(job)
    _show(found, options.as_json)


def cancel(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Stop jobs for good. A running one ends at its next step; nothing is published."""
    _act(ctx, "cancel", jobs)


def pause(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Take jobs off their workers, after a checkpoint."""
    _act(ctx, "pause", jobs)


def resume(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Let paused jobs go on from their last checkpoint."""
    _act(ctx, "resume", jobs)


def retry(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Submit failed or cancelled jobs again, as new jobs.

    They go on from the checkpoints of the old ones.
    """
    _act(ctx, "retry", jobs)


def _act(ctx: typer.Context, action: str, jobs: list[str]) -> None:
    from common.cli import boards, screen

    options = state.of(ctx)
    found: list[Any] = []
    with options.connect() as client:
        for job in jobs:
            found.append(getattr(client.jobs, action)(job))
            if not options.as_json:
                # A retry answers a job of its own.
                name = job if found[-1].id == job else f"{job} → {found[-1].id}"
                typer.echo(f"{name}: {screen.sentence(boards.phase(found[-1]))}")
    if options.as_json:
        screen.as_json(found[0] if len(found) == 1 else {"data": found})


def _show(job: JobRead, as_json: bool) -> None:
    from common.cli import boards, screen
    from common.cli.counted import counted
    from common.cli.outcome import outcome

    if as_json:
        screen.as_json(job)
        return
    screen.fields(
        [
            ("job", job.id),
            ("status", job.status),
            ("phase", boards.phase(job) if boards.phase(job) != job.status else None),
            ("waits until", _moment(job.waits_for.until) if job.waits_for else None),
            ("expected start", _moment(job.expected_start)),
            ("step", boards.steps(job)),
            ("measured", " · ".join(boards.numbers(job))),
            ("error", f"{job.error.message}" if job.error else None),
            ("hint", job.error.hint if job.error else None),
            ("model", f"{job.model}@{job.base_revision}" if job.base_revision else job.model),
            ("dataset", job.dataset),
            ("validation", job.validation_dataset or job.validation_split),
            ("method", job.method),
            ("suffix", job.suffix),
            ("hyperparameters", _options(job.hyperparameters)),
            ("lora", _options(job.lora)),
            ("quantization", _options(job.quantization)),
            ("seed", job.seed),
            ("priority", job.priority),
            ("not before", _moment(job.not_before)),
            ("metadata", ", ".join(f"{name}={value}" for name, value in job.metadata.items())),
            ("export", ", ".join(job.export)),
            *counted(job.report),
            *outcome(job.report),
            ("attempt", job.attempt or None),
            ("worker", job.worker),
            ("created", _moment(job.created_at)),
            ("started", _moment(job.started_at)),
            ("finished", _moment(job.finished_at)),
        ]
    )


def _options(group: Any) -> str | None:
    from common.cli import screen

    values = screen.plain(group)
    return ", ".join(f"{name}={value}" for name, value in values.items()) if isinstance(values, dict) else None


def _moment(moment: Any) -> str | None:
    from common.cli import screen

    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z} ({screen.ago(moment)})" if moment else None
