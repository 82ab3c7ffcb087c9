"""The rows that a job failed of: a line for each of the first, how many more there are, and how to see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.cli import screen

if TYPE_CHECKING:
    from rich.console import Console

    from common.schemas.jobs import JobError, JobRead

# More than that scroll the rest of the answer away.
SHOWN = 10


def summary(error: JobError) -> str:
    """Return what is wrong with a job as one paragraph; of bad rows, how many there are."""
    if not error.problems:
        return error.message
    files = " and ".join(dict.fromkeys(problem.param for problem in error.problems))
    return f"{error.num_problems:,} bad row{'' if error.num_problems == 1 else 's'} in {files}"


def show_bad_rows(job: JobRead, console: Console) -> None:
    """Print the first bad rows of a failed job as a table; nothing where no row is to blame."""
    from rich.table import Table
    from rich.text import Text

    problems = job.error.problems if job.error else []
    if job.error is None or not problems:
        return
    several = len({problem.param for problem in problems}) > 1
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in (*(["FILE"] if several else []), "ROW", "WHERE"):
        grid.add_column(title, no_wrap=True, justify="right" if title == "ROW" else "left")
    # What is wrong is never cut: it goes on under itself.
    grid.add_column("WHAT IS WRONG", overflow="fold")
    for problem in problems[:SHOWN]:
        cells = [*([problem.param] if several else []), str(problem.row), problem.field or "", problem.message]
        grid.add_row(*(Text(screen.sentence(cell)) for cell in cells))
    screen.put(grid, console)
    if (more := job.error.num_problems - SHOWN) > 0:
        told = f"the first {len(problems):,}" if job.error.num_problems > len(problems) else "all"
        line = f"… and {more:,} more; {told}: tunery show {screen.sentence(job.id)} -o json"
        console.print(line, style="dim", soft_wrap=True)
