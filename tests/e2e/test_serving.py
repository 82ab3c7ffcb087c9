"""Two jobs of a running installation, asked together: what each learned is what each says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from openai import BadRequestError, OpenAI

from common.client.jobs import Job
from common.embedded.ports import free_ports
from tests.e2e.conftest import Service
from tests.processes import ROOT, Process

HYPERPARAMETERS = {
    "max_steps": 60, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 64,
    "learning_rate": 1e-2, "num_train_epochs": 60, "save_steps": 1000,
}  # fmt: skip
LORA = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0}
# What each job learns to answer.
LESSONS = {"first": "the quiet sea", "second": "small boats and birds"}
QUESTION = "the quick brown fox"


@pytest.fixture(scope="module")
def jobs(service: Service, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """A job for each lesson, at its end."""
    made = {}
    for name, answer in LESSONS.items():
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
        path = tmp_path_factory.mktemp("data") / f"{name}.jsonl"
        path.write_text((json.dumps({"messages": turns}) + "\n") * 4)
        dataset = service.client.datasets.upload(path).uri
        made[name] = service.client.jobs.create("tiny", dataset, hyperparameters=HYPERPARAMETERS, lora=LORA)
    ended = {name: job.wait(180) for name, job in made.items()}
    assert [job.status for job in ended.values()] == ["succeeded"] * len(ended), [job.error for job in ended.values()]
    return ended


@pytest.fixture(scope="module")
def url(service: Service, jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `tunery serve` that found the installation by its data directory."""
    port = free_ports(1)[0]
    folder = tmp_path_factory.mktemp("serving")
    arguments = ["common.cli", "--data-dir", str(service.data_dir), "serve", "--base", "tiny", "--port", str(port)]
    variables = service.variables | {"PYTHONPATH": str(ROOT), "TUNERY_WORK_DIR": str(folder / "work")}
    process = Process("serve", arguments, variables, folder / "serve.log")
    try:
        process.wait_for("the base is loaded", 120)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.end()
    assert process.wait() == 0, process.said()
    assert not list((folder / "work" / "jobs").iterdir()), "its folder is left behind"


def answer(service: Service, url: str, model: str) -> str:
    key = service.client.address.api_key
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20}
    answered = httpx2.post(
        f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60, trust_env=False
    )
    assert answered.status_code == 200, answered.text
    return answered.json()["choices"][0]["message"]["content"]


def chat(service: Service, *arguments: str) -> str:
    """Return what `tunery chat` prints."""
    command = [sys.executable, "-m", "common.cli", "--data-dir", str(service.data_dir), "chat", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=service.variables, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("service", ["embedded"], indirect=True, scope="module")
def test_what_each_job_learned_is_what_each_says(service: Service, url: str, jobs: dict[str, Job]):
    with ThreadPoolExecutor(3) as pool:
        models = [*(job.id for job in jobs.values()), "example/tiny"]
        texts = list(pool.map(lambda model: answer(service, url, model), models))
    assert texts[:2] == list(LESSONS.values())
    assert texts[2] not in LESSONS.values()
    key = str(service.client.address.api_key)
    listed = httpx2.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}, trust_env=False).json()
    newest_first = sorted((job.id for job in jobs.values()), reverse=True)
    assert [item["id"] for item in listed["data"]] == [
        "example/tiny",
        *(f"ft:tiny:default::{id}" for id in newest_first),
    ]


@pytest.mark.parametrize("service", ["embedded"], indirect=True, scope="module")
def test_the_stock_client_asks_by_the_name_that_the_job_tells(service: Service, url: str, jobs: dict[str, Job]):
    key = service.client.address.api_key
    with OpenAI(base_url=f"{service.client.address.url}/v1", api_key=key) as client:
        name = client.fine_tuning.jobs.retrieve(jobs["second"].id).fine_tuned_model
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        turns = [{"role": "user", "content": QUESTION}]
        answered = client.chat.completions.create(model=name, messages=turns, temperature=0, max_tokens=20)
        assert (answered.choices[0].message.content, answered.model) == (LESSONS["second"], name)
        assert client.models.retrieve(name).id == name == client.models.retrieve(jobs["second"].id).id
        with pytest.raises(BadRequestError, match="a checkpoint is not served"):
            client.chat.completions.create(model=f"{name}:ckpt-step-5", messages=turns)


@pytest.mark.parametrize("service", ["embedded"], indirect=True, scope="module")
def test_they_are_asked_from_the_terminal_with_and_without_a_server(service: Service, url: str, jobs: dict[str, Job]):
    first = jobs["first"].id
    assert chat(service, first, QUESTION, "--url", url) == f"{LESSONS['first']}\n"
    told = json.loads(chat(service, first, QUESTION, "--compare", "--max-tokens", "20", "-o", "json"))
    assert told["prompt"] == QUESTION and told["adapter"] == LESSONS["first"] != told["base"]
    kept = service.data_dir / "chat" / first / "adapter"
    assert (kept / "adapter_model.safetensors").is_file(), "downloaded once"
