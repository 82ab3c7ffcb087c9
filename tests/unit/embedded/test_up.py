"""`tunery up` as its users meet it: a process that starts everything, keeps it running, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.embedded.ports import free_ports

_DEADLINE_S = 60.0
_CHILDREN = {"valkey", "seaweedfs", "api", "preflight", "worker", "sweeper"}


class Up:
    """A running `tunery up` and what can be seen of it from outside."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder = folder
        environment = {
            "PATH": os.environ["PATH"],
            "CUDA_VISIBLE_DEVICES": "",
            # No base model: its conversion has nothing to do with what is tested here.
            "TUNERY_MODEL_DIR": str(folder / "no-models"),
        }
        command = [sys.executable, "-m", "common.cli", "up", "--data-dir", str(folder), *(arguments or ("--port", "0"))]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[3],
        )

    @property
    def url(self) -> str:
        return json.loads((self.folder / "up.json").read_text())["url"]

    @property
    def key(self) -> str:
        return (self.folder / "api-key").read_text().strip()

    def wait_until_ready(self) -> None:
        self.wait_until(lambda: get(f"{self.url}/readyz")[0] == 200 and not self._without_workers())

    def _without_workers(self) -> bool:
        return bool(json.loads(get(f"{self.url}/readyz")[1])["warnings"])

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionError, urllib.error.URLError):
                if condition():
                    return
            assert self.process.poll() is None, f"tunery up ended:\n{self.output()}"
            assert time.monotonic() < deadline, f"not in time; the logs:\n{self.logs()}"
            time.sleep(0.05)

    def output(self) -> str:
        return self.process.communicate(timeout=_DEADLINE_S)[0]

    def logs(self) -> str:
        return "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in (self.folder / "logs").glob("*.log"))

    def children(self) -> dict[str, int]:
        """Process ids by what the process is."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            for name, mark in (("api", "api"), ("preflight", "preflight"), ("worker", "train"), ("sweeper", "sweeper")):
                if mark in words:
                    found[name] = int(pid)
            for name, mark in (("valkey", "valkey-server"), ("seaweedfs", "weed")):
                if mark in words[0]:
                    found[name] = int(pid)
        return found


def get(url: str, key: str | None = None) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _alive(pids: dict[str, int]) -> dict[str, int]:
    return {name: pid for name, pid in pids.items() if _state(pid) not in (None, "Z")}


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def starting(*arguments: str) -> Up:
        started.append(Up(tmp_path / "data", *arguments))
        return started[-1]

    yield starting
    for up in started:
        up.process.kill()
        up.process.communicate()


def test_up_runs_everything_revives_what_dies_and_stops_all(start: Callable[..., Up]) -> None:
    up = start()
    up.wait_until_ready()
    pids = up.children()
    assert set(pids) == _CHILDREN
    assert (up.folder / "api-key").stat().st_mode & 0o777 == 0o600
    assert (up.folder / "tunery.db").stat().st_mode & 0o077 == 0
    assert get(f"{up.url}/jobs", up.key)[0] == 200
    assert get(f"{up.url}/jobs")[0] == 401

    second = start()
    assert second.process.wait(_DEADLINE_S) != 0
    refusal = second.output()
    assert f"runs already with the data directory {up.folder}" in refusal
    assert up.url in refusal

    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    up.wait_until(lambda: set(up.children()) == _CHILDREN and not set(up.children().values()) & set(pids.values()))
    assert time.monotonic() - killed < 2
    up.wait_until(lambda: get(f"{up.url}/jobs", up.key)[0] == 200)

    pids = up.children()
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(_DEADLINE_S) == 0
    assert _alive(pids) == {}
    assert not (up.folder / "up.json").exists()
    assert "worker-0 was ended by SIGKILL; starting it again" in up.output()


def test_children_end_with_a_killed_up_and_the_next_one_goes_on(start: Callable[..., Up]) -> None:
    up = start()
    up.wait_until_ready()
    key, pids = up.key, up.children()
    up.process.kill()
    up.process.wait()
    deadline = time.monotonic() + 5
    while _alive(pids):
        assert time.monotonic() < deadline, f"still alive: {_alive(pids)}"

    again = start()
    again.wait_until(lambda: get(f"{again.url}/jobs", key)[0] == 200)
    assert again.key == key
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(_DEADLINE_S) == 0


def test_a_taken_port_is_a_clear_error(start: Callable[..., Up]) -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", port)):
        up = start("--port", str(port))
        assert up.process.wait(_DEADLINE_S) != 0
    output = up.output()
    assert f"port {port} on 127.0.0.1 is in use" in output
    assert "--port 0 takes a free one" in output


def test_a_broken_setting_is_an_error_that_shows_the_log(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "TUNERY_MODEL_DIR": str(tmp_path),
        "TUNERY_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none",
    }
    command = [sys.executable, "-m", "common.cli", "up", "--port", "0", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode != 0
    assert "migrations ended with exit code 1" in done.stderr
    assert "The end of" in done.stderr
    assert not (tmp_path / "data" / "up.json").exists()
