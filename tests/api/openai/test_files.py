"""Files through the stock client: uploaded whole or in parts, listed, read, and removed in time."""

from __future__ import annotations

import hashlib
import io
import time
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from common import part_uploads
from common.audit import audit
from common.db.rows import ArtifactRow, DatasetRow, JobRow, UploadRow
from common.storage import keys
from tests.api.conftest import SPEC, Api, drive, finish
from tests.api.openai.conftest import Connect, conforms
from worker.sweeper import Sweeper

ROWS = b'{"text": "a"}\n' * 3


def create(sdk: OpenAI, name: str = "train.jsonl", content: bytes = ROWS, **fields: Any) -> Any:
    return conforms(sdk.files.create(file=(name, content), purpose="fine-tune", **fields))


def measured(api: Api, content: bytes = b"step,train_loss\n1,2.5\n") -> str:
    """Let a job succeed that has measured something; return its id."""
    with api.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
    claim = drive(api.context, job_id)
    finish(api.context, claim)
    key = keys.attempt(claim.tenant, job_id, claim.epoch) + "reports/metrics.csv"
    api.context.store.put_bytes(key, content)
    with api.context.write() as session:
        session.add(
            ArtifactRow(job_id=job_id, name="reports/metrics.csv", key=key, bytes=len(content), sha256="0" * 64)
        )
    return job_id


def test_the_life_of_a_file(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    before = int(time.time())
    made = create(sdk)
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(ROWS), "train.jsonl", "fine-tune")
    assert before <= made.created_at <= time.time() and made.expires_at is None and made.status == "processed"
    assert sdk.files.retrieve(made.id) == made == create(sdk), "the same file again is the file that is there"
    assert sdk.files.content(made.id).read() == ROWS
    assert [file.id for file in sdk.files.list()] == [made.id]
    with any_api.client() as client:
        assert client.get(f"/datasets/{made.id}").json()["uri"] == f"dataset:{made.id}"
    gone = conforms(sdk.files.delete(made.id))
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "file")
    with pytest.raises(openai.NotFoundError) as refusal:
        sdk.files.retrieve(made.id)
    assert refusal.value.param == "file_id" and refusal.value.code == "not_found" and refusal.value.request_id


