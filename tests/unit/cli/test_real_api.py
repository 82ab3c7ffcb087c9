"""The command and the client against the API itself: real processes, a real database, broker and object store."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx2
import pytest
from typer.testing import CliRunner, Result

import migrations
from common import context, keys, settings
from common.cli.app import app
from common.client import (
    AsyncTunery,
    Missing,
    NotAuthenticated,
    NotPermitted,
    RateLimited,
    RequestInvalid,
    StateConflict,
    Tunery,
)
from common.embedded.ports import free_ports
from tests.servers import S3

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60
ROWS = '{"prompt": "a", "completion": "b"}\n' * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def environment(folder: Path, valkey_url: str, s3: S3) -> dict[str, str]:
    """The settings of an installation with a base model, a migrated database and a bucket."""
    base = folder / "models" / "tiny-base"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "llama"}')
    return {
        "TUNERY_DATABASE_URL": f"sqlite:///{folder / 'tunery.db'}",
        "TUNERY_BROKER_URL": valkey_url,
        "TUNERY_BROKER_PREFIX": f"real-api-{os.getpid()}",
        "TUNERY_S3_ENDPOINT_URL": s3.endpoint_url,
        "TUNERY_S3_ACCESS_KEY_ID": s3.access_key_id,
        "TUNERY_S3_SECRET_ACCESS_KEY": s3.secret_access_key,
        "TUNERY_S3_BUCKET": s3.new_bucket(),
        "TUNERY_MODEL_DIR": str(base.parent),
        "TUNERY_PORT": str(free_ports(1)[0]),
        "TUNERY_DATASET_BUCKETS": "bucket",
        "TUNERY_DATA_DIR": str(folder / "data"),
    }


@pytest.fixture(scope="module")
def url(environment: dict[str, str], folder: Path) -> Iterator[str]:
    """The address of an API process."""
    parts = context.build(settings.Settings(**{n.removeprefix("TUNERY_").lower(): v for n, v in environment.items()}))
    migrations.upgrade(parts.sessions.engine)
    with parts.write() as session:
        keys.ensure_first_key(session, folder / "data" / "api-key")
    parts.close()
    url = f"http://127.0.0.1:{environment['TUNERY_PORT']}"
    (folder / "data" / "up.json").write_text(json.dumps({"url": url}))
    with (folder / "api.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api"], cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log
        )
    try:
        _await_api(process, url, folder / "api.log")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)


def _await_api(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if httpx2.get(f"{url}/livez", trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)


@pytest.fixture
def client(url: str, folder: Path) -> Iterator[Tunery]:
    with Tunery(data_dir=folder / "data") as client:
        yield client


@pytest.fixture
def tunery(url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that runs `tunery`; it finds the server by what lies in the data directory."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TUNERY_URL", raising=False)
    monkeypatch.delenv("TUNERY_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in arguments])

    return run


def submitted(tunery, *more: str) -> str:
    done = tunery("submit", "s3://bucket/x.jsonl", "-m", "tiny-base", *more, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["id"]


def test_a_file_becomes_a_dataset_and_a_job(tunery, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text(ROWS)
    done = tunery("submit", "train.jsonl", "-m", "tiny-base", "--set", "r=8", "--metadata", "team=red", "-o", "json")
    assert done.exit_code == 0, done.output
    job = json.loads(done.stdout)
    assert (job["status"], job["lora"]["r"], job["metadata"]) == ("validating", 8, {"team": "red"})
    listed = json.loads(tunery("datasets", "list", "-o", "json").stdout)["data"]
    assert [item["uri"] for item in listed] == [job["dataset"]]
    assert listed[0]["sha256"] == hashlib.sha256(ROWS.encode()).hexdigest()
    assert tunery("datasets", "rm", job["dataset"]).exit_code == 2, "a dataset that a job waits for stays"
    assert tunery("cancel", job["id"]).stdout == f"{job['id']}: cancelled\n"
    assert tunery("datasets", "rm", job["dataset"]).exit_code == 0


def test_a_cancelled_job_from_every_side(tunery):
    job = submitted(tunery, "--metadata", "side=every")
    assert job in tunery("ls", "--metadata", "side=every", "--status", "validating").stdout
    assert tunery("cancel", job).exit_code == 0
    watched = tunery("watch", job)
    assert watched.exit_code == 3
    assert watched.stdout.splitlines()[-1] == "cancelled"
    assert "job.submitted" in watched.stdout and "job.cancelled" in watched.stdout
    assert "job.cancelled" in tunery("logs", job).stdout
    assert json.loads(tunery("logs", job, "--follow", "-o", "json").stdout.splitlines()[0])["type"] == "event"
    assert "cancelled" in tunery("show", job).stdout
    assert job not in tunery("ls", "--metadata", "side=every", "--status", "validating").stdout
    nothing = tunery("download", job)
    assert nothing.exit_code == 1 and "published no files" in nothing.stderr


def test_a_retry_is_a_new_job(tunery):
    job = submitted(tunery)
    early = tunery("retry", job)
    assert early.exit_code == 2 and "error:" in early.stderr
    tunery("cancel", job)
    again = tunery("retry", job).stdout
    new = again.removeprefix(f"{job} → ").partition(":")[0]
    assert new.startswith("job_") and new != job
    assert tunery("cancel", new).stdout == f"{new}: cancelled\n"


def test_what_the_api_refuses_names_the_field(tunery):
    done = tunery("submit", "s3://bucket/x.jsonl", "-m", "absent-base")
    assert done.exit_code == 2 and "absent-base" in done.stderr and "tiny-base" in done.stderr
    done = tunery("submit", "dataset:ds_absent", "-m", "tiny-base")
    assert done.exit_code == 2 and "error: dataset" in done.stderr
    for arguments in (("show", "job_absent"), ("watch", "job_absent"), ("cancel", "job_absent"), ("resume", "a/b")):
        done = tunery(*arguments)
        assert done.exit_code == 2 and "error:" in done.stderr and "Traceback" not in done.output


def test_models_workers_and_keys(tunery, url: str):
    assert "tiny-base" in tunery("models").stdout
    assert "no workers" in tunery("workers").stderr
    made = json.loads(tunery("keys", "create", "ci", "--tenant", "red", "-o", "json").stdout)
    with Tunery(url, made["key"]) as red:
        assert red.jobs.list().data == []
        with pytest.raises(NotPermitted):
            red.workers.drain("w_1")
        assert made["id"] in tunery("keys", "list", "--tenant", "red").stdout
        assert tunery("keys", "revoke", made["id"], "--tenant", "red").exit_code == 0
        with pytest.raises(NotAuthenticated):
            red.jobs.list()


def test_the_doctor(tunery):
    settings.load.cache_clear()
    done = tunery("doctor")
    assert done.exit_code == 0, done.output
    for line in (
        "ok    server",
        "ok    api key",
        "ok    clock",
        "ok    database",
        "ok    broker",
        "ok    object store",
    ):
        assert line in done.stdout
    # No worker runs here, and the doctor says so.
    assert "warn  ready: " in done.stdout and "no train worker" in done.stdout


def test_the_client(client: Tunery):
    job = client.jobs.create("tiny-base", "s3://bucket/x.jsonl", suffix="bot", idempotency_key="once")
    assert client.jobs.create("tiny-base", "s3://bucket/x.jsonl", suffix="bot", idempotency_key="once").id == job.id
    with pytest.raises(RequestInvalid) as caught:
        client.jobs.create("tiny-base", "s3://bucket/x.jsonl", lora={"r": 0}, seed=-1)
    assert {item["param"] for item in caught.value.errors} == {"lora.r", "seed"}
    with pytest.raises(StateConflict):
        job.delete()
    with pytest.raises(TimeoutError):
        job.wait(timeout_s=1.5)
    assert job.cancel().status == "cancelled"
    assert job.wait(5).status == "cancelled"
    assert [type(update).__name__ for update in job.watch()][-1] == "Job"
    assert job.metrics() == {"step": []} and job.artifacts() == [] and job.checkpoints() == []
    job.delete()
    with pytest.raises(Missing):
        job.refresh()


def test_a_quota_that_the_operator_set(client: Tunery, tunery):
    limits = ("--max-queued", "1", "--max-gpu-hours", "2.5")
    shown = json.loads(tunery("-o", "json", "admin", "quota", "acme", *limits).stdout)
    assert (shown["max_queued"], shown["max_gpu_hours"], shown["max_running"]) == (1, 2.5, None)
    key = client.keys.create("k", tenant="acme").key
    with Tunery(client.address.url, key) as acme:
        job = acme.jobs.create("tiny-base", "s3://bucket/x.jsonl", priority=1)
        assert job.refresh().waits_for is not None
        assert acme.jobs.reorder(job.id, priority=4).priority == 4
        with pytest.raises(RateLimited) as refused:
            acme.jobs.create("tiny-base", "s3://bucket/x.jsonl")
        assert refused.value.code == "quota_queued"
        assert acme.quotas.get().queued == 1
    kept = json.loads(tunery("-o", "json", "admin", "quota", "acme", "--max-queued", "none").stdout)
    assert (kept["max_queued"], kept["max_gpu_hours"], kept["queued"]) == (None, 2.5, 1)
    assert tunery("admin", "quota", "acme", "--max-queued", "many").exit_code == 2


def test_reconcile_tells_and_removes_what_no_row_names(
    client: Tunery, tunery, s3: S3, environment: dict[str, str], tmp_path: Path
):
    bucket, store = environment["TUNERY_S3_BUCKET"], s3.client()
    store.put_object(Bucket=bucket, Key="acme/datasets/orphan", Body=b"x")
    told = json.loads(tunery("-o", "json", "admin", "reconcile", "--remove", "1").stdout)
    assert "acme/datasets/orphan" in told["orphans"] and told["removed"] == [], "it is younger than an hour"
    told = json.loads(tunery("-o", "json", "admin", "reconcile", "--remove", "0").stdout)
    assert "acme/datasets/orphan" in told["removed"]
    (tmp_path / "kept.jsonl").write_text('{"text": "kept"}')
    kept = client.datasets.upload(tmp_path / "kept.jsonl")
    (key,) = [item["Key"] for item in store.list_objects_v2(Bucket=bucket)["Contents"] if kept.sha256 in item["Key"]]
    store.delete_object(Bucket=bucket, Key=key)
    lost = tunery("admin", "reconcile")
    assert lost.exit_code == 1 and f"missing  {key}  of {kept.id}" in lost.stdout
    client.datasets.delete(kept.id)


def test_pages_follow_each_other(client: Tunery):
    made = [client.jobs.create("tiny-base", "s3://bucket/x.jsonl", metadata={"pages": "yes"}).id for _ in range(5)]
    found, after = [], None
    while True:
        page = client.jobs.list(metadata={"pages": "yes"}, limit=2, after=after)
        found += [job.id for job in page]
        if not page.has_more:
            break
        after = page.next
    assert sorted(found) == sorted(made) and found == sorted(found, reverse=True)


def test_webhooks_of_both_clients(client: Tunery, tunery):
    made = json.loads(tunery("webhooks", "create", "https://example.com/hook", "-e", "job.failed", "-o", "json").stdout)
    hook = made["id"]
    assert made["secret"].startswith("whsec_") and client.webhooks.get(hook).events == ["job.failed"]
    assert client.webhooks.change(hook, events=None, description="all").description == "all"
    ping = client.webhooks.ping(hook)
    assert client.webhooks.delivery(hook, ping.id).type == "webhook.ping"
    assert client.webhooks.rotate(hook, overlap_s=0).secret != made["secret"]

    async def look() -> None:
        async with AsyncTunery(client.address.url, client.address.api_key) as other:
            [found] = (await other.webhooks.deliveries(hook, state="pending")).data
            assert found.id == ping.id and (await other.webhooks.redeliver(hook, ping.id)).state == "pending"
            assert hook in [each.id for each in (await other.webhooks.list()).data]
            await other.webhooks.delete(hook)

    anyio.run(look)
    with pytest.raises(Missing):
        client.webhooks.get(hook)


def test_clones_and_many_cancels_of_both_clients(client: Tunery, tunery):
    job = submitted(tunery, "--metadata", "side=many", "--set", "r=4")
    clone = client.jobs.get(job).clone(lora={"r": 8}, metadata={"side": None, "other": "x"}, suffix="b")
    assert clone.id != job and (clone.lora.r, clone.suffix, clone.metadata) == (8, "b", {"other": "x"})
    with pytest.raises(RequestInvalid, match=r"lora\.rank"):
        client.jobs.clone(job, lora={"rank": 8})

    async def look() -> None:
        async with AsyncTunery(client.address.url, client.address.api_key) as other:
            again = await other.jobs.clone(job, seed=7)
            assert again.seed == 7
            found = await other.jobs.list(metadata={"side": "many"}, model="tiny-base", created_before=again.created_at)
            assert [each.id for each in found.data] == [job]
            [would, _] = await other.jobs.cancel_many([job, "job_absent"], dry_run=True)
            assert (would.result, would.status) == ("cancelled", "validating")

    anyio.run(look)
    done = json.loads(tunery("cancel", "--metadata", "side=many", "--created-after", "-1h", "-o", "json").stdout)
    assert [item["result"] for item in done["data"]] == ["cancelled"] * 2
    [last] = client.jobs.cancel_many(metadata={"other": "x"})
    assert (last.id, last.result) == (clone.id, "cancelled")
    with pytest.raises(RequestInvalid):
        client.jobs.cancel_many()
