"""A bar for bytes on their way, on a terminal; silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.cli import screen

if TYPE_CHECKING:
    from rich.progress import TaskID

    from common.client.sending import Progress


@contextmanager
def transfer(verb: str, quiet: bool) -> Iterator[Progress | None]:
    """Yield what the client tells its progress to; None where nobody watches."""
    console = screen.stderr()
    if quiet or not console.is_terminal:
        yield None
        return
    from rich import progress

    tasks: dict[str, TaskID] = {}
    with progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
    ) as bars:

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"{verb} {screen.sentence(name)}", total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield report
