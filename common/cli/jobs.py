"""`tunery ls`, `show`, `pause`, `resume`, `retry`: jobs as they are, and wishes about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import state

if TYPE_CHECKING:
    from common.cli.screen import Column
    from common.client.requests import FilterFields
    from common.schemas.jobs import JobRead

JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]
JobIds = Annotated[list[str], typer.Argument(help="Ids of jobs.", metavar="JOB…")]


Statuses = Annotated[
    list[str] | None,
    typer.Option("--status", "-s", help="Only jobs in this state. Repeat it for more.", metavar="STATUS"),
]
Labels = Annotated[list[str] | None, typer.Option("--metadata", help="Only jobs with this label.", metavar="KEY=VALUE")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Only jobs of this base model.")]
CreatedAfter = Annotated[
    str | None, typer.Option(help="Only jobs created then or later: 2026-12-24T02:00, -2h, -7d.", metavar="WHEN")
]
CreatedBefore = Annotated[str | None, typer.Option(help="Only jobs created before that.", metavar="WHEN")]


def wanted_jobs(
    status: list[str] | None,
    metadata: list[str] | None,
    model: str | None,
    created_after: str | None,
    created_before: str | None,
) -> FilterFields:
    """Return the conditions that options name.

    Raises:
        InvalidInput: a label or a moment is written wrongly.
    """
    from common.cli.moments import parse_moment
    from common.cli.overrides import parse_labels

    wanted: FilterFields = {}
    if status:
        wanted["status"] = status
    if metadata:
        wanted["metadata"] = parse_labels(metadata)
    if model is not None:
        wanted["model"] = model
    if created_after is not None:
        wanted["created_after"] = parse_moment(created_after, "--created-after")
    if created_before is not None:
        wanted["created_before"] = parse_moment(created_before, "--created-before")
    return wanted


def ls(
    ctx: typer.Context,
    status: Statuses = None,
    metadata: Labels = None,
    model: Model = None,
    created_after: CreatedAfter = None,
    created_before: CreatedBefore = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Go on behind this id.")] = None,
    output: state.Output = None,
) -> None:
    """List jobs, newest first."""
    from common.cli import screen

    wanted = wanted_jobs(status, metadata, model, created_after, created_before)
    options = state.of(ctx)
    with options.connect() as client:
        page = client.jobs.list(limit=limit, after=after, **wanted)
    if options.as_json:
        screen.as_json(page)
        return
    screen.table(_columns(), page)
    if not page.data:
        screen.stderr().print("no jobs" if not (wanted or after) else "no such jobs")
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


def pause(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Take jobs off their workers, after a checkpoint."""
    act(ctx, "pause", jobs)


def resume(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Let paused jobs go on from their last checkpoint."""
    act(ctx, "resume", jobs)


def retry(ctx: typer.Context, jobs: JobIds, output: state.Output = None) -> None:
    """Submit failed or cancelled jobs again, as new jobs.

    They go on from the checkpoints of the old ones.
    """
    act(ctx, "retry", jobs)


def act(ctx: typer.Context, action: str, jobs: list[str]) -> None:
    """Wish the same for each of `jobs`, and print where each is then."""
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
    from common.cli.bad_rows import show_bad_rows, summary
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
            ("checked" if job.checked else "step", boards.steps(job)),
            ("measured", " · ".join(boards.numbers(job))),
            ("error", summary(job.error) if job.error else None),
            ("hint", job.error.hint if job.error else None),
            ("merges", job.source_job),
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
    show_bad_rows(job, screen.stdout())


def _options(group: Any) -> str | None:
    from common.cli import screen

    values = screen.plain(group)
    return ", ".join(f"{name}={value}" for name, value in values.items()) if isinstance(values, dict) else None


def _moment(moment: Any) -> str | None:
    from common.cli import screen

    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z} ({screen.away(moment)})" if moment else None
