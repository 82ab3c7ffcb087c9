"""A bar for bytes on their way, on a terminal; silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.cli import screen

if TYPE_CHECKING:
    from rich.progress import TaskID

    from common.client.sending import Progress


_BAR, _NARROW_BAR = 24, 12
# Below so many columns the short bar is taken.
_WIDE = 100
# Bytes done and in all, speed, time left, and what stands between the columns.
_NUMBERS = 36


@contextmanager
def transfer(verb: str, quiet: bool) -> Iterator[Progress | None]:
    """Yield what the client tells its progress to; None where nobody watches."""
    console = screen.stderr()
    if quiet or not console.is_terminal:
        yield None
        return
    from rich import progress

    bar_width = _BAR if console.width >= _WIDE else _NARROW_BAR
    room = max(12, console.width - bar_width - _NUMBERS - len(verb) - 1)
    tasks: dict[str, TaskID] = {}
    with progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=bar_width),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
    ) as bars:

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                # Numbers need their place; of a name the end tells most.
                shown = screen.sentence(name)
                shown = shown if len(shown) <= room else f"…{shown[1 - room :]}"
                tasks[name] = bars.add_task(f"{verb} {shown}", total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield report
