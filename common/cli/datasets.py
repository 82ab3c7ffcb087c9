"""`tunery datasets`: upload, list, preview, rm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import state
from common.cli.job_options import ChatTemplate
from common.cli.removing import remove_each

app = typer.Typer(no_args_is_help=True, help="Upload datasets, list, preview and remove them.")


@app.command()
def upload(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="A JSONL, JSON, CSV or Parquet file.", metavar="FILE")],
    name: Annotated[str | None, typer.Option(help="Another name than the file's.")] = None,
    direct: Annotated[
        bool | None,
        typer.Option(
            "--direct/--through-api",
            help="Send parts straight to the object store, or all through the API; otherwise by the size: 64 MiB.",
        ),
    ] = None,
    output: state.Output = None,
) -> None:
    """Upload a file, for jobs to name by its URI.

    A large one that broke off goes on where it did, by the same command.
    """
    from common.cli import screen
    from common.cli.sending import send_file

    options = state.of(ctx)
    with options.connect() as client:
        dataset = send_file(client, file.expanduser(), name=name, direct=direct, quiet=options.as_json)
    if options.as_json:
        screen.as_json(dataset)
    else:
        pairs = [("uri", dataset.uri), ("name", dataset.name), ("size", screen.size(dataset.bytes))]
        screen.fields([*pairs, ("sha256", dataset.sha256)])


@app.command("list")
def list_datasets(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Go on behind this id.")] = None,
    output: state.Output = None,
) -> None:
    """List datasets, newest first."""
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        page = client.datasets.list(limit=limit, after=after)
    if options.as_json:
        screen.as_json(page)
        return
    columns = [
        screen.Column("URI", lambda item: item.uri),
        screen.Column("NAME", lambda item: item.name, spare=1),
        screen.Column("SIZE", lambda item: screen.size(item.bytes), spare=2, right=True),
        screen.Column("CREATED", lambda item: screen.ago(item.created_at), spare=3),
    ]
    screen.table(columns, page)
    if page.has_more and page.next:
        screen.stderr().print(f"more: tunery datasets list --after {screen.sentence(page.next)}", style="dim")


@app.command()
def preview(
    ctx: typer.Context,
    dataset: Annotated[str, typer.Argument(help="Id or URI of an uploaded dataset.", metavar="DATASET")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base model whose template and tokens are used.")],
    rows: Annotated[int, typer.Option("--rows", "-n", help="How many.", min=1, max=20)] = 5,
    offset: Annotated[int, typer.Option(help="Rows to pass over.", min=0)] = 0,
    max_length: Annotated[int | None, typer.Option(help="As in a job's hyperparameters.", min=8)] = None,
    loss: Annotated[str, typer.Option(help="auto, all, completion or assistant.")] = "auto",
    chat_template: ChatTemplate = None,
    output: state.Output = None,
) -> None:
    """Show rows as the model will see them.

    What is trained on stands out.
    """
    from common.cli import screen
    from common.cli.previewed import show
    from common.client.requests import PreviewFields

    options = state.of(ctx)
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    asked = PreviewFields(rows=rows, offset=offset, max_length=max_length, loss=loss, chat_template=template)
    with options.connect() as client:
        found = client.datasets.preview(dataset, model, **asked)
    if options.as_json:
        screen.as_json(found)
    else:
        show(found)


@app.command("rm")
def remove(
    ctx: typer.Context,
    datasets: Annotated[list[str], typer.Argument(help="Ids or URIs.", metavar="DATASET…")],
    output: state.Output = None,
) -> None:
    """Remove datasets and their content."""
    remove_each(ctx, datasets, lambda client, dataset: client.datasets.delete(dataset))
