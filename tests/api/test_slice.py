"""The way through the API that a stranger takes: upload, submit, watch, download."""

from __future__ import annotations

import io
import json
import tarfile

import httpx2

from common.jobs import lifecycle
from common.jobs.lifecycle import Published
from common.storage import keys
from tests.api.conftest import BASE, SPEC, Api, drive


def upload(client: httpx2.Client, content: bytes = b'{"text": "a"}\n', name: str = "train.jsonl") -> httpx2.Response:
    return client.post("/datasets", files={"file": (name, content)})


def test_a_job_from_upload_to_adapter(any_api: Api) -> None:
    with any_api.client() as client:
        job_id = submit(client)
        run(any_api, job_id)
        download(client, job_id)


def submit(client: httpx2.Client) -> str:
    dataset = upload(client).json()
    assert set(dataset) == {"id", "name", "bytes", "sha256", "uri", "created_at"}
    answer = client.post("/jobs", json={"model": BASE, "dataset": dataset["uri"], "suffix": "bot"})
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert job["status"] == "validating" and job["dataset"] == dataset["uri"]
    return str(job["id"])


def download(client: httpx2.Client, job_id: str) -> None:
    assert client.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
    answer = client.get(f"/jobs/{job_id}/adapter")
    assert answer.status_code == 307
    fetched = httpx2.get(answer.headers["location"], trust_env=False)
    assert "bot-adapter.tar.gz" in fetched.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(fetched.content)) as archive:
        assert archive.getnames() == ["adapter/a.txt"]
    listed = client.get(f"/jobs/{job_id}/artifacts").json()["data"]
    assert [item["name"] for item in listed] == ["adapter.tar.gz"]
    assert httpx2.get(listed[0]["url"], trust_env=False).content == fetched.content


def run(api: Api, job_id: str) -> None:
    """Do what the workers do: check, train, publish."""
    claim = drive(api.context, job_id)
    prefix = keys.attempt(claim.tenant, claim.job_id, claim.epoch)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("adapter/a.txt"))
    api.context.store.put_bytes(prefix + keys.ADAPTER_ARCHIVE, buffer.getvalue())
    packed = {"name": keys.ADAPTER_ARCHIVE, "key": prefix + keys.ADAPTER_ARCHIVE, "bytes": 1, "sha256": "0" * 64}
    with api.context.write() as session:
        lifecycle.publish(session, claim, Published(prefix + keys.MANIFEST, "0" * 64, [packed]), {})


def test_a_full_fine_tune_has_no_adapter_to_download(api: Api, client: httpx2.Client) -> None:
    job_id = client.post("/jobs", json={**SPEC, "method": "full"}).json()["id"]
    claim = drive(api.context, job_id)
    name = "model/config.json"
    key = keys.attempt(claim.tenant, claim.job_id, claim.epoch) + name
    api.context.store.put_bytes(key, b"{}")
    files = [{"name": name, "key": key, "bytes": 2, "sha256": "0" * 64}]
    with api.context.write() as session:
        lifecycle.publish(session, claim, Published(f"{key}/manifest.json", "0" * 64, files), {})
    answer = client.get(f"/jobs/{job_id}/adapter", follow_redirects=False)
    assert answer.status_code == 409 and answer.json()["code"] == "no_adapter"
    assert "artifacts" in answer.json()["hint"]
    assert client.get(f"/jobs/{job_id}/artifacts").json()["data"][0]["name"] == name


def test_how_each_module_was_held_is_read_from_what_was_published(api: Api, client: httpx2.Client) -> None:
    job_id = client.post("/jobs", json=SPEC).json()["id"]
    claim = drive(api.context, job_id)
    answer = client.get(f"/jobs/{job_id}/precision")
    assert answer.status_code == 409 and answer.json()["code"] == "wrong_state"
    line = {"name": "lm_head", "class": "Linear", "dtype": "bfloat16", "bits": 16, "parameters": 4, "trained": 0}
    report = {
        "compute_dtype": "bfloat16", "adapter_dtype": "bfloat16", "parameters": {"nf4": 8}, "bytes": {"nf4": 4},
        "left_in_16_bit": {}, "memory_footprint": {"before_bytes": 20, "after_bytes": 12, "kbit_preparation_bytes": 0},
        "modules": [line | {"status": "not_quantizable"}],
    }  # fmt: skip
    prefix = keys.attempt(claim.tenant, claim.job_id, claim.epoch)
    api.context.store.put_bytes(prefix + keys.PRECISION_REPORT, json.dumps(report).encode())
    file = {"name": keys.PRECISION_REPORT, "key": prefix + keys.PRECISION_REPORT, "bytes": 1, "sha256": "0" * 64}
    with api.context.write() as session:
        lifecycle.publish(session, claim, Published(prefix + keys.MANIFEST, "0" * 64, [file]), {})
    assert client.get(f"/jobs/{job_id}/precision").json() == report


def test_health_needs_no_key(api: Api) -> None:
    assert httpx2.get(f"{api.url}/livez", trust_env=False).json() == {"status": "ok"}
    answer = httpx2.get(f"{api.url}/readyz", trust_env=False)
    assert answer.status_code == 200, answer.text
    report = answer.json()
    assert all(report["checks"][name]["ok"] for name in ("database", "migration", "store", "broker")), report
    assert len(report["warnings"]) == 2, "no worker runs, and that is said"


def test_a_submit_names_what_is_wrong(client: httpx2.Client) -> None:
    answer = client.post("/jobs", json={**SPEC, "hyperparameters": {"learning_rte": 1e-4}})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["param"] == "hyperparameters.learning_rte" and problem["hint"] == "Did you mean learning_rate?"
