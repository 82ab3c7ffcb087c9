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
