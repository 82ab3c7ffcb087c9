"""`tunery worker` and `tunery sweeper` become, or supervise, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from sqlalchemy import select

from common.cards import cards
from common.db.engine import Sessions, make_engine
from common.db.rows import WorkerRow

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60
# Celery says so once it hears signals and bells.
LISTENS = " ready."


@pytest.fixture
def environment(sqlite_url: str, valkey_url: str, tmp_path: Path) -> dict[str, str]:
    values = {
        "TUNERY_DATABASE_URL": sqlite_url,
        "TUNERY_BROKER_URL": valkey_url,
        "TUNERY_BROKER_PREFIX": f"cli-{os.getpid()}",
        "TUNERY_WORK_DIR": str(tmp_path / "work"),
    }
    return {**os.environ, **values}


def start(environment: dict[str, str], *arguments: str, errors: int | IO[str] = subprocess.PIPE):
    command = [sys.executable, "-m", "common.cli", *arguments]
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=errors)


def seen_workers(environment: dict[str, str]) -> list[WorkerRow]:
    sessions = Sessions(make_engine(environment["TUNERY_DATABASE_URL"]))
    try:
        with sessions.read() as session:
            return list(session.scalars(select(WorkerRow)))
    finally:
        sessions.engine.dispose()


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_one_worker_per_card_and_all_leave_on_a_signal(environment: dict[str, str], tmp_path: Path):
    environment |= {"CUDA_VISIBLE_DEVICES": "0,1"}
    process = start(environment, "worker")
    try:
        logs = [tmp_path / "work" / "logs" / f"worker-{card}.log" for card in (0, 1)]
        wait_for(lambda: all(log.exists() and LISTENS in log.read_text() for log in logs), process)
        assert len(seen_workers(environment)) == 2
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert {row.state for row in seen_workers(environment)} == {"gone"}


def test_a_worker_without_a_card_is_the_process_itself(environment: dict[str, str], tmp_path: Path):
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "worker.log"
    with log.open("w") as errors:
        process = start(environment, "worker", "--preflight", errors=errors)
    try:
        wait_for(lambda: LISTENS in log.read_text(), process)
        (row,) = seen_workers(environment)
        assert row.kind == "preflight" and f"-{process.pid}-" in row.id
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0


def test_once_leaves_when_there_is_nothing_to_do(environment: dict[str, str]):
    process = start(environment | {"CUDA_VISIBLE_DEVICES": "0,1"}, "worker", "--once")
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors


def test_a_sweeper_without_settings_says_which(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    done = start(environment, "sweeper")
    _, errors = done.communicate(timeout=DEADLINE_S)
    assert done.returncode == 1
    assert "TUNERY_DATABASE_URL is not set" in errors and "Traceback" not in errors


def test_which_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for value, expected in [("", []), ("0", ["0"]), ("2, GPU-abc", ["2", "GPU-abc"]), ("1,-1,2", ["1"]), ("-1", [])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert cards() == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cards() == ["0", "1"]


def test_the_first_key(environment: dict[str, str], tmp_path: Path):
    file = tmp_path / "keys" / "api-key"
    first = start(environment, "admin", "first-key", "--file", str(file))
    out, errors = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 0, errors
    assert file.read_text().strip() in out and file.stat().st_mode & 0o777 == 0o600
    again = start(environment, "-o", "json", "admin", "first-key", "--file", str(file))
    assert file.read_text().strip() in again.communicate(timeout=DEADLINE_S)[0]
