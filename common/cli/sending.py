"""A local file on its way to the server, as a terminal shows it: a bar, where it goes on, how to go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from common.cli import failures, screen
from common.cli.transfers import transfer

if TYPE_CHECKING:
    from common.client import Tunery
    from common.schemas.datasets import Dataset


def send_file(
    client: Tunery, path: Path, *, name: str | None = None, direct: bool | None = None, quiet: bool = False
) -> Dataset:
    """Upload a file and return its dataset. Ctrl-C says how to go on and leaves."""
    from common.client.uploading import goes_direct

    console = screen.stderr()
    resumable = goes_direct(path, direct)

    def resumed(there: int, total: int) -> None:
        if not quiet:
            console.print(f"going on: {screen.size(there)} of {screen.size(total)} ({there / total:.0%}) are there")

    try:
        with transfer("uploading", quiet) as on_progress:
            return client.datasets.upload(path, name=name, direct=direct, on_progress=on_progress, on_resume=resumed)
    except KeyboardInterrupt:
        way = "the same command goes on from what has arrived" if resumable else "the same command begins again"
        console.print(f"interrupted: {way}")
        raise typer.Exit(failures.INTERRUPTED) from None
