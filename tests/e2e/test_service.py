"""What a user does, from a file to an adapter that stock peft loads, and what goes wrong on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.client import Job, Tunery
from common.errors import InvalidInput, NotFound
from tests.e2e.conftest import Service
from tests.processes import wait_until
from tests.worker.trainer.tiny import chat_rows

# What does not depend on the servers under it is tried over one stack only.
EMBEDDED = pytest.mark.parametrize("service", ["embedded"], indirect=True, scope="module")
ON_ADDRESSES = pytest.mark.parametrize("service", ["addresses"], indirect=True, scope="module")

HYPERPARAMETERS = {
    "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_length": 64,
    "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2,
}  # fmt: skip

LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ids = tokenizer("the quick brown fox", return_tensors="pt")
before = model(**ids).logits
after = PeftModel.from_pretrained(model, adapter)(**ids).logits
print(json.dumps({"moved": (before - after).abs().max().item(), "finite": bool(after.isfinite().all())}))
"""

LOAD_MERGED = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, out = sys.argv[1:]
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = AutoTokenizer.from_pretrained(out + "/merged")("the quick brown fox", return_tensors="pt")
before, merged = model(base)(**ids).logits, model(out + "/merged")(**ids).logits
adapter = PeftModel.from_pretrained(model(base), out + "/adapter")(**ids).logits
print(json.dumps([(merged - adapter).abs().max().item(), (adapter - before).abs().max().item()]))
"""


def upload(client: Tunery, folder: Path, content: str | bytes, name: str = "train.jsonl") -> str:
    """Upload `content` as a file called `name` and return its URI."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return client.datasets.upload(path).uri


def rows(count: int = 40) -> str:
    """Return chat rows as JSONL."""
    return "".join(json.dumps(row) + "\n" for row in chat_rows(count))