def test_pages_of_files_hold_each_once(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    made = [create(sdk, f"{number}.jsonl").id for number in range(3)]
    result = f"res_{measured(any_api).removeprefix('job_')}"
    made += [result, create(sdk, "last.jsonl").id]
    assert [file.id for file in sdk.files.list(limit=2)] == made[::-1], "the client turns the pages"
    assert [file.id for file in sdk.files.list(limit=2, order="asc")] == made
    assert [file.id for file in sdk.files.list(purpose="fine-tune-results")] == [result]
    page = sdk.files.list(limit=2, after=made[-1])
    assert (page.has_more, [file.id for file in page.data]) == (True, made[-2:-4:-1])
    assert not sdk.files.list(limit=3, after=made[3]).has_more


def test_files_of_one_moment_are_still_in_order(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    made = sorted(create(sdk, f"{number}.jsonl").id for number in range(4))
    with any_api.context.write() as session:
        session.execute(update(DatasetRow).values(created_at=1e9))
    assert [file.id for file in sdk.files.list(limit=1)] == made[::-1]
    assert [file.id for file in sdk.files.list(limit=1, order="asc")] == made


def test_a_result_file_goes_with_its_job(api: Api, sdk: OpenAI) -> None:
    job_id = measured(api)
    [result] = sdk.files.list(purpose="fine-tune-results")
    conforms(result)
    assert sdk.files.content(result.id).read() == b"step,train_loss\n1,2.5\n"
    assert sdk.files.content(result.id).response.headers["content-type"].startswith("text/csv")
    with pytest.raises(openai.BadRequestError, match=job_id):
        sdk.files.delete(result.id)
    with api.client() as client:
        assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert not list(sdk.files.list())


def test_a_file_that_a_live_job_reads_stays(api: Api, sdk: OpenAI) -> None:
    made = create(sdk)
    with api.client() as client:
        job = client.post("/jobs", json={**SPEC, "dataset": f"dataset:{made.id}"}).json()
    with pytest.raises(openai.BadRequestError, match=job["id"]) as refusal:
        sdk.files.delete(made.id)
    assert refusal.value.code == "dataset_in_use"


def test_files_expire(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    made = create(sdk, expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600
    longer = create(sdk, expires_after={"anchor": "created_at", "seconds": 7200})
    assert longer.id == made.id and longer.expires_at >= made.expires_at + 3600, "the longest counts"
    used, kept = create(sdk, "used.jsonl", expires_after={"anchor": "created_at", "seconds": 3600}), create(sdk, "k")
    with any_api.client() as client:
        client.post("/jobs", json={**SPEC, "dataset": f"dataset:{used.id}"})
    Sweeper(any_api.context).sweep()
    assert len(list(sdk.files.list())) == 3
    with any_api.context.write() as session:
        session.execute(update(DatasetRow).where(DatasetRow.expires_at.is_not(None)).values(expires_at=1.0))
    Sweeper(any_api.context).sweep()
    assert {file.id for file in sdk.files.list()} == {used.id, kept.id}, "a live job keeps its file"
    with any_api.context.write() as session:
        session.execute(update(JobRow).values(status="cancelled"))
    Sweeper(any_api.context).sweep()
    assert [file.id for file in sdk.files.list()] == [kept.id]
    assert create(sdk, "k", expires_after={"anchor": "created_at", "seconds": 3600}).expires_at is None


def test_what_is_no_file_is_refused(api: Api, sdk: OpenAI, subtests: pytest.Subtests) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"purpose": "assistants"}, "purpose"),
        ({"file": ("a.jsonl", b"")}, "file"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "created_at", "seconds": "soon"}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
        ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
        ({"extra_body": {"lifetime": "3"}}, "lifetime"),
    ]
    for change, param in wrong:
        with subtests.test(change=str(change)), pytest.raises(openai.BadRequestError) as refusal:
            sdk.files.create(**{"file": ("a.jsonl", ROWS), "purpose": "fine-tune", **change})
        assert refusal.value.param == param and refusal.value.type == "invalid_request_error", refusal.value
    with pytest.raises(openai.APIStatusError) as too_large:
        create(sdk, content=b"x" * (3 * 2**20 + 1))
    assert too_large.value.status_code == 413 and too_large.value.code == "too_large"
    with pytest.raises(openai.BadRequestError, match="no such file"):
        sdk.files.list(after="ds_nowhere")
    assert not list(sdk.files.list()) and not list(api.context.store.objects("default/"))


def test_an_upload_in_parts(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    content = bytes(range(256)) * 9000
    upload = conforms(
        sdk.uploads.create(
            bytes=len(content), filename="a/b/big.jsonl", mime_type="application/jsonl", purpose="fine-tune"
        )
    )
    assert (upload.status, upload.bytes, upload.file) == ("pending", len(content), None)
    assert upload.expires_at == upload.created_at + 3600
    pieces = [content[:1_000_000], content[1_000_000:1_000_001], content[1_000_001:]]
    # In another order than that of the file, and one of them twice, as after a lost answer.
    last, middle, first, _ = (
        conforms(sdk.uploads.parts.create(upload.id, data=piece)) for piece in [*pieces[::-1], pieces[1]]
    )
    assert last.upload_id == upload.id and last.object == "upload.part"
    ids = [first.id, middle.id, last.id]
    assert audit(any_api.context).orphans == [], "parts that wait are in use"
    with pytest.raises(openai.BadRequestError, match="MD5") as refusal:
        sdk.uploads.complete(upload.id, part_ids=ids, md5="0" * 32)
    assert refusal.value.param == "md5"
    done = conforms(sdk.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(content).hexdigest()))
    assert done.status == "completed" and done.file is not None and done.file.filename == "big.jsonl"
    assert sdk.files.content(done.file.id).read() == content
    assert sdk.uploads.complete(upload.id, part_ids=ids) == done, "a repeated call gets the same answer"
    left = [item.key for item in any_api.context.store.objects("default/")]
    assert left == [f"default/datasets/{hashlib.sha256(content).hexdigest()}"]
    for late in (lambda: sdk.uploads.cancel(upload.id), lambda: sdk.uploads.parts.create(upload.id, data=b"x")):
        with pytest.raises(openai.BadRequestError, match="completed"):
            late()


def test_the_clients_own_chunks(api: Api, sdk: OpenAI) -> None:
    content = b"y" * 2_500_000
    done = sdk.uploads.upload_file_chunked(
        file=content, filename="c.jsonl", bytes=len(content), mime_type="text/plain", purpose="fine-tune",
        part_size=10**6,
    )  # fmt: skip
    assert done.status == "completed" and sdk.files.retrieve(done.file.id).bytes == len(content)
    assert b"".join(sdk.files.content(done.file.id).iter_bytes()) == content


def test_uploads_that_come_to_nothing(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    asked: dict[str, Any] = {"filename": "a.jsonl", "mime_type": "", "purpose": "fine-tune"}
    upload = sdk.uploads.create(bytes=10, **asked)
    part = sdk.uploads.parts.create(upload.id, data=io.BytesIO(b"12345"))
    with pytest.raises(openai.BadRequestError, match="5 bytes, and 10 were announced"):
        sdk.uploads.complete(upload.id, part_ids=[part.id])
    with pytest.raises(openai.BadRequestError, match="no part of this upload"):
        sdk.uploads.complete(upload.id, part_ids=["part_1"])
    with pytest.raises(openai.BadRequestError, match="twice"):
        sdk.uploads.complete(upload.id, part_ids=[part.id, part.id])
    assert conforms(sdk.uploads.cancel(upload.id)).status == "cancelled"
    assert sdk.uploads.cancel(upload.id).status == "cancelled", "a repeated call gets the same answer"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        sdk.uploads.complete(upload.id, part_ids=[part.id])
    late = sdk.uploads.create(bytes=5, **asked)
    sdk.uploads.parts.create(late.id, data=b"12345")
    with any_api.context.write() as session:
        session.execute(update(UploadRow).values(expires_at=1.0))
    with pytest.raises(openai.BadRequestError, match="expired"):
        sdk.uploads.parts.create(late.id, data=b"12345")
    Sweeper(any_api.context).sweep()
    with pytest.raises(openai.NotFoundError):
        sdk.uploads.cancel(late.id)
    assert not [item.key for item in any_api.context.store.objects("default/uploads/") if late.id in item.key]
    for change, param in (({"bytes": 0}, "bytes"), ({"bytes": 2**50}, "bytes"), ({"purpose": "vision"}, "purpose")):
        with pytest.raises(openai.BadRequestError) as refusal:
            sdk.uploads.create(**{**asked, "bytes": 10, **change})
        assert refusal.value.param == param


def test_an_upload_takes_no_more_than_it_can_need(sdk: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_uploads, "PART_BYTES_MAX", 5)
    upload = sdk.uploads.create(bytes=10, filename="a", mime_type="", purpose="fine-tune")
    for _ in range(5):
        sdk.uploads.parts.create(upload.id, data=b"12345")
    with pytest.raises(openai.BadRequestError, match="10 bytes were announced"):
        sdk.uploads.parts.create(upload.id, data=b"1")
    with pytest.raises(openai.APIStatusError, match="longer than 5 bytes"):
        sdk.uploads.parts.create(upload.id, data=b"123456")
