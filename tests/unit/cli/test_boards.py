"""How a running job is shown."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from common.cli import boards
from common.client.answers import parse
from common.schemas.jobs import Event, JobRead, Metric
from tests.unit.client.conftest import a_job, a_metric, an_event


def job(**changes) -> JobRead:
    return JobRead.model_validate(a_job(**changes))


UPDATES = [
    job(status="validating", stage=None, step=0, max_steps=None, loss=None, tokens_per_s=None, eta_s=None),
    Event.model_validate(an_event(1, "job.accepted")),
    job(status="queued", stage=None, step=0, max_steps=None, loss=None, tokens_per_s=None, eta_s=None),
    job(),
    job(step=4),
    Metric.model_validate(a_metric(5, 4, loss=1.25)),
    Metric.model_validate(a_metric(6, 5, loss=1.0)),
    job(status="succeeded", stage=None, step=10, eta_s=None),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "validating", "stage": None}, "validating"),
        ({"status": "queued", "stage": None}, "queued"),
        ({"stage": "train"}, "training"),
        ({"stage": "export"}, "running: export"),
        ({"desired": "cancel"}, "cancelling"),
        ({"desired": "pause"}, "pausing"),
        ({"status": "paused", "desired": "pause", "stage": None}, "paused"),
        ({"status": "cancelled", "desired": "cancel"}, "cancelled"),
    ],
)
def test_the_phase_in_words(changes, words):
    assert boards.phase(job(**changes)) == words


def test_the_numbers_of_a_running_job():
    assert boards.numbers(job()) == ["loss 1.5", "250 tokens/s", "0:14 left"]
    assert boards.numbers(job(status="succeeded")) == ["loss 1.5"]
    assert boards.numbers(job(loss=None, tokens_per_s=None, eta_s=None)) == []
    assert (boards.steps(job()), boards.steps(job(max_steps=None))) == ("3/10", "")


def test_a_sparkline():
    assert boards.sparkline([3, 2, 1]) == "█▅▁"
    assert boards.sparkline([1, 1]) == "▁▁"
    assert boards.sparkline([1]) == ""


def test_plain_lines_tell_each_thing_once():
    console = Console(file=io.StringIO(), width=200, markup=False)
    with boards.PlainLines(console) as board:
        for update in UPDATES:
            board.show(update)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "validating"
    assert "job.accepted" in lines[1]
    assert lines[2:4] == ["queued", "training  3/10  loss 1.5  250 tokens/s  0:14 left"]
    assert lines[4] == "train step 4/10  loss 1.25  250 tokens/s  0:14 left"
    assert lines[6] == "succeeded  10/10  loss 1.5"
    assert len(lines) == 7


def test_a_terminal_gets_a_bar_with_everything_on_it():
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system=None, markup=False)
    with boards.LiveBoard(console) as board:
        for update in UPDATES[:-1]:
            board.show(update)
        board.show(job(step=6))
    out = console.file.getvalue()
    for words in ("job.accepted", "training", "6/10", "loss 1.5", "250 tokens/s", "0:14 left"):
        assert words in out
    assert out.rstrip().endswith("\x1b[?25h")


def test_a_check_shows_how_far_it_is():
    far = {"param": "dataset", "rows": 12_345, "bytes": 30_000_000, "total_bytes": 120_000_000}
    waits = {"code": "checking", "message": "its dataset and base model are being checked"}
    update = job(status="validating", stage="preflight", max_steps=None, loss=None, checked=far, waits_for=waits)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, markup=False)
    with boards.LiveBoard(console) as board:
        board.show(update)
        [line] = ["".join(part.text for part in line) for line in console.render_lines(board.lines(), pad=False)]
    assert "checking" in line and "30.0 MB/120 MB" in line and "row 12,345 of the dataset" in line
    assert board._progress.tasks[0].percentage == 25


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_bar_and_losses_take_a_line_each(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, markup=False)
    with boards.LiveBoard(console) as board:
        for update in UPDATES:
            if not isinstance(update, Event):
                board.show(update)
        frame = ["".join(part.text for part in line) for line in console.render_lines(board.lines(), pad=False)]
    assert len(frame) == 2 and "succeeded" in frame[0]
    assert frame[1].rstrip() == "  loss █▁  1.25 → 1"


def test_a_long_run_keeps_the_shape_of_its_losses():
    assert boards.thinned([4, 2, 2, 0], 2) == [3, 1]
    assert boards.thinned([3, 2, 1], 48) == [3, 2, 1]
    assert boards.thinned([], 48) == []
    falling = [1000 - step for step in range(1000)]
    assert boards.sparkline(boards.thinned(falling, 8)) == "█▇▆▅▄▃▂▁"


@pytest.mark.parametrize("kind", [boards.PlainLines, boards.LiveBoard])
def test_what_an_event_says_goes_on_under_itself(kind):
    said = "the loss is on the assistant's turns only, since the template tells them apart from the others"
    event = Event.model_validate(an_event(1, "loss.chosen") | {"message": said})
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, markup=False)
    with kind(console) as board:
        board.show(event)
    told = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).replace("\r", "\n")
    lines = [line.rstrip() for line in told.splitlines()]
    first = next(place for place, line in enumerate(lines) if "loss.chosen" in line)
    assert all(line.startswith(" " * 34) for line in lines[first + 1 : first + 3])
    assert " ".join(line[34:] for line in lines[first : first + 3]) == said
    # A pipe gets one line.
    piped = Console(file=io.StringIO(), width=10_000, markup=False)
    with boards.PlainLines(piped) as board:
        board.show(event)
    assert piped.file.getvalue().count("\n") == 1


@pytest.mark.parametrize("width", [80, 120, 10_000])
def test_each_bad_row_of_an_event_has_a_line_in_the_log(width):
    rows = [f"dataset: row {row}: is\x1b a number" for row in (2, 3, 7)]
    event = Event.model_validate(an_event(1, "job.failed") | {"message": "\n".join(rows)})
    console = Console(file=io.StringIO(), width=width, force_terminal=width < 10_000, color_system=None, markup=False)
    with boards.PlainLines(console) as board:
        board.show(event)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "job.failed" in lines[0] and all(line.startswith(" " * 34) for line in lines[1:])
    told = " ".join(line[34:] for line in lines)
    assert told == " ".join(row.replace("\x1b", " ") for row in rows)
    assert sum("dataset: row" in line for line in lines) == 3


def test_a_value_that_is_not_finite_is_shown_as_that():
    metric = parse(Metric, a_metric(5, 4, loss=None))
    for width, kind in ((200, boards.PlainLines), (140, boards.LiveBoard)):
        console = Console(file=io.StringIO(), width=width, markup=False)
        with kind(console) as board:
            board.show(metric)
        assert kind is boards.LiveBoard or console.file.getvalue() == "train step 4  loss not finite\n"


def test_json_lines_are_for_programs(capsys):
    for update in UPDATES:
        boards.JsonLines().show(update)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["type"] for line in lines] == ["job", "event", "job", "job", "job", "metric", "metric", "job"]
    assert lines[-1]["status"] == "succeeded"


def test_where_output_leads_decides(capsys):
    assert isinstance(boards.board(True), boards.JsonLines)
    assert isinstance(boards.board(False), boards.PlainLines)
