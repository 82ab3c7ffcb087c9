"""A dataset that cannot be had: what may pass is waited for, and what does not ends the job, with what to do."""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from common.context import Context
from common.errors import InfraError, InvalidInput, SourceAway, SourceRefused, SourceSlow
from common.settings import Settings
from common.storage.connection import REFUSED
from tests.worker.conftest import Bench
from tests.worker.peers import Answer, Hub, certificate, serve
from tests.worker.test_fetch import LOOPBACK, ROWS, alive, changed, got
from worker import bases, fetch, guard, patience


@pytest.fixture
def closed_bucket(context: Context, s3) -> str:
    """A bucket with a dataset that the server's credentials may not read."""
    bucket = s3.new_bucket()
    s3.client().put_object(Bucket=bucket, Key="train.jsonl", Body=ROWS)
    refusal = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    s3.client().put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [refusal]}))
    return bucket


def test_a_closed_bucket_is_no_broken_store(context: Context, closed_bucket: str, tmp_path: Path):
    open_to = changed(context, dataset_buckets=[closed_bucket])
    with pytest.raises(SourceRefused, match="may not read s3://") as refusal:
        got(open_to, f"s3://{closed_bucket}/train.jsonl", tmp_path)
    assert refusal.value.code == "dataset_forbidden" and closed_bucket in str(refusal.value.hint)


def test_credentials_that_are_refused_everywhere_are_not_the_users_affair(context: Context, s3, tmp_path: Path):
    bucket = s3.new_bucket()
    stranger = context.settings.model_copy(update={"dataset_buckets": [bucket], "s3_access_key_id": "nobody"})
    refused = Context(stranger, context.sessions, type(context.store)(stranger), context.doorbell)
    with pytest.raises(InfraError) as refusal:
        got(refused, f"s3://{bucket}/train.jsonl", tmp_path)
    assert refusal.value.code == REFUSED and refusal.value.attempts is None


def test_a_check_ends_a_job_whose_bucket_stays_closed(context: Context, bench: Bench, closed_bucket: str):
    bench.context = changed(context, dataset_buckets=[closed_bucket])
    job_id = bench.submit(f"s3://{closed_bucket}/train.jsonl")
    bench.check()
    error = bench.row(job_id).error
    assert error is not None and error["code"] == "dataset_forbidden" and error["param"] == "dataset"
    assert "POST /datasets" in error["hint"]
    assert bench.events(job_id).count("job.postponed") == SourceRefused.attempts - 1


def test_an_attempt_outlasts_a_bucket_that_is_closed_for_a_moment(
    context: Context, bench: Bench, closed_bucket: str, s3, monkeypatch: pytest.MonkeyPatch
):
    bench.context = changed(context, dataset_buckets=[closed_bucket])
    policy = s3.client().get_bucket_policy(Bucket=closed_bucket)["Policy"]
    s3.client().delete_bucket_policy(Bucket=closed_bucket)
    job_id = bench.submit(f"s3://{closed_bucket}/train.jsonl")
    bench.check()
    s3.client().put_bucket_policy(Bucket=closed_bucket, Policy=policy)
    supervisor = bench.supervisor()
    supervisor.work_off(most=2)
    assert bench.row(job_id).status == "queued" and bench.row(job_id).faults == 2
    s3.client().delete_bucket_policy(Bucket=closed_bucket)
    supervisor.work_off()
    assert bench.row(job_id).status == "succeeded"


# ---- https and the hub -----------------------------------------------------------------------------------------------


@contextmanager
def hangs_up(first: bytes) -> Iterator[int]:
    """A server that says `first` to whatever it is told, and hangs up. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(first)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


class Dripping(socketserver.BaseRequestHandler):
    """Sends a byte now and then, in its handshake or once it has said `head`."""

    def handle(self) -> None:
        connection = self.request
        if self.server.context is not None:
            connection = self.server.context.wrap_socket(connection, server_side=True)
            connection.recv(65536)
            connection.sendall(self.server.head)
        else:
            # A handshake record of the greatest length.
            connection.sendall(b"\x16\x03\x03\x3f\xff")
        with connection, suppress(OSError):
            while True:
                connection.sendall(b"x")
                time.sleep(0.05)


@contextmanager
def dripping(context: ssl.SSLContext | None, head: bytes = b"") -> Iterator[int]:
    """A server that never comes to its end. Yields its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        server.daemon_threads = True
        server.context, server.head = context, head  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("where", ["handshake", "headers", "content"])
