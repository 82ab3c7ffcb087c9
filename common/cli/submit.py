"""`tunery submit`: a file or a URI, a base model, and what differs from the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import state

if TYPE_CHECKING:
    from common.client import Tunery
    from common.schemas.datasets import Dataset


def submit(
    ctx: typer.Context,
    dataset: Annotated[
        str | None, typer.Argument(help="A local file, which is uploaded, or a dataset URI.", metavar="FILE_OR_URI")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id (org/name[@revision]) or a folder of the server's.")
    ] = None,
    clone: Annotated[
        str | None,
        typer.Option(help="Ask for what that job asked for; what is given beside it differs.", metavar="JOB"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="An option: learning_rate=1e-4, lora.r=8, … Repeat it for more.", metavar="NAME=VALUE"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="qlora (4-bit base), lora (16 bit) or full (no adapter).")] = None,
    suffix: Annotated[str | None, typer.Option(help="A name for the adapter.")] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            "--export", help="Besides the adapter: merged, merged_dequantized or merged_4bit. Repeat it for more."
        ),
    ] = None,
    validation: Annotated[str | None, typer.Option(help="A file or URI to evaluate on.", metavar="FILE_OR_URI")] = None,
    validation_split: Annotated[
        float | None, typer.Option(help="Share of the rows to hold out and evaluate on, up to 0.5.", metavar="SHARE")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A file with a Jinja chat template.", metavar="FILE", exists=True, dir_okay=False),
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(help="A prompt to ask at each checkpoint, up to 8; `validation` asks validation rows."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100; higher runs first.")] = None,
    not_before: Annotated[
        str | None, typer.Option(help="Start it at that moment or later: 2026-12-24T02:00, +2h.", metavar="WHEN")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", help="A label of the job. Repeat it for more.", metavar="KEY=VALUE"),
    ] = None,
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
    from common.cli.moments import parse_moment
    from common.cli.overrides import parse_labels, parse_sets

    given = {
        "model": model,
        "method": method,
        "suffix": suffix,
        "seed": seed,
        "priority": priority,
        "validation_split": validation_split,
    }
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    fields |= parse_sets(settings or [])
    if not_before is not None:
        fields["not_before"] = parse_moment(not_before, "--not-before")
    if export:
        fields["export"] = export
    if metadata:
        fields["metadata"] = parse_labels(metadata)
    if sample:
        fields["sample_prompts"] = "validation" if sample == ["validation"] else sample
    if chat_template is not None:
        fields["chat_template"] = chat_template.read_text(encoding="utf-8")
    options = state.of(ctx)
    silent = quiet or options.as_json
    with options.connect() as client:
        if dataset is not None:
            fields["dataset"] = resolve(client, dataset, "dataset", silent)
        if validation is not None:
            fields["validation_dataset"] = resolve(client, validation, "--validation", silent)
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


def resolve(client: Tunery, text: str, param: str, quiet: bool) -> str | Dataset:
    """Return the URI that `text` is, or upload the file that it names.

    Raises:
        InvalidInput: it is neither.
    """
    if "://" in text or text.startswith("dataset:"):
        return text
    from common.cli.transfers import transfer
    from common.client.sending import check_file

    path = Path(text).expanduser()
    check_file(path, param)
    with transfer("uploading", quiet) as on_progress:
        return client.datasets.upload(path, on_progress=on_progress)