def test_from_a_file_to_an_adapter_that_stock_peft_loads(service: Service, models: Path, tmp_path: Path):
    client = service.client
    uri = upload(client, tmp_path, rows())
    job = client.jobs.create(
        model="tiny", dataset=uri, suffix="mine", hyperparameters=HYPERPARAMETERS, metadata={"a": "b"}
    )
    assert job.status == "validating"
    seen = [type(item).__name__ for item in job.watch()]
    assert {"Event", "Metric", "Job"} <= set(seen)
    done = job.wait(timeout_s=120)
    assert (done.status, done.step, done.base_revision) == ("succeeded", 6, "c0ffee"), done.error
    assert [metric.step for metric in client.jobs.metrics(job.id) if metric.kind == "train"] == [1, 2, 3, 4, 5, 6]
    names = [artifact.name for artifact in client.jobs.artifacts(job.id)]
    assert {"manifest.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(names)

    folder = tmp_path / "out"
    job.download(folder)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("example/tiny", "c0ffee")
    assert str(models) not in "".join(path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file())
    answer = subprocess.run([sys.executable, "-c", LOAD, str(models / "tiny"), str(folder / "adapter")],
                            capture_output=True, text=True, check=True)  # fmt: skip
    loaded = json.loads(answer.stdout.splitlines()[-1])
    assert loaded["finite"] and loaded["moved"] > 1e-3

    client.jobs.delete(job.id)
    with pytest.raises(NotFound):
        client.jobs.get(job.id)


@ON_ADDRESSES
def test_a_merged_model_later_is_the_one_that_is_made_at_once(service: Service, models: Path, tmp_path: Path):
    client = service.client
    dataset = upload(client, tmp_path, rows())
    asked = {"model": "tiny", "dataset": dataset, "hyperparameters": HYPERPARAMETERS | {"loss": "all"}}
    forms = ["merged", "merged_dequantized"]
    at_once = client.jobs.create(**asked, export=["adapter", *forms])
    source = client.jobs.create(**asked)
    assert source.wait(timeout_s=120).status == at_once.wait(timeout_s=120).status == "succeeded"
    before = {item.name: item.sha256 for item in source.artifacts()}
    export = source.export_as(forms)
    assert source.export_as(forms).id == export.id
    ended = export.wait(timeout_s=120)
    assert (ended.status, ended.attempt) == ("succeeded", 1), ended.error
    after = {item.name: item.sha256 for item in source.artifacts()}
    assert before.items() <= after.items(), "what was published stays as it was"
    merged = {item.name: item.sha256 for item in at_once.artifacts() if item.name.startswith("merged")}
    assert {name: after[name] for name in after.keys() - before.keys()} == merged
    assert {"merged/model.safetensors", "merged_dequantized/model.safetensors"} <= merged.keys()
    source.download(tmp_path / "out")
    answer = subprocess.run([sys.executable, "-c", LOAD_MERGED, *map(str, (models / "tiny", tmp_path / "out"))],
                            capture_output=True, text=True, check=True)  # fmt: skip
    apart, moved = json.loads(answer.stdout.splitlines()[-1])
    assert moved > 1e-2 and apart < moved / 10


BAD_DATA = {
    "broken JSON in row 7": (rows(6) + '{"messages": [\n' + rows(3), "row 7"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff\xfe"}\n', "row 2"),
    "wrong columns": ('{"question": "a", "reply": "b"}\n', "question"),
    "an unknown role": ('{"messages": [{"role": "robot", "content": "hi"}]}\n', "robot"),
    "no text at all": ("\n\n", "no rows"),
}


@EMBEDDED
@pytest.mark.parametrize(("content", "named"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_fails_with_the_row(service: Service, tmp_path: Path, content: str | bytes, named: str):
    job = service.client.jobs.create(model="tiny", dataset=upload(service.client, tmp_path, content))
    ended = job.wait(timeout_s=60)
    assert ended.status == "failed" and ended.attempt == 0
    assert named in ended.error.message and ended.error.param == "dataset" and ended.error.hint


BAD_REQUESTS = {
    "unknown key": ({"hyperparameters": {"learning_rat": 1}}, "hyperparameters.learning_rat"),
    "missing dataset": ({"dataset": "dataset:ds_00000000000000000000000000"}, "dataset"),
    "private address": ({"dataset": "https://169.254.169.254/latest"}, "dataset"),
    "absent base": ({"model": "absent"}, "model"),
    "unknown scheme": ({"dataset": "ftp://host/x"}, "dataset"),
}


@EMBEDDED
@pytest.mark.parametrize(("change", "param"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests_name_the_field(service: Service, tmp_path: Path, change: dict, param: str):
    body = {"model": "tiny", "dataset": upload(service.client, tmp_path, rows(4))} | change
    before = len(service.client.jobs.list(limit=100).data)
    with pytest.raises(InvalidInput) as refusal:
        service.client.jobs.create(**body)
    assert refusal.value.param == param and refusal.value.message
    assert len(service.client.jobs.list(limit=100).data) == before


def test_an_empty_file_is_refused_at_once(service: Service, tmp_path: Path):
    with pytest.raises(InvalidInput, match="empty"):
        upload(service.client, tmp_path, b"")


@EMBEDDED
@pytest.mark.parametrize(("model", "word"), [("pickled", "safetensors"), ("remote-code", "code")])
def test_a_base_that_would_run_code_is_refused(service: Service, tmp_path: Path, model: str, word: str):
    dataset = upload(service.client, tmp_path, rows(4))
    try:
        ended = service.client.jobs.create(model=model, dataset=dataset).wait(timeout_s=60)
    except InvalidInput as refusal:
        assert word in refusal.message and refusal.param == "model"
    else:
        assert ended.status == "failed" and word in ended.error.message


def worker_of(service: Service, job: Job) -> psutil.Process:
    """Return the process that has a running job."""
    worker = job.refresh().worker
    number = next(found.name for found in service.client.workers.list().data if found.id == worker)
    (process,) = [process for process in service.processes("worker train") if str(process.pid) in number]
    return process


def test_a_cancelled_job_stops_and_its_trainer_is_gone(service: Service, tmp_path: Path):
    dataset = upload(service.client, tmp_path, rows())
    job = service.client.jobs.create(
        model="tiny", dataset=dataset, hyperparameters=HYPERPARAMETERS | {"max_steps": 5000}
    )
    wait_until(lambda: job.refresh().step > 0, 60, "the first step")
    # Not by the job's name: a trainer that holds the base was started for an earlier one.
    trainers = [child for child in worker_of(service, job).children() if "worker.trainer" in child.cmdline()]
    assert trainers
    job.cancel()
    assert job.wait(timeout_s=20).status == "cancelled"
    wait_until(lambda: not any(trainer.is_running() for trainer in trainers), 5, "the trainer to be gone")
    wait_until(lambda: not list((service.data_dir).rglob(f"{job.id}-a*")), 5, "its folder to be gone")


def test_a_killed_workers_job_goes_on_and_ends_in_the_same_bytes(service: Service, tmp_path: Path):
    asked = HYPERPARAMETERS | {"max_steps": 60, "save_steps": 5}
    dataset = upload(service.client, tmp_path, rows())
    quiet = service.client.jobs.create(model="tiny", dataset=dataset, hyperparameters=asked, metadata={"n": "1"})
    assert quiet.wait(timeout_s=120).status == "succeeded"
    job = service.client.jobs.create(model="tiny", dataset=dataset, hyperparameters=asked, metadata={"n": "2"})
    wait_until(lambda: job.refresh().step >= 10, 60, "ten steps")
    worker_of(service, job).send_signal(signal.SIGKILL)
    ended = job.wait(timeout_s=150)
    assert (ended.status, ended.attempt) == ("succeeded", 2), ended.error
    assert adapter(quiet) == adapter(job)


def adapter(job) -> str:
    """Return the hash of the weights that a job published."""
    return next(item.sha256 for item in job.artifacts() if item.name == "adapter/adapter_model.safetensors")


def test_the_command_talks_to_it(service: Service, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text(rows(8))
    command = [sys.executable, "-m", "common.cli", "--data-dir", str(service.data_dir), "-o", "json"]
    answer = subprocess.run(
        [*command, "submit", str(tmp_path / "train.jsonl"), "--model", "tiny", "--set", "max_steps=2", "--set",
         "max_length=64", "--watch"],
        capture_output=True, text=True, env=service.variables,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    listed = subprocess.run([*command, "ls"], capture_output=True, text=True, env=service.variables, check=True)
    assert json.loads(listed.stdout)["data"][0]["status"] == "succeeded"
