"""Show a job while it runs: a live bar on a terminal, plain lines in a log, JSON lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, Self

from common.cli import screen
from common.schemas.jobs import TERMINAL, Event, JobRead, Metric

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import Progress, TaskID

Update = Event | Metric | JobRead

_BARS = "▁▂▃▄▅▆▇█"
_SPARK_POINTS = 48
# What an event says stands behind its time and name.
_INDENT = 34
# What stands beside the curve of losses: its name, the first loss and the last.
_CURVE_WORDS = 26
_LOSSES = ("loss", "eval_loss")
_LEVELS = {"warning": "yellow", "error": "red"}


class Board(Protocol):
    """Shows updates between `with` and its end."""

    def __enter__(self) -> Self:
        """Begin to show."""
        ...

    def __exit__(self, *_: Any) -> None:
        """Leave the terminal as it was."""
        ...

    def show(self, update: Update) -> None:
        """Show one update."""
        ...


def board(as_json: bool) -> Board:
    """Return the board that suits where standard output leads; what ended the job is told after it."""
    if as_json:
        return JsonLines()
    console = screen.stdout()
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveBoard(console) if live else PlainLines(console, brief=True)


def phase(job: JobRead) -> str:
    """Return where a job is, in words: `queued`, `training`, `running: export`, `cancelling`."""
    if job.status in TERMINAL:
        return job.status
    wished = {"cancel": "cancelling", "pause": "pausing"}.get(job.desired)
    if wished and job.status != "paused":
        return wished
    if job.status == "running" and job.stage:
        return "training" if job.stage == "train" else f"running: {job.stage}"
    if job.checked is not None:
        return "checking"
    if job.waits_for is not None:
        place = f", position {job.position}" if job.position else ""
        return f"{job.status}{place}: {job.waits_for.message}"
    return f"{job.status}: {job.stage}" if job.stage and job.stage != job.status else job.status


def numbers(job: JobRead) -> list[str]:
    """Return what a running job measures: loss, speed, time left; what is not known is left out.

    Of a check: at which row it is.
    """
    if job.checked is not None:
        return [f"row {job.checked.rows:,} of the {job.checked.param}"]
    return ([] if job.loss is None else [f"loss {job.loss:.4g}"]) + pace(job)


def pace(job: JobRead) -> list[str]:
    """Return how fast a running job is, and the time that is left."""
    if job.status != "running":
        return []
    speed = [f"{job.tokens_per_s:,.0f} tokens/s"] if job.tokens_per_s else []
    return speed + ([] if job.eta_s is None else [f"{screen.duration(job.eta_s)} left"])


def steps(job: JobRead) -> str:
    """Return `12/30`, or nothing before the number of steps is known; of a check, the bytes that are read."""
    if job.checked is not None:
        return f"{screen.size(job.checked.bytes)}/{screen.size(job.checked.total_bytes)}"
    return f"{job.step}/{job.max_steps}" if job.max_steps else ""


def sparkline(values: Iterable[float]) -> str:
    """Return values as a line of bars between their least and their greatest."""
    points = list(values)
    if len(points) < 2:
        return ""
    low, high = min(points), max(points)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((point - low) * scale)] for point in points)


def thinned(values: Sequence[float], most: int) -> list[float]:
    """Return at most `most` values, the means of equal stretches: a long run keeps its shape."""
    count = min(len(values), most)
    bounds = [place * len(values) // count for place in range(count + 1)] if count else [0]
    return [sum(values[start:end]) / (end - start) for start, end in pairwise(bounds)]


def _number(value: float | None) -> str:
    # JSON knows no NaN and no infinity: the server sends null for them.
    return "not finite" if value is None else f"{value:.4g}"


def event_lines(event: Event, console: Console, *, brief: bool = False) -> str:
    """Return an event for `console`: what it says, each line of it under the first.

    `brief`: of what ended the job only the first line, for all of it is told when the board has gone.
    """
    # Local time: it is read by a person beside a clock.
    at = event.at.astimezone().strftime("%H:%M:%S")
    said = event.message.splitlines() or [""]
    if brief and event.name == "job.failed" and len(said) > 1:
        said = [f"{said[0]}, and more"]
    begins = [f"{at}  {screen.sentence(event.name):<22}  ", *[" " * _INDENT] * (len(said) - 1)]
    lines = (begin + screen.sentence(line) for begin, line in zip(begins, said, strict=True))
    return "\n".join(screen.hanging(line, console, _INDENT) for line in lines)


class LiveBoard:
    """A bar with the phase, steps, loss, speed and time left, and the losses under it; events scroll past above."""

    def __init__(self, console: Console):
        self._console = console
        self._losses: list[float] = []
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
        from rich.table import Column

        def text(template: str, **style: Any) -> TextColumn:
            return TextColumn(template, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"), **style)

        columns = [SpinnerColumn(finished_text=" "), text("{task.description}"), BarColumn(bar_width=24)]
        columns += [text("{task.fields[steps]}"), text("{task.fields[numbers]}")]
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task("waiting", total=None, steps="", numbers="")
        self._live = Live(console=self._console, get_renderable=self.lines, refresh_per_second=10)
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def lines(self) -> RenderableType:
        """Return what is shown now: the bar and, once there are two, the losses."""
        from rich.console import Group
        from rich.text import Text

        assert self._progress is not None
        table = self._progress.make_tasks_table(self._progress.tasks)
        losses = self._losses
        if len(losses) < 2:
            return table
        curve = sparkline(thinned(losses, max(8, min(_SPARK_POINTS, self._console.width - _CURVE_WORDS))))
        told = f"  loss {curve}  {losses[0]:.4g} → {losses[-1]:.4g}"
        return Group(table, Text(told, style="cyan", no_wrap=True, overflow="ellipsis"))

    def show(self, update: Update) -> None:
        """Show one update."""
        assert self._progress is not None and self._task is not None
        if isinstance(update, Event):
            told = event_lines(update, self._console, brief=True)
            self._console.print(told, style=_LEVELS.get(update.level, "dim"))
        elif isinstance(update, Metric):
            if update.kind == "train" and update.values.get("loss") is not None:
                self._losses.append(update.values["loss"])
        else:
            self._progress.update(
                self._task,
                description=screen.sentence(phase(update)),
                total=self._total(update),
                completed=update.checked.bytes if update.checked else update.step,
                steps=steps(update),
                numbers=" · ".join(numbers(update)),
            )

    @staticmethod
    def _total(job: JobRead) -> float | None:
        # Without a total the bar pulses: something is under way whose length is not known.
        if job.checked is not None:
            return float(max(job.checked.total_bytes, 1))
        if job.status in TERMINAL or (job.max_steps and job.step):
            return float(max(job.max_steps or 1, job.step))
        return None


class PlainLines:
    """A line for each event, each change of phase and each metric: for logs and pipes."""

    def __init__(self, console: Console, *, brief: bool = False):
        self._console = console
        self._brief = brief
        self._phase = ""
        self._job: JobRead | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def show(self, update: Update) -> None:
        """Show one update."""
        if isinstance(update, Event):
            told = event_lines(update, self._console, brief=self._brief)
            self._print(told, _LEVELS.get(update.level))
        elif isinstance(update, Metric):
            self._print(self._metric_line(update))
        else:
            self._job = update
            if (now := phase(update)) != self._phase:
                self._phase = now
                self._print("  ".join(filter(None, [screen.sentence(now), steps(update), *numbers(update)])))

    def _metric_line(self, metric: Metric) -> str:
        # The loss is what one watches; `logs -o json` and `GET /jobs/{id}/metrics` have the rest.
        shown = [name for name in metric.values if name in _LOSSES] or list(metric.values)
        of = f"/{self._job.max_steps}" if self._job and self._job.max_steps else ""
        words = [f"{metric.kind} step {metric.step}{of}"]
        words += [f"{screen.sentence(name)} {_number(metric.values[name])}" for name in shown]
        return "  ".join(words + (pace(self._job) if self._job and metric.kind == "train" else []))

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style)
        self._console.file.flush()


class JsonLines:
    """Each update as one JSON object with its `type`: event, metric or job."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def show(self, update: Update) -> None:
        """Print one update."""
        kind = "event" if isinstance(update, Event) else "metric" if isinstance(update, Metric) else "job"
        print(json.dumps({"type": kind, **screen.plain(update)}, ensure_ascii=False), flush=True)
