"""The supervision of child processes: restart, order and completeness of the stop, death of the parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.embedded.children import Child, Children, run_to_end
from common.errors import InfraError

_SLEEP = ("sleep", "1000")


class Said(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def children(said: Said) -> Iterator[Children]:
    made = Children(say=said)
    yield made
    made.stop(hurry=lambda: True)


def _child(tmp_path: Path, name: str, argv: tuple[str, ...], **options) -> Child:
    return Child(name, argv, {"PATH": os.environ["PATH"]}, tmp_path / f"{name}.log", **options)


def _python(tmp_path: Path, name: str, code: str, **options) -> Child:
    return _child(tmp_path, name, (sys.executable, "-c", code), **options)


def _until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Wait for `condition`, which other processes bring about."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about in time"
        os.sched_yield()


def _is_gone(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_killed_child_is_started_again_within_two_seconds(tmp_path, children, said) -> None:
    children.start(_child(tmp_path, "a", _SLEEP))
    for _ in range(3):
        first = children.pids()["a"]
        os.kill(first, signal.SIGKILL)
        killed = time.monotonic()
        _until(lambda old=first: children.revive() or children.pids().get("a", old) != old)
        assert time.monotonic() - killed < 2
    assert len(said) == 3
    assert all("a was ended by SIGKILL; starting it again" in line for line in said)


def test_a_child_that_always_fails_is_started_again_without_limit_and_without_spinning(tmp_path, children, said):
    children.start(_python(tmp_path, "failing", "print('once more', flush=True); raise SystemExit(3)"))
    log = tmp_path / "failing.log"
    began = time.monotonic()
    _until(lambda: children.revive() or log.read_text().count("once more") >= 3)
    assert time.monotonic() - began > 1.5, "restarts must pause"
    assert "failing ended with exit code 3" in said[0]


def test_start_waits_until_ready(tmp_path, children) -> None:
    flag = tmp_path / "ready"
    children.start(
        _python(tmp_path, "a", f"open({str(flag)!r}, 'w').close(); import time; time.sleep(1000)"), ready=flag.exists
    )
    assert flag.exists()


def test_a_child_that_ends_while_starting_is_an_error_with_its_log(tmp_path, children) -> None:
    with pytest.raises(InfraError, match=r"(?s)broken ended with exit code 1 while starting.*no such port"):
        children.start(_python(tmp_path, "broken", "raise SystemExit('no such port')"), ready=lambda: False)


def test_a_child_that_is_never_ready_is_an_error(tmp_path, children) -> None:
    with pytest.raises(InfraError, match="a was not ready after 0 s"):
        children.start(_child(tmp_path, "a", _SLEEP), ready=lambda: False, timeout_s=0.2)


def test_a_command_that_does_not_exist_is_an_error(tmp_path, children) -> None:
    with pytest.raises(InfraError, match=r"(?s)a ended with exit code 1 while starting.*no-such-command"):
        children.start(_child(tmp_path, "a", ("no-such-command",)), ready=lambda: False)


def test_the_same_name_cannot_run_twice(tmp_path, children) -> None:
    children.start(_child(tmp_path, "a", _SLEEP))
    with pytest.raises(ValueError, match="a is already running"):
        children.start(_child(tmp_path, "a", _SLEEP))


def test_stop_ends_higher_ranks_before_lower_ones(tmp_path, children) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys, time\n"
        "def leave(*_):\n"
        "    open({order!r}, 'a').write({name!r} + '\\n')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "open({flag!r}, 'w').close()\n"
        "time.sleep(1000)\n"
    )
    for name, rank in (("database", 0), ("api", 1), ("worker", 2)):
        flag = tmp_path / f"{name}.ready"
        filled = code.format(order=str(order), name=name, flag=str(flag))
        children.start(_python(tmp_path, name, filled, rank=rank), ready=flag.exists)
    pids = children.pids()
    children.stop()
    assert order.read_text().split() == ["worker", "api", "database"]
    assert all(_is_gone(pid) for pid in pids.values())
    assert children.pids() == {}


def test_a_child_that_ignores_sigterm_is_killed_with_its_children_after_its_grace(tmp_path, children) -> None:
    note = tmp_path / "grandchild"
    code = (
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(note)!r} + '.tmp', 'w').write(str(child.pid))\n"
        f"os.rename({str(note)!r} + '.tmp', {str(note)!r})\n"
        "time.sleep(1000)\n"
    )
    children.start(_python(tmp_path, "stubborn", code, grace_s=0.3), ready=note.exists)
    pid, grandchild = children.pids()["stubborn"], int(note.read_text())
    children.stop()
    assert _is_gone(pid)
    _until(lambda: _is_gone(grandchild))


def test_hurry_ends_the_grace_period(tmp_path, children) -> None:
    flag = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(flag)!r}, 'w'); time.sleep(1000)"
    children.start(_python(tmp_path, "a", code, grace_s=1000), ready=flag.exists)
    children.stop(hurry=lambda: True)
    assert children.pids() == {}


def test_children_die_with_a_parent_that_is_killed(tmp_path) -> None:
    note = tmp_path / "pid"
    code = (
        "import os, pathlib, time\n"
        "from common.embedded.children import Child, Children\n"
        "children = Children(print)\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "children.start(Child('a', ('sleep', '1000'), {'PATH': os.environ['PATH']}, folder / 'a.log'))\n"
        "(folder / 'tmp').write_text(str(children.pids()['a']))\n"
        "(folder / 'tmp').rename(folder / 'pid')\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3]) as parent:
        _until(note.exists)
        pid = int(note.read_text())
        assert not _is_gone(pid)
        parent.kill()
    _until(lambda: _is_gone(pid))


def test_run_to_end_raises_with_the_end_of_the_log(tmp_path) -> None:
    run_to_end(_python(tmp_path, "good", "pass"))
    with pytest.raises(InfraError, match=r"(?s)bad ended with exit code 1.*column x is missing"):
        run_to_end(_python(tmp_path, "bad", "raise SystemExit('column x is missing')"))
    with pytest.raises(InfraError, match="slow took longer than 0 s"):
        run_to_end(_child(tmp_path, "slow", _SLEEP), timeout_s=0.2)


def test_a_large_log_is_set_aside_at_the_start(tmp_path, children) -> None:
    log = tmp_path / "a.log"
    with log.open("wb") as file:
        file.truncate(17 * 2**20)
    run_to_end(_python(tmp_path, "a", "print('new')"))
    assert log.read_text() == "new\n"
    assert (tmp_path / "a.log.1").stat().st_size == 17 * 2**20
