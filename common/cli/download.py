"""`tunery download`: every published file, verified, laid out by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import state


def download(
    ctx: typer.Context,
    job: Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")],
    folder: Annotated[
        Path | None, typer.Argument(help="Where to; otherwise a folder named by the job.", metavar="DIR")
    ] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Fetch DIR/adapter alone.")] = False,
    output: state.Output = None,
) -> None:
    """Fetch what a job published, and verify it.

    A download that broke off goes on where it did; what is there already is only verified.
    """
    from common.cli import screen
    from common.cli.transfers import transfer

    options = state.of(ctx)
    target = folder or Path(job)
    with options.connect() as client, transfer("downloading", options.as_json) as on_progress:
        paths = client.jobs.download(job, target, adapter_only=adapter_only, on_progress=on_progress)
    if options.as_json:
        files = [{"path": str(path), "bytes": path.stat().st_size} for path in paths]
        screen.as_json({"folder": str(target), "files": files})
        return
    total = sum(path.stat().st_size for path in paths)
    typer.echo(f"{len(paths)} files, {screen.size(total)}, every hash verified")
    adapter = target / "adapter"
    typer.echo(f"adapter: {adapter}" if adapter.is_dir() else f"files: {target}")
