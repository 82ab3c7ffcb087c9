"""Tables fit the terminal; what comes from outside is text."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from common.cli import screen
from common.cli.jobs import _columns
from common.schemas.jobs import JobRead
from tests.unit.client.conftest import a_job
from tests.unit.client.peer import Peer, says, stream

LONG = "an-organisation-with-a-name/a-model-whose-name-is-longer-than-anything-8B-Instruct"


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, markup=False)


@pytest.mark.parametrize("width", [50, 60, 80, 100, 160, 300])
def test_a_table_of_jobs_fits_and_keeps_the_ids_whole(width):
    console = terminal(width)
    ids = [f"job_{number:026}" for number in range(3)]
    jobs = [JobRead.model_validate(a_job(id=job, model=LONG, suffix="support-bot")) for job in ids]
    screen.table(_columns(), jobs, console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4
    assert all(len(line.rstrip()) <= width for line in lines)
    assert [job in line for job, line in zip(ids, lines[1:], strict=True)] == [True] * 3
    assert all("running" in line for line in lines[1:])
    assert (LONG in lines[1]) == (width == 300)


@pytest.mark.parametrize("width", [80, 120])
def test_columns_without_values_leave_before_others_are_cut(width):
    console = terminal(width)
    job = a_job(id=f"job_{1:026}", model="SmolLM2-135M-Instruct", status="failed", suffix=None, max_steps=None)
    screen.table(_columns(), [JobRead.model_validate(job)], console)
    head, line = console.file.getvalue().splitlines()
    assert "SmolLM2-135M-Instruct" in line and "ago" in line
    assert ("SUFFIX" in head) == (width == 120), "where there is room, the columns are always the same"


@pytest.mark.parametrize("width", [60, 80])
def test_a_folded_column_is_never_cut(width):
    console = terminal(width)
    remark = "it has no card: it trains on the CPU, in the memory of its machine"
    columns = [screen.Column("WORKER", lambda row: row), screen.Column("REMARK", lambda _: remark, 1, folded=True)]
    screen.table(columns, ["vm-1-0123456789"], console)
    _, *lines = console.file.getvalue().splitlines()
    assert " ".join(line[17:].strip() for line in lines) == remark
    assert all(len(line) <= width for line in lines)


def test_a_pipe_gets_everything(capsys):
    screen.table(_columns(), [JobRead.model_validate(a_job(model=LONG))])
    assert LONG in capsys.readouterr().out


def test_what_comes_from_outside_moves_no_cursor_and_is_no_markup(capsys):
    evil = "\x1b[2J[red]x[/red]\nsecond\x07"
    screen.table([screen.Column("NAME", lambda row: row)], [evil])
    screen.fields([("name", evil)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert out.count("[red]x[/red] second") == 2


def test_numbers_for_people():
    assert [screen.size(n) for n in (None, 0, 999, 1000, 1_400_000_000, 150_000_000_000)] == [
        "",
        "0 B",
        "999 B",
        "1.0 kB",
        "1.4 GB",
        "150 GB",
    ]
    assert [screen.duration(s) for s in (None, 0, 59.6, 3723, -5)] == ["", "0:00", "1:00", "1:02:03", "0:00"]
    now = datetime.now(UTC)
    spans = [screen.ago(now - timedelta(seconds=s)) for s in (5, 300, 10_800, 1_036_800, -5)]
    assert spans == ["5s ago", "5m ago", "3h ago", "12d ago", "0s ago"]
    assert screen.ago(None) == ""


def test_moments_that_come_and_those_that_were():
    now = datetime.now(UTC)
    assert screen.away(now - timedelta(minutes=5)) == "5m ago"
    assert re.fullmatch(r"in (2:00:00|1:59:\d\d)", screen.away(now + timedelta(hours=2)))


def test_each_row_that_is_wrong_has_its_line(peer: Peer, tunery):
    error = {"code": "invalid_dataset", "message": "row 1: broken\nrow 3: \x1b[31mempty", "hint": None}
    failed = a_job(status="failed", error=error)
    peer.on("GET", "/jobs/job_1", says(failed))
    peer.on("GET", "/jobs/job_1/events", stream(("job", None, failed)))
    done = tunery("watch", "job_1")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == ["error: row 1: broken", "row 3:  [31mempty"]
