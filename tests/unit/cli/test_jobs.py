"""`ls`, `show`, the actions on jobs and what they left: what is asked, what is printed, and the exit code."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.unit.client.conftest import a_job, a_metric, an_event
from tests.unit.client.peer import Peer, file, raw, says, stream


def test_ls(peer: Peer, tunery):
    peer.on("GET", "/jobs", says({"data": [a_job()], "has_more": True, "next": "job_1"}))
    done = tunery("ls", "--status", "running", "--metadata", "team=red")
    assert done.exit_code == 0
    assert "job_1" in done.stdout and "3/10" in done.stdout
    assert "tunery ls --after job_1" in done.stderr
    assert peer.requests[0].query == {"status": ["running"], "metadata[team]": ["red"], "limit": ["20"]}


@pytest.mark.parametrize("arguments", [("-o", "json", "ls"), ("ls", "-o", "json"), ("-o", "table", "ls", "-o", "json")])
def test_json_before_or_after_the_command(peer: Peer, tunery, arguments):
    peer.on("GET", "/jobs", says({"data": [a_job()], "has_more": False, "next": None}))
    document = json.loads(tunery(*arguments).stdout)
    assert document["data"][0]["id"] == "job_1" and document["has_more"] is False


def test_a_list_of_certain_jobs(peer: Peer, tunery):
    peer.on("GET", "/jobs", says({"data": [], "has_more": False, "next": None}))
    done = tunery("ls", "--model", "org/base", "--created-before", "2026-11-01T00:00Z", "--metadata", "a=b")
    assert "no such jobs" in done.stderr
    asked = peer.requests[0].query
    assert (asked["model"], asked["metadata[a]"]) == (["org/base"], ["b"])
    assert datetime.fromisoformat(asked["created_before"][0]) == datetime(2026, 11, 1, tzinfo=UTC)


def test_show(peer: Peer, tunery):
    failed = a_job(status="failed", error={"code": "diverged", "message": "the loss is NaN", "hint": "lower it"})
    peer.on("GET", "/jobs/job_1", says(failed))
    out = tunery("show", "job_1").stdout
    for words in ("job_1", "failed", "the loss is NaN", "lower it", "learning_rate=0.0001", "team=red"):
        assert words in out


def test_bad_rows_are_a_list(peer: Peer, tunery):
    problems = [
        {
            "param": "dataset",
            "row": row,
            "field": f"messages[{row}].content",
            "code": "empty",
            "message": f"is\x1b bad {row}",
        }
        for row in range(1, 101)
    ]
    said = {"code": "bad_rows", "message": "dataset: row 1: is bad", "hint": "fill it in"}
    failed = a_job(status="failed", error=said | {"problems": problems, "num_problems": 137})
    peer.on("GET", "/jobs/job_1", says(failed))
    lines = tunery("show", "job_1").stdout.splitlines()
    assert lines == [line.rstrip() for line in lines], "a pipe gets no blanks that would wrap in a terminal"
    assert "error            137 bad rows in dataset" in lines and "hint             fill it in" in lines
    lines = lines[next(place for place, line in enumerate(lines) if "WRONG" in line) :]
    assert lines[0].split() == ["ROW", "WHERE", "WHAT", "IS", "WRONG"]
    assert [line.split()[:2] for line in lines[1:11]] == [
        [str(row), f"messages[{row}].content"] for row in range(1, 11)
    ]
    assert lines[10].endswith("is  bad 10") and lines[11:] == [
        "… and 127 more; the first 100: tunery show job_1 -o json"
    ]
    assert len(json.loads(tunery("show", "job_1", "-o", "json").stdout)["error"]["problems"]) == 100
    peer.on("GET", "/jobs/job_1/events", stream(("job", None, failed)))
    watched = tunery("watch", "job_1").stderr
    assert "error: 137 bad rows in dataset\n" in watched and lines[11] in watched and watched.count("is  bad") == 10


def test_a_job_without_metrics_and_checkpoints_says_so(peer: Peer, tunery):
    peer.on("GET", "/jobs/job_1/metrics", says({"data": [], "has_more": False, "next": 0}))
    peer.on("GET", "/jobs/job_1/checkpoints", says({"data": []}))
    assert tunery("metrics", "job_1", "--kind", "eval").stderr == "no eval metrics\n"
    assert tunery("checkpoints", "job_1").stderr == "no checkpoints\n"


def test_show_tells_what_became_of_the_adapter(peer: Peer, tunery):
    gap = {"relative": 0.0036, "max_abs": 0.1, "kl": 1e-5, "top1": 1.0}
    report = {
        "merged": {
            "merged": {"made": True, "dtype": "bfloat16", "from_adapter_on_16_bit_base": gap},
            "merged_4bit": {"made": False, "error": {"code": "disk_full", "message": "the disk is full"}},
        },
        "servable": {
            "vllm": {"servable": True, "commands": ["vllm serve org/base --enable-lora"]},
            "sglang": {"servable": False, "reasons": ["SGLang has no DoRA"]},
        },
    }
    peer.on("GET", "/jobs/job_1", says(a_job(status="succeeded", export=["adapter", "merged"], report=report)))
    out = " ".join(tunery("show", "job_1").stdout.split())
    assert "export adapter, merged" in out
    assert "merged bfloat16; its logits differ by 0.0036 from the adapter on 16 bit base" in out
    assert "merged_4bit not made: the disk is full" in out
    assert "on vllm vllm serve org/base --enable-lora" in out and "on sglang no: SGLang has no DoRA" in out


def test_a_job_that_waits_shows_why(peer: Peer, tunery):
    waits_for = {"code": "workers_busy", "message": "2 of 2 workers are busy", "until": None}
    place = {"position": 3, "waits_for": waits_for, "expected_start": "2026-11-01T12:00:00Z"}
    peer.on("GET", "/jobs/job_1", says(a_job(status="queued", stage=None, **place)))
    out = tunery("show", "job_1").stdout
    assert "queued, position 3: 2 of 2 workers are busy" in out and "expected start" in out


@pytest.mark.parametrize("action", ["cancel", "pause", "resume", "retry"])
def test_wishes(peer: Peer, tunery, action):
    for job in ("job_1", "job_2"):
        peer.on("POST", f"/jobs/{job}/{action}", says(a_job(id=job, status="queued", stage=None)))
    assert tunery(action, "job_1", "job_2").stdout == "job_1: queued\njob_2: queued\n"
    assert json.loads(tunery("-o", "json", action, "job_1").stdout)["id"] == "job_1"
    wrong = tunery(action, "job_3")
    assert wrong.exit_code == 2 and "error:" in wrong.stderr


def test_logs(peer: Peer, tunery):
    peer.on(
        "GET",
        "/jobs/job_1/events",
        says({"data": [an_event(1)], "has_more": False, "next": 1}),
        stream(("event", 2, an_event(2, "job.published")), ("job", None, a_job(status="succeeded"))),
    )
    assert "job.claimed" in tunery("logs", "job_1").stdout
    assert "job.published" in tunery("logs", "job_1", "--follow").stdout


def test_what_a_job_left(peer: Peer, tunery):
    measured = [
        a_metric(1, 10, loss=1.5, epoch=0.5),
        a_metric(2, 20, loss=1.25),
        a_metric(3, 20, "eval", eval_loss=1.3),
    ]
    peer.on("GET", "/jobs/job_1/metrics", says({"data": measured, "has_more": False, "next": 3}))
    kept = {"step": 20, "attempt": 2, "bytes": 1500, "manifest_sha256": "a" * 64, "created_at": "2026-11-01T10:00:00Z"}
    peer.on("GET", "/jobs/job_1/checkpoints", says({"data": [kept]}))
    module = {"name": "lm_head", "class": "Linear", "dtype": "bfloat16", "bits": 16, "parameters": 8, "trained": 0}
    sums = {"compute_dtype": "bfloat16", "adapter_dtype": "bfloat16", "parameters": {}, "bytes": {}}
    peer.on("GET", "/jobs/job_1/precision", says(sums | {"modules": [module | {"status": "not_quantizable"}]}))
    peer.on("DELETE", "/jobs/job_1", raw(b"", 204))
    lines = [line.split() for line in tunery("metrics", "job_1").stdout.splitlines()]
    assert lines == [["STEP", "LOSS", "EPOCH"], ["10", "1.5", "0.5"], ["20", "1.25"]]
    train = json.loads(tunery("metrics", "job_1", "-o", "json").stdout)
    assert train == {"step": [10, 20], "loss": [1.5, 1.25], "epoch": [0.5, None]}
    assert "1.3" in tunery("metrics", "job_1", "--kind", "eval").stdout
    assert tunery("metrics", "job_1", "--kind", "some").exit_code == 2
    assert tunery("metrics", "job_1").stderr == ""
    assert tunery("checkpoints", "job_1").stdout.splitlines()[1].split()[:4] == ["20", "2", "1.5", "kB"]
    assert json.loads(tunery("checkpoints", "job_1", "-o", "json").stdout)["data"][0]["step"] == 20
    assert tunery("precision", "job_1").stdout.splitlines()[1].split() == [
        *("lm_head", "Linear", "bfloat16"),
        *("16", "not_quantizable"),
    ]
    assert tunery("rm", "job_1").stdout == "removed: job_1\n"
    assert len(peer.asked("DELETE", "/jobs/job_1")) == 1


def test_download(peer: Peer, tunery, tmp_path: Path):
    content = b"weights" * 1000
    link = {"name": "adapter/w.safetensors", "bytes": len(content), "url": f"{peer.url}/file"}
    peer.on("GET", "/jobs/job_1/artifacts", says({"data": [link | {"sha256": hashlib.sha256(content).hexdigest()}]}))
    peer.on("GET", "/file", file(content))
    done = tunery("download", "job_1", "out")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == ["1 files, 7.0 kB, every hash verified", "adapter: out/adapter"]
    assert (tmp_path / "out" / "adapter" / "w.safetensors").read_bytes() == content
    assert json.loads(tunery("download", "job_1", "-o", "json").stdout)["folder"] == "job_1"
