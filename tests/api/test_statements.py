"""How often a request asks the database: no list asks once for each row, and no wait once for each look."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import pytest
from sqlalchemy import event

from common.jobs import lifecycle
from tests.api.conftest import SPEC, Api, drive, finish


@contextmanager
def counted(api: Api) -> Iterator[list[str]]:
    """Yield the statements that the API sends meanwhile, in order."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        # SQLite is told of a transaction's begin by a statement; Postgres by the driver.
        if statement != "BEGIN":
            sent.append(statement)

    engine = api.context.sessions.engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


def submitted(client: httpx2.Client, count: int) -> list[str]:
    answers = [client.post("/jobs", json={**SPEC, "seed": seed}) for seed in range(count)]
    return [answer.json()["id"] for answer in answers]


def statements(api: Api, client: httpx2.Client, method: str, path: str, **options: object) -> list[str]:
    """Return what the second of two equal requests sends: the first one may fill caches."""
    client.request(method, path, **options)  # type: ignore[arg-type]
    with counted(api) as sent:
        assert client.request(method, path, **options).status_code < 400  # type: ignore[arg-type]
    return sent


# The key and the rows; which jobs have a result, and the time, for OpenAI's clients; the line that a job waits in.
READS = {
    "/jobs/{waits}": 5, "/jobs/{ended}": 2, "/jobs?limit=100": 2, "/jobs?limit=100&status=queued": 2,
    "/v1/fine_tuning/jobs/{waits}": 4, "/v1/fine_tuning/jobs?limit=100": 4, "/v1/models": 3,
    "/datasets?limit=100": 2, "/jobs/{ended}/events?limit=1000": 3, "/workers": 2,
}  # fmt: skip


@pytest.fixture
def jobs(api: Api, client: httpx2.Client) -> dict[str, str]:
    """A job that ended and one that waits, by what they do."""
    (ended,) = submitted(client, 1)
    finish(api.context, drive(api.context, ended))
    (waits,) = submitted(client, 1)
    accepted(api)
    return {"ended": ended, "waits": waits}


def accepted(api: Api) -> None:
    """Let every job pass its check."""
    while True:
        with api.context.write() as session:
            check = lifecycle.claim_preflight(session, "p", 60)
            if check is None:
                return
            lifecycle.accept(session, check, base_id="b", base_revision=None, dataset_sha256="0" * 64, report={})


@pytest.mark.parametrize("path", READS)
def test_a_read_asks_as_often_over_many_jobs_as_over_few(
    api: Api, client: httpx2.Client, jobs: dict[str, str], path: str
) -> None:
    few = statements(api, client, "GET", path.format(**jobs))
    submitted(client, 20)
    accepted(api)
    many = statements(api, client, "GET", path.format(**jobs))
    assert len(few) == len(many) <= READS[path]


def test_what_has_not_changed_costs_no_more_than_what_has(
    api: Api, client: httpx2.Client, jobs: dict[str, str]
) -> None:
    path = f"/jobs/{jobs['waits']}"
    tag = {"if-none-match": client.get(path).headers["etag"]}
    assert client.get(path, headers=tag).status_code == 304
    assert len(statements(api, client, "GET", path, headers=tag)) <= READS["/jobs/{waits}"]


def test_a_submit_asks_as_often_with_many_waiting_as_with_few(api: Api, client: httpx2.Client) -> None:
    few = statements(api, client, "POST", "/jobs", json=SPEC)
    submitted(client, 20)
    many = statements(api, client, "POST", "/jobs", json=SPEC)
    assert len(few) == len(many) <= 9


def test_clients_that_wait_share_each_look(api: Api, client: httpx2.Client, jobs: dict[str, str]) -> None:
    path = f"/jobs/{jobs['waits']}"
    tag = {"if-none-match": client.get(path).headers["etag"]}

    def sent_by(waiting: int) -> int:
        with ThreadPoolExecutor(waiting) as pool, counted(api) as sent:
            answers = pool.map(lambda _: client.get(f"{path}?wait=4", headers=tag), range(waiting))
            assert {answer.status_code for answer in answers} == {304}
        return len(sent)

    # Each is read as it comes and as it is answered; sixteen looks of its own would be 18 * 16 more.
    assert sent_by(20) - sent_by(2) <= 18 * 2 * READS["/jobs/{waits}"] + 40
