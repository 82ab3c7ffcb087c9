"""The demo's parts: it stops what it started, whatever happens, and shows answers that can be read anywhere."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from common.cli import demo
from common.cli.chat import show_compared
from common.client import Tunery
from common.errors import InfraError, InvalidInput
from tests.unit.client.peer import Peer, raw, says

ANSWERS = [{"prompt": "Do you have rain boots?", "base": "I am a model.\x1b[2J", "adapter": "Ahoy! We do."}]


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory for a service that needs no base model converted."""
    monkeypatch.setenv("TUNERY_MODEL_DIR", str(tmp_path))
    for name in ("TUNERY_URL", "TUNERY_API_KEY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9" if name == "TUNERY_URL" else "another")
    return tmp_path / "stack"


def test_the_service_runs_for_the_block_and_is_gone_after_an_error(stack: Path):
    with pytest.raises(KeyboardInterrupt), demo._running(stack) as client:
        pid = json.loads((stack / "up.json").read_text())["pid"]
        assert client.jobs.list().data == [], "it is asked with its own key, not with the environment's"
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (stack / "up.json").exists()


def test_sigterm_is_like_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), demo._ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_service_that_does_not_start_is_an_error_with_its_log(stack: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNERY_LEASE_S", "never")
    with pytest.raises(InfraError, match="TUNERY_LEASE_S"), demo._running(stack):
        pass


def test_ready_is_what_the_service_says(peer: Peer, tmp_path: Path):
    file = tmp_path / "up.json"
    assert not demo._is_ready(file)
    file.write_text("{")
    assert not demo._is_ready(file)
    file.write_text(json.dumps({"url": peer.url}))
    peer.on("GET", "/readyz", raw(b"", 503), says({"ready": True}))
    assert [demo._is_ready(file), demo._is_ready(file)] == [False, True]


def test_a_job_that_fails_ends_the_demo_with_its_hint(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tests.unit.client.conftest import a_job
    from tests.unit.client.peer import stream
    from tests.unit.client.test_resources import DATASET

    (tmp_path / "support-bot.jsonl").write_text("{}\n")
    (tmp_path / "demo.json").write_text('{"model": "base", "suffix": "bot"}')
    error = {"code": "diverged", "message": "the loss is NaN", "hint": "lower it"}
    peer.on("POST", "/datasets", says(DATASET, 201))
    peer.on("POST", "/jobs", says(a_job(), 201))
    peer.on("GET", "/jobs/job_1", says(a_job()))
    peer.on("GET", "/jobs/job_1/events", stream(("job", None, a_job(status="failed", error=error))))
    with Tunery(peer.url, "k") as client, pytest.raises(InfraError, match="failed: the loss is NaN") as caught:
        demo._train(client, tmp_path)
    assert caught.value.hint == "lower it"
    assert json.loads(peer.asked("POST", "/jobs")[0].body) == {
        "model": "base",
        "suffix": "bot",
        "dataset": "dataset:ds_1",
    }


def test_answers_side_by_side(capsys: pytest.CaptureFixture[str]):
    show_compared(ANSWERS)
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "prompt:  Do you have rain boots?",
        "base:    I am a model. [2J",
        "adapter: Ahoy! We do.",
    ]


def test_without_examples_it_says_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "common" / "cli" / "demo.py"))
    with pytest.raises(InvalidInput, match="examples"):
        demo._examples()
