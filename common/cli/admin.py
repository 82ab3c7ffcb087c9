"""`tunery admin`: what an operator does beside the API, with the server's own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import state

app = typer.Typer(no_args_is_help=True, help="Work on the database, with the server's settings.")


@app.command("first-key")
def first_key(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Option("--file", help="Where the key is kept; otherwise DIR/api-key.")] = None,
    output: state.Output = None,
) -> None:
    """Make the first administrator's key, unless the file holds one that is valid, and show it."""
    from common import keys, settings
    from common.cli import screen
    from common.context import build

    loaded = settings.load()
    path = file or (state.of(ctx).data_dir or loaded.data_dir) / "api-key"
    context = build(loaded)
    try:
        with context.write() as session:
            keys.ensure_first_key(session, path)
    finally:
        context.close()
    key = path.read_text().strip()
    if state.of(ctx).as_json:
        screen.as_json({"key": key, "file": str(path)})
    else:
        screen.fields([("key", key), ("file", path)])


@app.command("reconcile")
def reconcile(
    ctx: typer.Context,
    remove: Annotated[
        float | None, typer.Option("--remove", metavar="HOURS", help="Remove objects without a row that are so old.")
    ] = None,
    output: state.Output = None,
) -> None:
    """Compare rows with objects: what no row names, and what is named and not there (then the exit code is 1)."""
    from common import audit, settings
    from common.cli import screen
    from common.context import build

    context = build(settings.load())
    try:
        found = audit.audit(context)
        removed = audit.collect(context, remove * 3600).orphans if remove is not None else []
    finally:
        context.close()
    if state.of(ctx).as_json:
        screen.as_json({
            "objects": found.num_objects, "orphans": [item.key for item in found.orphans],
            "missing": [key for _, key in found.missing], "removed": [item.key for item in removed],
        })  # fmt: skip
    else:
        for line in (*audit.lines(found), f"removed {len(removed)} objects"):
            typer.echo(line)
    if found.missing:
        raise typer.Exit(1)
