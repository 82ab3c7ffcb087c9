"""`python -m api` as a process: it starts, serves, and ends in good order."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from common import context, keys
from common.embedded.ports import free_ports
from common.settings import Settings, child_environment
from tests.api.conftest import SPEC


@pytest.fixture
def installed(settings: Settings, sqlite_url: str) -> tuple[dict[str, str], str, str]:
    """A migrated installation: the environment of its processes, the API's address, and a key."""
    made = settings.model_copy(update={"database_url": sqlite_url, "port": free_ports(1)[0]})
    parts = context.build(made)
    with parts.write() as session:
        _, key = keys.create(session, name="test", tenant="default")
    parts.close()
    values = {
        "DATABASE_URL": made.database_url,
        "BROKER_URL": made.broker_url.get_secret_value(),
        "S3_ENDPOINT_URL": made.s3_endpoint_url or "",
        "S3_BUCKET": made.s3_bucket,
        "S3_ACCESS_KEY_ID": made.s3_access_key_id or "",
        "S3_SECRET_ACCESS_KEY": made.s3_secret_access_key.get_secret_value() if made.s3_secret_access_key else "",
        "MODEL_DIR": str(made.model_dir),
        "PORT": str(made.port),
    }
    environment = child_environment({f"TUNERY_{name}": value for name, value in values.items()})
    return environment, f"http://127.0.0.1:{made.port}", key


@pytest.fixture
def process(installed: tuple[dict[str, str], str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running `python -m api`, whose log is in `tmp_path / "log"`."""
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([sys.executable, "-m", "api"], env=installed[0], stderr=log) as child,
    ):
        yield child
        child.kill()


def test_it_ends_with_its_streams(
    installed: tuple[dict[str, str], str, str], process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    _, url, key = installed
    with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, trust_env=False) as client:
        await_life(client, process)
        job = client.post("/jobs", json=SPEC).json()["id"]
        with client.stream("GET", f"/jobs/{job}/events", headers={"accept": "text/event-stream"}) as response:
            messages = iter(httpx2.EventSource(response))
            next(messages)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert {message.event for message in messages} <= {"event", "job"}
        assert process.wait(10) == 0
    assert time.monotonic() - began < 8
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and key not in log


def await_life(client: httpx2.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "the API ended"
        try:
            assert client.get("/livez").status_code == 200
            return
        except httpx2.ConnectError:
            time.sleep(0.05)
    raise AssertionError("the API did not start")


def test_without_an_address_it_says_which(tmp_path: Path) -> None:
    environment = {name: value for name, value in child_environment({}).items() if not name.startswith("TUNERY_")}
    done = subprocess.run([sys.executable, "-m", "api"], env=environment, capture_output=True, timeout=30, check=False)
    assert done.returncode == 1 and b"TUNERY_DATABASE_URL is not set" in done.stderr and b"Traceback" not in done.stderr
