"""`tunery admin`: what an operator does beside the API, with the server's own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import state

_LIMIT = "NUMBER|none"

app = typer.Typer(no_args_is_help=True, help="Work on the database, with the server's settings.")


@app.command("first-key")
def first_key(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Option("--file", help="Where the key is kept; otherwise DIR/api-key.")] = None,
    output: state.Output = None,
) -> None:
    """Make the first administrator's key, and show it.

    Where the file holds a valid one, that is shown.
    """
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


def _limit(text: str | None, kept: float | None) -> float | None:
    if text is None:
        return kept
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor `none`") from None


@app.command("quota")
def quota(
    ctx: typer.Context,
    tenant: Annotated[str, typer.Argument(help="The tenant.", metavar="TENANT")],
    max_running: Annotated[str | None, typer.Option(help="Jobs that may run at once.", metavar=_LIMIT)] = None,
    max_queued: Annotated[str | None, typer.Option(help="Jobs that may wait.", metavar=_LIMIT)] = None,
    max_gpu_hours: Annotated[str | None, typer.Option(help="GPU hours of a calendar month.", metavar=_LIMIT)] = None,
    max_priority: Annotated[str | None, typer.Option(help="Highest priority of a job.", metavar=_LIMIT)] = None,
    output: state.Output = None,
) -> None:
    """Show or set what a tenant may use.

    `none` lifts a limit, and what is left out stays.
    """
    from common import settings
    from common.cli.quota import show_quota
    from common.context import build
    from common.jobs import quotas
    from common.schemas.quotas import QuotaLimits

    given = {
        "max_running": max_running,
        "max_queued": max_queued,
        "max_gpu_hours": max_gpu_hours,
        "max_priority": max_priority,
    }
    context = build(settings.load())
    try:
        with context.write() as session:
            before = quotas.read(session, tenant)
            if any(text is not None for text in given.values()):
                limits = {name: _limit(text, getattr(before, name)) for name, text in given.items()}
                quotas.write(session, tenant, QuotaLimits.model_validate(limits, strict=False))
            found = quotas.read(session, tenant)
    finally:
        context.close()
    show_quota(found, state.of(ctx).as_json)


@app.command("reconcile")
def reconcile(
    ctx: typer.Context,
    remove: Annotated[
        float | None, typer.Option("--remove", metavar="HOURS", help="Remove objects without a row that are so old.")
    ] = None,
    output: state.Output = None,
) -> None:
    """Compare the database's rows with the store's objects.

    Tells what no row names, and what is named and not there: then the exit code is 1.
    """
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
