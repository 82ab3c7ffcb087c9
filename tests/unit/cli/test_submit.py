"""`submit` and `reorder`: the body that is sent, and the mistakes that are found before anything is."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.unit.client.conftest import a_job
from tests.unit.client.peer import Peer, says
from tests.unit.client.test_resources import DATASET


def test_submit_asks_for_merged_models(peer: Peer, tunery):
    peer.on("POST", "/jobs", says(a_job(), 201))
    asked = ("--export", "adapter", "--export", "merged")
    assert tunery("submit", "s3://b/x.jsonl", "-m", "org/base", *asked).exit_code == 0
    assert json.loads(peer.asked("POST", "/jobs")[0].body)["export"] == ["adapter", "merged"]


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


def test_a_clone_with_changes(peer: Peer, tunery):
    peer.on("POST", "/jobs/job_1/clone", says(a_job(id="job_2"), 201))
    done = tunery("submit", "--clone", "job_1", "--set", "lora.r=8", "--suffix", "b", "--metadata", "team=red", "-q")
    assert done.stdout == "job_2\n"
    [seen] = peer.requests
    assert json.loads(seen.body) == {"suffix": "b", "lora": {"r": 8}, "metadata": {"team": "red"}}
    assert seen.headers["idempotency-key"]
    assert tunery("submit", "-m", "base").exit_code == 2 and tunery("submit", "hf://x/y").exit_code == 2


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
