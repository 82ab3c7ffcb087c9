"""`tunery estimate`: what a job would take, with the arguments of `tunery submit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from common.cli import job_options, state

if TYPE_CHECKING:
    from common.schemas.estimates import JobEstimate, TokenEstimate, WorkerEstimate


def estimate(
    ctx: typer.Context,
    dataset: job_options.File = None,
    model: job_options.Model = None,
    settings: job_options.Settings = None,
    method: job_options.Method = None,
    suffix: job_options.Suffix = None,
    export: job_options.Export = None,
    validation: job_options.Validation = None,
    validation_split: job_options.ValidationSplit = None,
    chat_template: job_options.ChatTemplate = None,
    sample: job_options.Sample = None,
    seed: job_options.Seed = None,
    priority: job_options.Priority = None,
    not_before: job_options.NotBefore = None,
    metadata: job_options.Metadata = None,
    output: state.Output = None,
) -> None:
    """Tell what a job would take, and submit none.

    Tokens, steps, memory by part, whether it fits each worker and how long it would run there. A local file is
    uploaded, as submit does; a later submit of the same file takes that upload.
    """
    if dataset is None or model is None:
        raise typer.BadParameter("name a FILE_OR_URI and a --model")
    fields = job_options.fields(ctx.params)
    options = state.of(ctx)
    with options.connect() as client:
        fields |= job_options.datasets(client, ctx.params, quiet=options.as_json)
        found = client.jobs.estimate(**fields)
    from common.cli import screen

    if options.as_json:
        screen.as_json(found)
        return
    _show(found)


def _show(found: JobEstimate) -> None:
    from common.cli import screen
    from common.cli.outcome import memory_parts

    memory, unknown = found.memory, {name: f"not known: {why}" for name, why in found.unknown.items()}
    size = None
    if memory is not None:
        size = f"{screen.size(memory.total_bytes)} on {memory.device}: {memory_parts(memory.parts)}"
    screen.fields(
        [
            ("tokens", _tokens(found.tokens) if found.tokens else unknown.get("tokens")),
            ("steps", found.steps if found.steps is not None else unknown.get("steps")),
            ("memory", size or unknown.get("memory")),
            ("micro-batch", f"{memory.rows} x {memory.length} tokens" if memory else None),
            ("position", found.position),
            ("workers", unknown.get("workers")),
        ]
    )
    columns = [
        screen.Column("WORKER", lambda worker: worker.name),
        screen.Column("DEVICE", lambda worker: worker.device_name or "cpu", spare=2),
        screen.Column("FITS", lambda worker: {True: "yes", False: "no", None: "?"}[worker.fits]),
        screen.Column("MEMORY", lambda worker: screen.size(worker.total_bytes), spare=3, right=True),
        screen.Column("TAKES", _duration, right=True),
        screen.Column("REMARK", lambda worker: worker.message, spare=1, folded=True),
    ]
    if found.workers:
        from common.client.pages import Page

        screen.table(columns, Page(found.workers, False, None))


def _tokens(found: TokenEstimate) -> str:
    counted = f"counted by the check of {found.job}"
    told = counted if found.source == "counted" else f"told from a sample: {found.low:,} to {found.high:,}"
    return f"{found.tokens:,} in {found.rows:,} rows ({told}); {found.train_tokens or 0:,} in all epochs"


def _duration(worker: WorkerEstimate) -> str | None:
    from common.cli import screen

    return None if worker.duration_s is None else screen.duration(worker.duration_s)
