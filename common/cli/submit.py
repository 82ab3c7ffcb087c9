"""`tunery submit`: a file or a URI, a base model, and what differs from the defaults."""

from __future__ import annotations

from typing import Annotated

import typer

from common.cli import job_options, state


def submit(
    ctx: typer.Context,
    dataset: job_options.File = None,
    model: job_options.Model = None,
    clone: Annotated[
        str | None,
        typer.Option(help="Ask for what that job asked for; what is given beside it differs.", metavar="JOB"),
    ] = None,
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
    watching: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job to its end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the job's id alone, for scripts.")] = False,
    output: state.Output = None,
) -> None:
    """Submit a fine-tuning job.

    FILE_OR_URI is a local JSONL, JSON, CSV or Parquet file, or a URI that the server reads: s3://, https://, hf://,
    dataset:ID, file:// (a folder of the server's).
    """
    if clone is None and (dataset is None or model is None):
        raise typer.BadParameter("name a FILE_OR_URI and a --model, or a job to --clone")
    fields = job_options.fields(ctx.params)
    options = state.of(ctx)
    with options.connect() as client:
        fields |= job_options.datasets(client, ctx.params, quiet=quiet or options.as_json)
        job = client.jobs.create(**fields) if clone is None else client.jobs.clone(clone, **fields)
        if watching:
            _announce(job.id, options.as_json)
            from common.cli.watch import conclude, follow

            conclude(follow(client, job.id, options.as_json), options.as_json)
    if options.as_json:
        from common.cli import screen

        screen.as_json(job)
    elif quiet:
        typer.echo(job.id)
    else:
        _announce(job.id, False)
        typer.echo(f"`tunery watch {job.id}` shows its progress")


def _announce(job: str, as_json: bool) -> None:
    # Beside the result, so that a program's standard output stays JSON.
    typer.echo(f"submitted: {job}", err=as_json)
