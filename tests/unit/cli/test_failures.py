"""What a command prints, and its exit code, when the server or the command itself goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.client.conftest import a_job
from tests.unit.client.peer import Peer, problem, raw, says


def test_what_the_server_refuses_is_said_with_its_hint(peer: Peer, tunery):
    peer.on(
        "POST",
        "/jobs",
        problem(400, "invalid_input", "model: there is no folder 'x'", param="model", hint="see models"),
    )
    done = tunery("submit", "hf://x/y", "-m", "x")
    assert done.exit_code == 2
    assert "error: model: there is no folder 'x'" in done.stderr
    assert "hint: see models" in done.stderr and "req_1" in done.stderr
    as_json = tunery("-o", "json", "submit", "hf://x/y", "-m", "x")
    assert json.loads(as_json.stderr)["error"] == {
        "code": "invalid_input",
        "message": "model: there is no folder 'x'",
        "param": "model",
        "hint": "see models",
        "request_id": "req_1",
    }


def test_everything_that_the_server_names_is_said(peer: Peer, tunery):
    named = [{"param": "seed", "message": "too small"}, {"param": "lora.r", "message": "too big", "hint": "less"}]
    peer.on("POST", "/jobs", problem(400, "invalid_input", "seed: too small (and 1 more)", param="seed", errors=named))
    done = tunery("submit", "hf://x/y", "-m", "x")
    assert "error: seed: too small (and 1 more)\nerror: lora.r: too big" in done.stderr
    assert json.loads(tunery("submit", "hf://x/y", "-m", "x", "-o", "json").stderr)["error"]["errors"] == named


def test_another_program_at_the_address(peer: Peer, tunery):
    peer.on("GET", "/jobs", raw(b"<Error>AccessDenied</Error>", 403))
    done = tunery("ls")
    assert done.exit_code == 2 and "403" in done.stderr and "the address of a Tunery server" in done.stderr


def test_a_folder_that_cannot_be_made_is_named(peer: Peer, tunery, tmp_path: Path):
    (tmp_path / "taken").write_text("")
    artifact = {"name": "adapter/a.bin", "bytes": 1, "sha256": "0" * 64, "url": "/a.bin"}
    peer.on("GET", "/jobs/job_1/artifacts", says({"data": [artifact]}))
    done = tunery("download", "job_1", tmp_path / "taken")
    assert done.exit_code == 1
    assert f"error: {tmp_path}/taken" in done.stderr.replace("\n", "") and "Errno" not in done.stderr


def test_no_server(tunery, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TUNERY_URL")
    done = tunery("ls")
    assert done.exit_code == 2
    assert "tunery up" in done.stderr


def test_a_server_fault_is_exit_code_1(peer: Peer, tunery):
    peer.on("GET", "/jobs", problem(500, "internal"))
    assert tunery("ls").exit_code == 1


def test_a_mistake_of_our_own_is_one_line_and_debug_shows_the_rest(peer: Peer, tunery, monkeypatch):
    from common.client import jobs

    monkeypatch.setattr(jobs.Jobs, "get", lambda *_: 1 / 0)
    done = tunery("show", "job_1")
    assert done.exit_code == 1
    assert "ZeroDivisionError" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in tunery("--debug", "show", "job_1").stderr


def test_a_reader_that_leaves_early_hears_no_complaint(peer: Peer, tunery):
    peer.on(
        "GET", "/jobs", says({"data": [a_job(id=f"job_{n}") for n in range(3000)], "has_more": False, "next": None})
    )
    command = f"{sys.executable} -m common.cli ls -o json | head -n 1"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[3]
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
