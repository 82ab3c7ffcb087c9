"""Whatever is sent, the answer is a problem document that names the field: never a 5xx."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from common import errors
from tests.api.conftest import SPEC, Api

BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"hyperparameters": {"learning_rate": -1}}, "hyperparameters.learning_rate", "greater than 0 or 'auto'"),
    ({"hyperparameters": {"learning_rate": "x"}}, "hyperparameters.learning_rate", "a valid number or 'auto'"),
    ({"hyperparameters": {"learning_rate": 10**400}}, "hyperparameters.learning_rate", "a valid number or 'auto'"),
    ({"hyperparameters": {"max_length": 10**30}}, "hyperparameters.max_length", "less than or equal to 1048576"),
    ({"hyperparameters": {"num_train_epochs": True}}, "hyperparameters.num_train_epochs", "a valid number"),
    ({"hyperparameters": {"max_steps": 0}}, "hyperparameters.max_steps", "0 trains nothing"),
    ({"hyperparameters": {"optim": "sgd"}}, "hyperparameters.optim", "'adamw_torch_fused', "),
    ({"hyperparameters": None}, "hyperparameters", "must be an object"),
    ({"lora": {"target_modules": ["a"] * 300}}, "lora.target_modules", "at most 256 items"),
    ({"lora": {"target_modules": 3}}, "lora.target_modules", "a valid list or a valid string"),
    ({"lora": {"target_modules": [""]}}, "lora.target_modules.0", "at least 1 character"),
    ({"lora": {"bias": "some"}}, "lora.bias", "'none', 'all' or 'lora_only'"),
    ({"quantization": {"load_in_4bit": False}}, "quantization.load_in_4bit", 'use method "lora"'),
    ({"method": "lora", "quantization": {}}, "quantization.load_in_4bit", 'use method "qlora"'),
    ({"metadata": {"a": 1}}, "metadata.a", "a valid string"),
    ({"metadata": {"a": "x" * 600}}, "metadata.a", "at most 512 characters"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16 items"),
    ({"export": []}, "export", "at least 1 item"),
    ({"suffix": "a b"}, "suffix", "must match"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"model": "nowhere"}, "model", "no base model 'nowhere'"),
    ({"model": "../x"}, "model", "is neither a hub id"),
    ({"model": "tiny-base/.."}, "model", "is neither a hub id"),
    ({"dataset": "dataset:ds_0"}, "dataset", "no dataset ds_0"),
    ({"validation_dataset": "dataset:ds_0"}, "validation_dataset", "no dataset ds_0"),
    ({"validation_dataset": "https://127.1/x"}, "validation_dataset", "not a public address"),
    ({"dataset": "file:///etc/passwd"}, "dataset", "outside of the folder"),
    ({"dataset": "s3://secret/x"}, "dataset", "no datasets from the bucket 'secret'"),
    ({"dataset": "https://[::ffff:10.0.0.1]/x"}, "dataset", "not a public address"),
    ({"dataset": "ftp://x/y"}, "dataset", "must start with one of"),
    ({"dataset": "https://u:p@host/x"}, "dataset", "user name or password"),
    ({"learning_rate": 1e-4}, "learning_rate", "is not a known key"),
]

HINTS = [
    ({"hyperparameters": {"learning_rte": 1}}, "Did you mean learning_rate?"),
    ({"datset": "x"}, "Did you mean dataset?"),
    ({"lora": {"rank": 8, "lora_alfa": 8}}, "lora_alpha"),
    ({"lora_alpha": 8}, "It belongs in lora."),
    ({"lora": {"seed": 8}}, "It belongs at the top level."),
    ({"zzz": 8}, "Known keys: model, dataset"),
    ({"model": "nowhere"}, "There are: tiny-base."),
]

RAW = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 200_000, b'{"a":' * 90_000, b"\x00",
    b'{"seed":' + b"9" * 5000 + b"}", b'{"seed": NaN}', b'{"hyperparameters":{"learning_rate":1e999}}',
    b'{"model":"a\\u0000","dataset":"https://x/\\ud800"}', b'{"metadata":{"\\ud800":"x"}}', b'{"\\ud800":"x"}',
    b'{"model":"a/b","dataset":"https://example.com/x","metadata":{"a":"\\u0000"}}',
]  # fmt: skip

QUERIES = [
    "/jobs?limit=0", "/jobs?limit=101", "/jobs?limit=x", "/jobs?statuss=queued", "/jobs?status=gone", "/jobs?after=%00",
    "/jobs?metadata[a%00]=b", "/jobs?metadata=b", "/jobs?metadata[]=b", "/jobs?metadata[a]=%00", "/keys?tenant=A",
    "/jobs?after=" + "x" * 41, "/jobs?" + "&".join(f"metadata[{n}]=x" for n in range(17)), "/jobs?%FF=%FE",
    "/jobs/x/events?after=-1", "/jobs/x/events?after=99999999999999999999", "/jobs/x?wait=61",
    "/datasets?limit=1e3", "/jobs/x/metrics?limit=10001",
]  # fmt: skip

PATHS = ["/jobs/%00", "/jobs/a%00b", "/jobs/%ff", "/nowhere", "/jobs/", "/jobs/a%2Fb", "/datasets/%00", "//"]


def checked(answer: httpx2.Response, *statuses: int) -> dict[str, Any]:
    """Return the problem, of one of the statuses."""
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == answer.status_code and problem["title"] and problem["detail"] and problem["code"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


def test_bodies_that_are_wrong(api: Api, client: httpx2.Client, subtests: pytest.Subtests) -> None:
    for body, param, message in BODIES:
        with subtests.test(param=param, message=message):
            problem = checked(client.post("/jobs", json={**SPEC, **body}), 400)
            assert problem["param"] == param and message in problem["detail"], problem
            assert "constrained" not in problem["detail"] and "literal[" not in problem["detail"]
    for body, hint in HINTS:
        with subtests.test(hint=hint):
            problem = checked(client.post("/jobs", json={**SPEC, **body}), 400)
            hints = [problem.get("hint"), *(each.get("hint") for each in problem.get("errors", []))]
            assert any(hint in each for each in hints if each), problem
    assert client.get("/jobs").json()["data"] == [], "nothing is left behind"


def test_every_problem_is_listed(client: httpx2.Client) -> None:
    problem = checked(client.post("/jobs", json={"seed": "x", "lora": {"r": 0, "q": 1}}), 400)
    assert [each["param"] for each in problem["errors"]] == ["model", "dataset", "lora.r", "lora.q", "seed"]
    assert "4 more" in problem["detail"]


def test_bytes_that_are_no_job(client: httpx2.Client, subtests: pytest.Subtests) -> None:
    for body in RAW:
        with subtests.test(body=body[:40]):
            checked(client.post("/jobs", content=body, headers={"content-type": "application/json"}), 400)
    plain = client.post("/jobs", content=json.dumps(SPEC), headers={"content-type": "text/plain"})
    assert checked(plain, 415)["code"] == "unsupported_media_type"
    too_long = b'{"suffix":"' + b"x" * 2**20 + b'"}'
    for content in (too_long, iter([too_long])):
        answer = client.post("/jobs", content=content, headers={"content-type": "application/json"})
        assert checked(answer, 413)["code"] == "too_large"


def test_a_form_where_json_belongs_is_refused_before_it_is_read(api: Api) -> None:
    # A form may be as long as an upload: read into memory as JSON is, a few of them would fill it.
    address = urlsplit(api.url)
    head = (
        f"POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\nExpect: 100-continue\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 2000000\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 415 "), "100 would ask for the body"


def test_addresses_that_are_wrong(any_api: Api, subtests: pytest.Subtests) -> None:
    with any_api.client() as client:
        check_addresses(client, subtests)


def check_addresses(client: httpx2.Client, subtests: pytest.Subtests) -> None:
    for query in QUERIES:
        with subtests.test(query=query[:60]):
            checked(client.get(query), 400)
    for path in PATHS:
        with subtests.test(path=path):
            checked(client.get(path), 404)
    refused = client.put("/jobs")
    assert checked(refused, 405)["code"] == "method_not_allowed" and refused.headers["allow"]
    assert checked(client.get("/jobs?statuss=queued"), 400)["hint"] == "Did you mean status?"
    for name, value in (("idempotency-key", "a b"), ("idempotency-key", "x" * 256)):
        checked(client.post("/jobs", json=SPEC, headers={name: value}), 400)
    checked(client.get("/jobs/x/events", headers={"last-event-id": "x"}), 400)
    checked(client.post("/keys", json={"name": "a", "tenant": "datasets"}), 400)


def form(body: bytes, boundary: str = "x") -> dict[str, Any]:
    return {"content": body, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


def test_forms_that_are_no_upload(api: Api, client: httpx2.Client, subtests: pytest.Subtests) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({}, 400, "invalid_form"),
        ({"data": {"file": "text"}}, 400, "invalid_form"),
        ({"files": {"file": ("a", b"")}}, 400, "empty_file"),
        ({"files": {"other": ("a", b"x")}}, 400, "unknown_field"),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, 400, "invalid_form"),
        ({"files": {"file": ("a", b"x" * (3 * 2**20 + 1))}}, 413, "too_large"),
        ({"files": {"file": ("a", b"x" * (20 * 2**20))}}, 413, "too_large"),
        (form(b"garbage"), 400, "invalid_form"),
        (form(b"--x--\r\n"), 400, "missing_file"),
        (form(part + b"abc"), 400, "invalid_form"),
        (form(b"--x\r\nA: " + b"b" * 20_000 + b"\r\n\r\nabc\r\n--x--\r\n"), 400, "invalid_form"),
        (form(part + b"abc\r\n--x--\r\n", "y" * 9000), 400, "invalid_form"),
        (form(b"--x\r\n\r\nabc\r\n--x--\r\n"), 400, "unknown_field"),
    ]
    for arguments, status, code in cases:
        with subtests.test(code=code, arguments=str(arguments)[:60]):
            assert checked(client.post("/datasets", **arguments), status)["code"] == code
    assert client.get("/datasets").json()["data"] == []
    assert not list(api.context.store.objects("default/"))


def test_names_of_uploads_are_plain(client: httpx2.Client) -> None:
    for sent, kept in (("../../etc/passwd", "passwd"), ("C:\\x\\y.csv", "y.csv"), ("é.jsonl", "é.jsonl"), ("..", "..")):
        answer = client.post("/datasets", files={"file": (sent, b"x")})
        assert answer.status_code in (200, 201) and answer.json()["name"] == kept
    raw = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a\x1b[31m\xff.csv"\r\n\r\nx\r\n--x--\r\n'
    assert client.post("/datasets", **form(raw)).json()["name"] == "a[31m\ufffd.csv"


def test_keys_that_are_none(api: Api) -> None:
    for value in (None, "Bearer", "Basic eA==", "Bearer x", b"Bearer \xff\xfe", "Bearer " + "x" * 9000):
        headers = {} if value is None else {"authorization": value}
        problem = checked(httpx2.get(f"{api.url}/jobs", headers=headers, trust_env=False), 401)
        assert problem["code"] == errors.Unauthenticated.code and problem["hint"]


def test_request_ids_are_harmless(api: Api, client: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    assert client.get("/livez", headers={"x-request-id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for value in ("a b", "x" * 65, "a;b", b"\xff"):
        assert client.get("/livez", headers={"x-request-id": value}).headers["x-request-id"].startswith("req_")
    with caplog.at_level("INFO", "api.access"):
        client.get("/jobs?metadata[a]=very-secret", headers={"x-request-id": "logged"})
        client.get("/jobs/a%0ab")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "api.access"]
    line = next(line for line in lines if line["request_id"] == "logged")
    assert (line["method"], line["path"], line["status"], line["tenant"]) == ("GET", "/jobs", 200, "default")
    assert "very-secret" not in caplog.text and api.key not in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)