@pytest.mark.parametrize("ends", ["slow", "cancelled"])
def test_a_host_that_drips_holds_no_worker(where: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tls, authority = certificate(tmp_path, "localhost")
    head = b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 1000000\r\n\r\n" if where == "content" else b"A: ")
    asked = []

    def stop() -> None:
        asked.append(1)
        if ends == "cancelled" and len(asked) > 3:
            raise RuntimeError("cancelled")

    if ends == "slow":
        monkeypatch.setattr(patience, "GRACE_S", 2.0)
    settings = Settings(fetch_networks=[LOOPBACK], ca_bundle=authority)
    with (
        dripping(None if where == "handshake" else tls, head) as port,
        pytest.raises(SourceSlow if ends == "slow" else RuntimeError) as refusal,
    ):
        guard.download(f"https://localhost:{port}/x", tmp_path / "x", settings, stop)
    if ends == "slow":
        assert refusal.value.param == "dataset" and refusal.value.attempts == 3


@pytest.mark.parametrize("target", ["https://[::1", "https://localhost:99999999/x"])
def test_a_redirect_to_no_address_at_all(tmp_path: Path, target: str):
    tls, authority = certificate(tmp_path, "localhost")
    settings = Settings(fetch_networks=[LOOPBACK], ca_bundle=authority)
    with (
        serve(lambda *_: Answer(b"", 302, {"Location": target}), tls) as server,
        pytest.raises(InvalidInput, match="malformed") as refusal,
    ):
        guard.download(f"https://localhost:{server.server_port}/x", tmp_path / "x", settings, alive)
    assert refusal.value.param == "dataset"


def test_a_handshake_that_breaks_off_is_no_bad_certificate(tmp_path: Path):
    with hangs_up(b"") as port, pytest.raises(SourceAway, match="does not answer") as away:
        guard.download(f"https://127.0.0.1:{port}/x", tmp_path / "x", Settings(fetch_networks=[LOOPBACK]), alive)
    assert away.value.param == "dataset" and away.value.hint


@pytest.mark.parametrize(
    ("errno", "error"), [(socket.EAI_NONAME, SourceRefused), (socket.EAI_AGAIN, SourceAway)], ids=["unknown", "away"]
)
def test_a_name_that_does_not_exist_is_no_server_that_is_away(
    errno: int, error: type[InfraError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(errno, "no")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(error, match="cannot be resolved"):
        guard.download("https://exampel.com/x", tmp_path / "x", Settings(), alive)


def test_the_field_of_the_validation_rows_is_named(context: Context, tmp_path: Path):
    open_to = changed(context, fetch_networks=[LOOPBACK])
    with hangs_up(b"") as port, pytest.raises(SourceAway, match=r"^validation_dataset: the host") as away:
        fetch.dataset(open_to, "t", f"https://127.0.0.1:{port}/x", tmp_path, "v", alive, param="validation_dataset")
    assert away.value.param == "validation_dataset"


@pytest.mark.parametrize(("status", "attempts"), [(403, SourceRefused.attempts), (429, None), (503, None)])
def test_a_hub_that_refuses_is_no_hub_that_is_away(
    status: int, attempts: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub: Callable[[str, dict[str, str]], Answer] = Hub({}, {}, None)
    with serve(lambda path, headers: Answer(b"{}", status) if "base" in path else hub(path, headers)) as server:
        settings = Settings(hf_endpoint=f"http://127.0.0.1:{server.server_port}", hf_cache=tmp_path)
        with pytest.raises(InfraError) as refusal:
            bases.resolve("org/base", settings)
    assert refusal.value.attempts == attempts
    assert (refusal.value.param, bool(refusal.value.hint)) == (("model", True) if attempts else (None, False))


def test_a_file_that_may_not_be_read_is_named(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_bytes(ROWS)

    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Root reads every file.
    monkeypatch.setattr("shutil.copyfile", closed)
    with pytest.raises(SourceRefused, match=r"may not read the file 'rows\.jsonl'"):
        got(changed(context, local_datasets=tmp_path / "data"), f"file://{tmp_path}/data/rows.jsonl", tmp_path)


# ---- what breaks a worker --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "code"), [("device", "device_fault"), ("full", "disk_full")])
def test_a_job_that_breaks_every_worker_ends(bench: Bench, fault: str, code: str):
    job_id = bench.submit(fault=fault, fault_at=1)
    bench.check()
    bench.train()
    row = bench.row(job_id)
    assert row.status == "failed" and row.error is not None and row.error["code"] == code
    assert row.attempts == 20


def test_a_job_that_breaks_a_few_workers_goes_on(bench: Bench):
    job_id = bench.submit(fault="device", fault_at=1, fault_attempts=10)
    bench.check()
    bench.train()
    assert bench.row(job_id).status == "succeeded" and bench.row(job_id).attempts > 10
