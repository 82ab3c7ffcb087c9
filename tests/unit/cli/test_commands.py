"""Each command against a server: what it asks, what it prints, and its exit code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.unit.client.conftest import a_job, a_metric, an_event
from tests.unit.client.peer import Peer, file, problem, raw, says, stream
from tests.unit.client.test_resources import DATASET, WORKER
from tests.unit.client.test_resources import KEY as KEY_READ


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


def test_show(peer: Peer, tunery):
    failed = a_job(status="failed", error={"code": "diverged", "message": "the loss is NaN", "hint": "lower it"})
    peer.on("GET", "/jobs/job_1", says(failed))
    out = tunery("show", "job_1").stdout
    for words in ("job_1", "failed", "the loss is NaN", "lower it", "learning_rate=0.0001", "team=red"):
        assert words in out


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


def test_submit_asks_for_merged_models(peer: Peer, tunery):
    peer.on("POST", "/jobs", says(a_job(), 201))
    asked = ("--export", "adapter", "--export", "merged")
    assert tunery("submit", "s3://b/x.jsonl", "-m", "org/base", *asked).exit_code == 0
    assert json.loads(peer.asked("POST", "/jobs")[0].body)["export"] == ["adapter", "merged"]


def test_export(peer: Peer, tunery):
    made = a_job(id="job_2", source_job="job_1", status="queued", stage=None, export=["merged", "merged_4bit"])
    peer.on("POST", "/jobs/job_1/export", says(made, 201))
    done = tunery("export", "job_1", "--as", "merged", "--as", "merged_4bit", "--priority", "5")
    assert done.exit_code == 0 and "job_2: merging job_1 as merged, merged_4bit" in done.stdout
    assert "tunery watch job_2" in done.stdout
    asked = json.loads(peer.asked("POST", "/jobs/job_1/export")[0].body)
    assert asked == {"export": ["merged", "merged_4bit"], "priority": 5}


def test_export_of_what_is_there_already(peer: Peer, tunery):
    peer.on("POST", "/jobs/job_1/export", says(a_job(id="job_2", source_job="job_1", status="succeeded"), 200))
    done = tunery("export", "job_1")
    assert done.exit_code == 0 and "made already, by job_2: `tunery download job_1` fetches it" in done.stdout
    assert json.loads(peer.asked("POST", "/jobs/job_1/export")[0].body)["export"] == ["merged"]


def test_export_that_is_watched(peer: Peer, tunery):
    ended = a_job(id="job_2", source_job="job_1", status="succeeded", stage=None)
    peer.on("POST", "/jobs/job_1/export", says(a_job(id="job_2", source_job="job_1", status="queued", stage=None), 201))
    peer.on("GET", "/jobs/job_2", says(ended))
    peer.on("GET", "/jobs/job_2/events", stream(("job", None, ended)))
    done = tunery("export", "job_1", "--watch")
    assert done.exit_code == 0 and "succeeded: `tunery download job_1` fetches what it made" in done.stdout


def test_submit_uploads_a_local_file(peer: Peer, tunery, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    peer.on("POST", "/datasets", says(DATASET, 201))
    peer.on("POST", "/jobs", says(a_job(), 201))
    done = tunery(
        "submit",
        "train.jsonl",
        "-m",
        "org/base",
        "--set",
        "learning_rate=1e-4",
        "--set",
        "r=8",
        "--suffix",
        "bot",
        "--metadata",
        "team=red",
        "--seed",
        "0",
        "--validation",
        "s3://b/v.jsonl",
    )
    assert done.exit_code == 0, done.output
    assert "submitted: job_1" in done.stdout and "tunery watch job_1" in done.stdout
    assert json.loads(peer.asked("POST", "/jobs")[0].body) == {
        "model": "org/base",
        "dataset": "dataset:ds_1",
        "suffix": "bot",
        "seed": 0,
        "metadata": {"team": "red"},
        "hyperparameters": {"learning_rate": 1e-4},
        "lora": {"r": 8},
        "validation_dataset": "s3://b/v.jsonl",
    }


def test_submit_leaves_a_uri_alone(peer: Peer, tunery):
    peer.on("POST", "/jobs", says(a_job(), 201))
    done = tunery("submit", "hf://org/data", "-m", "base", "-o", "json")
    assert json.loads(done.stdout)["id"] == "job_1"
    assert json.loads(peer.requests[0].body) == {"model": "base", "dataset": "hf://org/data"}


@pytest.mark.parametrize(
    ("words", "sent"), [(["a b", "c"], ["a b", "c"]), (["validation"], "validation"), (["validation", "c"],) * 2]
)
def test_submit_sends_prompts(peer: Peer, tunery, words, sent):
    peer.on("POST", "/jobs", says(a_job(), 201))
    flags = [flag for word in words for flag in ("--sample", word)]
    done = tunery("submit", "hf://org/data", "-m", "base", "--validation-split", "0.1", *flags)
    assert done.exit_code == 0, done.output
    body = json.loads(peer.requests[0].body)
    assert body["sample_prompts"] == sent and body["validation_split"] == 0.1


def test_submit_sends_the_template_in_a_file(peer: Peer, tunery, tmp_path: Path):
    (tmp_path / "chat.jinja").write_text("{{ messages }} ü\n", encoding="utf-8")
    peer.on("POST", "/jobs", says(a_job(), 201))
    done = tunery("submit", "hf://org/data", "-m", "base", "--chat-template", str(tmp_path / "chat.jinja"))
    assert done.exit_code == 0, done.output
    assert json.loads(peer.requests[0].body)["chat_template"] == "{{ messages }} ü\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.jsonl", "-m", "base"), ["absent.jsonl does not exist", "dataset"]),
        (("hf://x/y", "-m", "base", "--validation", "absent.csv"), ["absent.csv does not exist", "--validation"]),
        (("hf://x/y", "-m", "base", "--set", "learning_rat=1"), ["--set learning_rat=1", "learning_rate"]),
        (("hf://x/y", "-m", "base", "--set", "r=big"), ["--set r=big", "lora.r"]),
        (("hf://x/y",), ["--model"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(peer: Peer, tunery, arguments, words):
    done = tunery("submit", *arguments)
    assert done.exit_code == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.output and done.stdout == ""
    assert peer.requests == []


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


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 3)])
def test_the_exit_code_of_watch_is_the_jobs_result(peer: Peer, tunery, status, code):
    error = {"code": "diverged", "message": "the loss is NaN", "hint": "lower it"} if status == "failed" else None
    peer.on("GET", "/jobs/job_1", says(a_job()))
    peer.on(
        "GET",
        "/jobs/job_1/events",
        stream(
            ("job", None, a_job()),
            ("event", 1, an_event(1)),
            ("metric", 2, a_metric(2, 4, loss=1.25)),
            ("job", None, a_job(status=status, error=error)),
        ),
    )
    done = tunery("watch", "job_1")
    assert done.exit_code == code
    assert "train step 4/10  loss 1.25" in done.stdout
    assert ("the loss is NaN" in done.stderr and "hint: lower it" in done.stderr) == (status == "failed")
    assert ("tunery download job_1" in done.stdout) == (status == "succeeded")


def test_each_bad_row_has_its_line(peer: Peer, tunery):
    error = {
        "code": "bad_rows",
        "message": "dataset: row 1: is\x1b empty\ndataset: row 3: is empty",
        "hint": "fill it in",
    }
    peer.on("GET", "/jobs/job_1", says(a_job()))
    peer.on("GET", "/jobs/job_1/events", stream(("job", None, a_job(status="failed", error=error))))
    lines = tunery("watch", "job_1").stderr.splitlines()
    assert lines[:3] == ["error: dataset: row 1: is  empty", "dataset: row 3: is empty", "hint: fill it in"]


def test_submit_and_watch_as_json(peer: Peer, tunery):
    peer.on("POST", "/jobs", says(a_job(), 201))
    peer.on("GET", "/jobs/job_1", says(a_job()))
    peer.on("GET", "/jobs/job_1/events", stream(("event", 1, an_event(1)), ("job", None, a_job(status="succeeded"))))
    done = tunery("submit", "hf://x/y", "-m", "base", "--watch", "-o", "json")
    assert done.exit_code == 0
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == ["event", "job"]


def test_ctrl_c_detaches(peer: Peer, tunery, monkeypatch):
    from common.client import jobs

    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(jobs.Jobs, "watch", interrupted)
    peer.on("GET", "/jobs/job_1", says(a_job()))
    done = tunery("watch", "job_1")
    assert done.exit_code == 130
    told = ["detached: job_1 goes on", "come back: tunery watch job_1", "stop it:   tunery cancel job_1"]
    assert done.stderr.splitlines() == told
    assert [seen.method for seen in peer.requests] == ["GET"]


def test_logs(peer: Peer, tunery):
    peer.on(
        "GET",
        "/jobs/job_1/events",
        says({"data": [an_event(1)], "has_more": False, "next": 1}),
        stream(("event", 2, an_event(2, "job.published")), ("job", None, a_job(status="succeeded"))),
    )
    assert "job.claimed" in tunery("logs", "job_1").stdout
    assert "job.published" in tunery("logs", "job_1", "--follow").stdout


@pytest.mark.parametrize("action", ["cancel", "pause", "resume", "retry"])
def test_wishes(peer: Peer, tunery, action):
    for job in ("job_1", "job_2"):
        peer.on("POST", f"/jobs/{job}/{action}", says(a_job(id=job, status="queued", stage=None)))
    assert tunery(action, "job_1", "job_2").stdout == "job_1: queued\njob_2: queued\n"
    assert json.loads(tunery("-o", "json", action, "job_1").stdout)["id"] == "job_1"
    wrong = tunery(action, "job_3")
    assert wrong.exit_code == 2 and "error:" in wrong.stderr


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


def test_datasets(peer: Peer, tunery, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    peer.on("POST", "/datasets", says(DATASET, 201))
    peer.on("GET", "/datasets", says({"data": [DATASET], "has_more": False, "next": None}))
    peer.on("DELETE", "/datasets/ds_1", raw(b"", 204))
    assert "dataset:ds_1" in tunery("datasets", "upload", "a.jsonl").stdout
    assert "dataset:ds_1" in tunery("datasets", "list").stdout
    assert tunery("datasets", "rm", "dataset:ds_1").stdout == "removed: dataset:ds_1\n"
    assert json.loads(tunery("datasets", "list", "-o", "json").stdout)["data"][0]["name"] == "a.jsonl"


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
    assert tunery("checkpoints", "job_1").stdout.splitlines()[1].split()[:4] == ["20", "2", "1.5", "kB"]
    assert json.loads(tunery("checkpoints", "job_1", "-o", "json").stdout)["data"][0]["step"] == 20
    assert tunery("precision", "job_1").stdout.splitlines()[1].split() == [
        *("lm_head", "Linear", "bfloat16"),
        *("16", "not_quantizable"),
    ]
    assert tunery("rm", "job_1").stdout == "removed: job_1\n"
    assert len(peer.asked("DELETE", "/jobs/job_1")) == 1


def test_models_and_workers(peer: Peer, tunery):
    peer.on("GET", "/base-models", says({"data": [{"id": "SmolLM2", "source": "folder", "bytes": 5}]}))
    peer.on("GET", "/workers", says({"data": [WORKER]}))
    peer.on("POST", "/workers/w_1/drain", says(WORKER | {"state": "draining"}))
    assert "SmolLM2" in tunery("models").stdout
    assert "H200" in tunery("workers").stdout
    assert json.loads(tunery("workers", "-o", "json").stdout) == json.loads(
        tunery("-o", "json", "workers", "list").stdout
    )
    assert tunery("workers", "drain", "w_1").stdout == "w_1: draining\n"


def test_keys(peer: Peer, tunery):
    peer.on("POST", "/keys", says(KEY_READ | {"key": "tnr_new"}, 201))
    peer.on("GET", "/keys", says({"data": [KEY_READ]}))
    peer.on("DELETE", "/keys/key_1", raw(b"", 204))
    made = tunery("keys", "create", "ci")
    assert "tnr_new" in made.stdout and "not shown again" in made.stderr
    assert json.loads(peer.requests[0].body) == {"name": "ci"}
    assert "never" in tunery("keys", "list").stdout
    assert tunery("keys", "revoke", "key_1").stdout == "revoked: key_1\n"


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


def test_a_job_that_waits_shows_why(peer: Peer, tunery):
    waits_for = {"code": "workers_busy", "message": "2 of 2 workers are busy", "until": None}
    place = {"position": 3, "waits_for": waits_for, "expected_start": "2026-11-01T12:00:00Z"}
    peer.on("GET", "/jobs/job_1", says(a_job(status="queued", stage=None, **place)))
    out = tunery("show", "job_1").stdout
    assert "queued, position 3: 2 of 2 workers are busy" in out and "expected start" in out


def test_submit_for_later_and_reorder(peer: Peer, tunery):
    peer.on("POST", "/jobs", says(a_job(), 201))
    peer.on("PATCH", "/jobs/job_1", says(a_job(status="queued", priority=5)))
    done = tunery("submit", "s3://b/x.jsonl", "-m", "org/base", "--not-before", "2026-12-24T02:00Z")
    assert done.exit_code == 0, done.output
    sent = json.loads(peer.asked("POST", "/jobs")[0].body)["not_before"]
    assert datetime.fromisoformat(sent) == datetime(2026, 12, 24, 2, tzinfo=UTC)
    assert tunery("reorder", "job_1", "--priority", "5", "--not-before", "now").exit_code == 0
    assert json.loads(peer.asked("PATCH", "/jobs/job_1")[0].body) == {"priority": 5, "not_before": None}
    assert tunery("reorder", "job_1", "--not-before", "soon").exit_code == 2


def test_quota(peer: Peer, tunery):
    quota = {"tenant": "acme", "max_running": 2, "max_queued": None, "max_gpu_hours": 100.0, "max_priority": None}
    peer.on("GET", "/quota", says(quota | {"running": 1, "queued": 4, "gpu_hours": 12.5}))
    out = tunery("quota", "--tenant", "acme").stdout
    assert "1 of 2" in out and "4 of any number" in out and "12.5 of 100" in out
    assert peer.requests[0].query == {"tenant": ["acme"]}


WEBHOOK = {
    "id": "wh_1",
    "url": "https://example.com/hook",
    "description": "",
    "events": ["job.failed"],
    "enabled": True,
    "disabled_reason": None,
    "created_at": "2026-11-01T10:00:00Z",
    "last_success_at": None,
}
DELIVERY = {
    "id": "msg_1",
    "type": "job.failed",
    "job": "job_1",
    "state": "pending",
    "attempts": 2,
    "response_status": 500,
    "error": "the receiver answered 500",
    "created_at": "2026-11-01T10:00:00Z",
    "next_attempt_at": "2026-11-01T10:05:00Z",
    "ended_at": None,
    "payload": {"type": "job.failed"},
}


def test_webhooks(peer: Peer, tunery):
    peer.on("POST", "/webhooks", says(WEBHOOK | {"secret": "whsec_new"}, 201))
    peer.on("GET", "/webhooks", says({"data": [WEBHOOK]}))
    peer.on("PATCH", "/webhooks/wh_1", says(WEBHOOK | {"enabled": False, "disabled_reason": "switched off"}))
    peer.on("POST", "/webhooks/wh_1/rotate", says(WEBHOOK | {"secret": "whsec_next"}))
    peer.on("DELETE", "/webhooks/wh_1", raw(b"", 204))
    made = tunery("webhooks", "create", "https://example.com/hook", "-e", "job.failed")
    assert "whsec_new" in made.stdout and "not shown again" in made.stderr
    sent = {"url": "https://example.com/hook", "events": ["job.failed"], "description": ""}
    assert json.loads(peer.requests[0].body) == sent
    assert "job.failed" in tunery("webhooks", "list").stdout
    off = tunery("webhooks", "change", "wh_1", "--disable", "--all-events")
    assert off.stdout == "wh_1: disabled: switched off\n"
    assert json.loads(peer.asked("PATCH", "/webhooks/wh_1")[0].body) == {"enabled": False, "events": None}
    assert "whsec_next" in tunery("webhooks", "rotate", "wh_1", "--leaked").stdout
    assert peer.asked("POST", "/webhooks/wh_1/rotate")[0].query == {"overlap_s": ["0"]}
    assert tunery("webhooks", "rm", "wh_1").stdout == "removed: wh_1\n"


def test_deliveries_of_webhooks(peer: Peer, tunery):
    peer.on("POST", "/webhooks/wh_1/ping", says(DELIVERY, 202))
    peer.on("GET", "/webhooks/wh_1/deliveries", says({"data": [DELIVERY], "has_more": True, "next": "msg_1"}))
    peer.on("POST", "/webhooks/wh_1/deliveries/msg_1/redeliver", says(DELIVERY, 202))
    assert tunery("webhooks", "ping", "wh_1").stdout == "msg_1: pending\n"
    listed = tunery("webhooks", "deliveries", "wh_1", "--state", "pending", "-n", "1")
    assert "the receiver answered 500" in listed.stdout and "--after msg_1" in listed.stderr
    assert peer.asked("GET", "/webhooks/wh_1/deliveries")[0].query == {"state": ["pending"], "limit": ["1"]}
    again = json.loads(tunery("webhooks", "redeliver", "wh_1", "msg_1", "-o", "json").stdout)
    assert again["payload"] == {"type": "job.failed"}


def test_a_clone_with_changes(peer: Peer, tunery):
    peer.on("POST", "/jobs/job_1/clone", says(a_job(id="job_2"), 201))
    done = tunery("submit", "--clone", "job_1", "--set", "lora.r=8", "--suffix", "b", "--metadata", "team=red", "-q")
    assert done.stdout == "job_2\n"
    [seen] = peer.requests
    assert json.loads(seen.body) == {"suffix": "b", "lora": {"r": 8}, "metadata": {"team": "red"}}
    assert seen.headers["idempotency-key"]
    assert tunery("submit", "-m", "base").exit_code == 2 and tunery("submit", "hf://x/y").exit_code == 2


def test_many_jobs_are_cancelled(peer: Peer, tunery):
    gone = {"id": "job_1", "result": "cancelled", "status": "cancelled"}
    runs = {"id": "job_2", "result": "cancelling", "status": "running"}
    first = {"data": [gone], "dry_run": False, "has_more": True, "next": "job_1"}
    peer.on("POST", "/jobs/cancel", says(first), says(first | {"data": [runs], "has_more": False, "next": None}))
    done = tunery("cancel", "--status", "queued", "--status", "running", "--metadata", "a=b", "--created-after", "-2h")
    assert done.stdout.splitlines() == ["job_1: cancelled", "job_2: cancelling"]
    assert done.stderr == "1 cancelled, 1 cancelling\n"
    bodies = [json.loads(seen.body) for seen in peer.requests]
    since = datetime.fromisoformat(bodies[0]["filter"].pop("created_after"))
    assert abs((datetime.now(UTC) - since).total_seconds() - 7200) < 60
    assert bodies[0] == {"dry_run": False, "filter": {"status": ["queued", "running"], "metadata": {"a": "b"}}}
    assert bodies[1]["after"] == "job_1"
    for neither_nor in ((), ("job_1", "--status", "queued")):
        assert tunery("cancel", *neither_nor).exit_code == 2
    assert len(peer.requests) == 2


def test_a_dry_run_says_what_would_be(peer: Peer, tunery):
    outcomes = [("cancelled", "queued"), ("cancelling", "running"), ("ended", "failed"), ("not_found", None)]
    data = [{"id": f"job_{n}", "result": result, "status": status} for n, (result, status) in enumerate(outcomes)]
    peer.on("POST", "/jobs/cancel", says({"data": data, "dry_run": True, "has_more": False, "next": None}))
    done = tunery("cancel", "job_0", "job_1", "job_2", "job_3", "--dry-run")
    assert "job_0: would be cancelled" in done.stdout and "job_1: would be cancelling" in done.stdout
    assert "job_2: has ended" in done.stdout and "nothing was done" in done.stderr
    assert json.loads(peer.requests[0].body) == {"dry_run": True, "ids": ["job_0", "job_1", "job_2", "job_3"]}


def test_a_list_of_certain_jobs(peer: Peer, tunery):
    peer.on("GET", "/jobs", says({"data": [], "has_more": False, "next": None}))
    done = tunery("ls", "--model", "org/base", "--created-before", "2026-11-01T00:00Z", "--metadata", "a=b")
    assert "no such jobs" in done.stderr
    asked = peer.requests[0].query
    assert (asked["model"], asked["metadata[a]"]) == (["org/base"], ["b"])
    assert datetime.fromisoformat(asked["created_before"][0]) == datetime(2026, 11, 1, tzinfo=UTC)
