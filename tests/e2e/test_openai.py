"""The stock `openai` packages for Python and Node drive real jobs to success, failure and cancellation."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from tests.e2e.conftest import Service
from tests.worker.trainer.tiny import chat_rows

LIFE = Path(__file__).parent / "node" / "life.mjs"
QUICK = {"max_length": 64, "learning_rate": 1e-2, "logging_steps": 1}
ENDED = ("succeeded", "failed", "cancelled")
pytestmark = pytest.mark.parametrize("service", ["embedded"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to train on, to validate on, and one that cannot be trained on."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps(row) + "\n" for row in chat_rows(24)]
    (folder / "train.jsonl").write_text("".join(lines[:16]))
    (folder / "valid.jsonl").write_text("".join(lines[16:]))
    (folder / "broken.jsonl").write_text("".join(lines[:2]) + '{"messages": [\n')
    return folder


@pytest.fixture
def sdk(service: Service) -> Iterator[OpenAI]:
    """The stock client, pointed at the service by its `base_url` and nothing else."""
    address = service.client.address
    with OpenAI(base_url=f"{address.url}/v1", api_key=address.api_key) as client:
        yield client


def upload(sdk: OpenAI, path: Path) -> str:
    return sdk.files.create(file=path, purpose="fine-tune").id


def until(sdk: OpenAI, job_id: str, wanted: tuple[str, ...]) -> FineTuningJob:
    deadline = time.monotonic() + 120
    while (job := sdk.fine_tuning.jobs.retrieve(job_id)).status not in wanted:
        assert time.monotonic() < deadline, job
        time.sleep(0.3)
    return job


def check_success(seen: dict[str, Any], suffix: str) -> None:
    """Check what either client saw of a job of two epochs of two steps, with validation after each."""
    job = FineTuningJob.model_validate(seen["succeeded"], strict=True)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:tiny:default:{suffix}:{job.id}" and job.fine_tuned_model in seen["models"]
    assert (job.seed, job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (11, 2, 8)
    assert job.trained_tokens and job.finished_at and job.finished_at >= job.created_at and job.error is None
    events = [FineTuningJobEvent.model_validate(event, strict=True) for event in seen["events"]]
    assert events[-1].message.startswith("The job was accepted") and events[0].message == "The result is published."
    trained = [event for event in events if event.type == "metrics" and "train_loss" in event.data]
    assert [event.data["step"] for event in trained] == [4, 3, 2, 1]
    checkpoints = [FineTuningJobCheckpoint.model_validate(item, strict=True) for item in seen["checkpoints"]]
    assert [item.step_number for item in checkpoints] == [4, 2], "one for each epoch, the last one final"
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    table = list(csv.DictReader(io.StringIO(seen["result"])))
    assert next(iter(table[0])) == "step" and [row["step"] for row in table] == ["1", "2", "3", "4"]
    for item in checkpoints:
        row = table[item.step_number - 1]
        assert item.metrics.train_loss == pytest.approx(float(row["train_loss"])), "the file and the API say the same"
        assert item.metrics.full_valid_loss == pytest.approx(float(row["valid_loss"]))


def test_python_drives_a_job_to_success(service: Service, sdk: OpenAI, data: Path) -> None:
    train, valid = upload(sdk, data / "train.jsonl"), upload(sdk, data / "valid.jsonl")
    asked: dict[str, Any] = {
        "model": "tiny", "training_file": train, "validation_file": valid, "suffix": "python-bot", "seed": 11,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
        "extra_body": {"hyperparameters": QUICK, "lora": {"r": 4}},
    }  # fmt: skip
    job = sdk.fine_tuning.jobs.create(**asked)
    assert sdk.fine_tuning.jobs.create(**asked).id == job.id, "the same create again makes no second job"
    done = until(sdk, job.id, ENDED)
    jobs = sdk.fine_tuning.jobs
    seen = {
        "succeeded": done.to_dict(),
        "events": [event.to_dict() for event in jobs.list_events(job.id, limit=3)],
        "checkpoints": [item.to_dict() for item in jobs.checkpoints.list(job.id, limit=1)],
        "models": [model.id for model in sdk.models.list()],
        "result": sdk.files.content(done.result_files[0]).text,
    }
    check_success(seen, "python-bot")
    assert sdk.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"
    lora = service.client.jobs.get(job.id).lora
    assert lora is not None and lora.r == 4


def test_python_sees_a_job_fail_on_its_data(service: Service, sdk: OpenAI, data: Path) -> None:
    broken = upload(sdk, data / "broken.jsonl")
    job = until(sdk, sdk.fine_tuning.jobs.create(model="tiny", training_file=broken).id, ENDED)
    check_failure(job)


def check_failure(job: FineTuningJob) -> None:
    assert job.status == "failed" and job.fine_tuned_model is None and job.error is not None
    assert job.error.param == "training_file" and "row 3" in job.error.message and job.result_files == []


def test_python_cancels_pauses_and_resumes(service: Service, sdk: OpenAI, data: Path) -> None:
    jobs, train = sdk.fine_tuning.jobs, upload(sdk, data / "train.jsonl")
    long = {"hyperparameters": QUICK | {"max_steps": 5000, "per_device_train_batch_size": 2}}
    job = jobs.create(model="tiny", training_file=train, extra_body=long)
    until(sdk, job.id, ("running",))
    jobs.pause(job.id)
    until(sdk, job.id, ("queued",))
    with pytest.raises(openai.BadRequestError):
        sdk.files.delete(train)
    jobs.resume(job.id)
    until(sdk, job.id, ("running",))
    jobs.cancel(job.id)
    ended = until(sdk, job.id, ENDED)
    assert ended.status == "cancelled" and ended.finished_at and ended.error is None
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        jobs.resume(job.id)


def test_node_drives_jobs_to_success_failure_and_cancellation(service: Service, node_modules: Path, data: Path) -> None:
    shutil.copy(LIFE, node_modules.parent)
    address = service.client.address
    environment = {
        "PATH": os.environ["PATH"],
        "OPENAI_BASE_URL": f"{address.url}/v1",
        "OPENAI_API_KEY": address.api_key,
    }
    done = subprocess.run(
        ["node", "life.mjs", str(data)],
        cwd=node_modules.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    check_success(seen, "node-bot")
    assert seen["repeated"]["id"] == seen["created"]["id"] and seen["created"]["status"] == "validating_files"
    assert [job["id"] for job in seen["mine"]] == [seen["created"]["id"]]
    assert seen["model"]["id"] == seen["succeeded"]["fine_tuned_model"]
    check_failure(FineTuningJob.model_validate(seen["failed"], strict=True))
    assert seen["cancelled"]["status"] == "cancelled" and seen["cancelled"]["finished_at"]
    kinds = {name: found["kind"] for name, found in seen["refusals"].items()}
    assert kinds == {
        "ended": "BadRequestError", "absent": "NotFoundError", "dpo": "BadRequestError",
        "stranger": "AuthenticationError", "base": "PermissionDeniedError",
    }  # fmt: skip
    assert seen["refusals"]["dpo"]["param"] == "method" and "preference" in seen["refusals"]["dpo"]["message"]
    assert seen["deleted"] == {"id": seen["model"]["id"], "object": "model", "deleted": True}
