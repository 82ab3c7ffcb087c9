"""One call: its answer, its errors, and when it is sent again."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from common import errors
from common.client import (
    ApiError,
    CannotConnect,
    Missing,
    NotAuthenticated,
    RateLimited,
    RequestInvalid,
    Retries,
    ServerFault,
    StateConflict,
    Tunery,
    UnexpectedAnswer,
)
from tests.unit.client.conftest import KEY, QUICK, a_job
from tests.unit.client.peer import Peer, hangs_up, problem, raw, says


def test_a_get_carries_the_key_and_returns_the_typed_answer(peer: Peer, client: Tunery):
    peer.on("GET", "/jobs/job_1", says(a_job()))
    job = client.jobs.get("job_1")
    assert (job.id, job.step, job.hyperparameters.learning_rate, job.lora.r) == ("job_1", 3, 1e-4, 16)
    assert job.created_at.tzinfo is not None
    assert peer.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert peer.requests[0].headers["user-agent"].startswith("tunery/")


@pytest.mark.parametrize("passing", [problem(503, "infra"), problem(502, "x"), problem(504, "x"), hangs_up])
def test_a_get_is_sent_again_after_passing_faults(peer: Peer, client: Tunery, passing):
    peer.on("GET", "/jobs/job_1", passing, passing, says(a_job()))
    assert client.jobs.get("job_1").id == "job_1"
    assert len(peer.requests) == 3


def test_it_gives_up_in_the_end_with_the_servers_words(peer: Peer, client: Tunery):
    peer.on("GET", "/jobs", problem(503, "infra", "the database is away", hint="start it"))
    with pytest.raises(ServerFault) as caught:
        client.jobs.list()
    assert len(peer.requests) == QUICK.limit
    assert (caught.value.message, caught.value.hint, caught.value.code) == ("the database is away", "start it", "infra")
    assert (caught.value.status, caught.value.request_id) == (503, "req_1")
    assert isinstance(caught.value, errors.InfraError)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed(peer: Peer, client: Tunery, form: str):
    # A date has whole seconds: two of them are at least one.
    asked = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    peer.on("GET", "/jobs/job_1", problem(429, "rate_limited", retry_after=asked), says(a_job()))
    began = time.monotonic()
    client.jobs.get("job_1")
    assert time.monotonic() - began >= 0.9


def test_a_retry_after_beyond_patience_is_the_callers_to_wait(peer: Peer, client: Tunery):
    peer.on("GET", "/jobs/job_1", problem(429, "rate_limited", retry_after="3600"))
    with pytest.raises(RateLimited):
        client.jobs.get("job_1")
    assert len(peer.requests) == 1


def test_a_create_is_repeated_with_one_idempotency_key(peer: Peer, client: Tunery):
    peer.on("POST", "/jobs", hangs_up, problem(503, "infra"), says(a_job(), 201))
    client.jobs.create("base", "dataset:ds_1", suffix="bot", hyperparameters={"max_steps": 5})
    keys = {seen.headers["idempotency-key"] for seen in peer.requests}
    assert len(peer.requests) == 3 and len(keys) == 1
    assert peer.requests[0].body == peer.requests[2].body
    client.jobs.create("base", "dataset:ds_1")
    assert peer.requests[3].headers["idempotency-key"] not in keys


def test_what_must_not_happen_twice_is_not_sent_twice(peer: Peer, client: Tunery):
    peer.on("POST", "/keys", hangs_up)
    with pytest.raises(CannotConnect, match="broke"):
        client.keys.create("ci")
    peer.on("POST", "/jobs/job_1/retry", problem(502, "x"))
    with pytest.raises(ServerFault):
        client.jobs.retry("job_1")
    assert len(peer.requests) == 2


def test_a_removal_whose_answer_was_lost_is_done(peer: Peer, client: Tunery):
    peer.on("DELETE", "/jobs/job_1", hangs_up, problem(404, "not_found"))
    client.jobs.delete("job_1")
    with pytest.raises(Missing):
        client.jobs.delete("job_1")
    assert len(peer.requests) == 3


def test_but_what_the_server_refused_to_begin_is(peer: Peer, client: Tunery):
    peer.on("POST", "/jobs/job_1/retry", problem(503, "infra"), says(a_job(status="queued")))
    assert client.jobs.retry("job_1").status == "queued"


@pytest.mark.parametrize(
    ("status", "code", "kind", "also"),
    [
        (400, "invalid_input", RequestInvalid, errors.InvalidInput),
        (422, "invalid_input", RequestInvalid, errors.InvalidInput),
        (400, "wrong_state", StateConflict, errors.WrongState),
        (401, "unauthenticated", NotAuthenticated, errors.Unauthenticated),
        (404, "not_found", Missing, errors.NotFound),
        (413, "too_large", ApiError, errors.TooLarge),
        (418, "teapot", RequestInvalid, errors.UserError),
    ],
)
def test_problem_documents_become_the_servers_own_errors(peer: Peer, client: Tunery, status, code, kind, also):
    peer.on("POST", "/jobs/job_1/cancel", problem(status, code, "lora.r: too big", param="lora.r", hint="less"))
    with pytest.raises(kind) as caught:
        client.jobs.cancel("job_1")
    assert isinstance(caught.value, also)
    assert (caught.value.param, caught.value.hint, caught.value.code) == ("lora.r", "less", code)
    assert len(peer.requests) == 1


def test_an_error_page_that_is_no_problem_document_still_says_the_status(peer: Peer, client: Tunery):
    peer.on("GET", "/workers", raw(b"<html>Bad gateway</html>", 500))
    with pytest.raises(ServerFault, match="500") as caught:
        client.workers.list()
    assert caught.value.hint


def test_nobody_at_the_address():
    with Tunery("http://127.0.0.1:9", "k", retries=QUICK) as client, pytest.raises(CannotConnect) as caught:
        client.jobs.list()
    assert "http://127.0.0.1:9" in caught.value.message
    assert "tunery up" in caught.value.hint


@pytest.mark.parametrize("answer", [raw(b"hello"), says([1, 2]), says({"id": "job_1"})])
def test_a_stranger_at_the_address(peer: Peer, client: Tunery, answer):
    peer.on("GET", "/jobs/job_1", answer)
    with pytest.raises(UnexpectedAnswer):
        client.jobs.get("job_1")


def test_a_redirect_is_told_and_not_followed_with_the_key(peer: Peer, client: Tunery):
    peer.on("GET", "/jobs/job_1", raw(b"", 307, location="https://elsewhere.example/jobs/job_1"))
    with pytest.raises(UnexpectedAnswer, match="elsewhere"):
        client.jobs.get("job_1")


def test_a_newer_servers_answer_is_still_read(peer: Peer, client: Tunery):
    newer = a_job(
        status="merging",
        surprise={"a": 1},
        hyperparameters={"learning_rate": 1e-4, "optim": "muon", "new_option": True, "num_train_epochs": "many"},
        lora={"r": 8, "use_dora": True},
        error={"code": "x", "message": "y", "row": 7},
    )
    peer.on("GET", "/jobs", says({"data": [newer, a_job()], "has_more": True, "next": "job_0", "total": 2}))
    page = client.jobs.list()
    assert page.data[0].status == "merging"
    assert page.data[0].hyperparameters.optim == "muon"
    assert page.data[0].hyperparameters.learning_rate == 1e-4
    assert page.data[0].lora.r == 8
    assert page.data[0].error is not None and page.data[0].error.message == "y"
    assert page.data[1].hyperparameters.optim == "paged_adamw_8bit"
    assert (page.has_more, page.next, len(page)) == (True, "job_0", 2)


def test_filters_and_ids_are_written_so_that_they_stay_what_they_are(peer: Peer, client: Tunery):
    peer.on("GET", "/jobs", says({"data": [], "has_more": False, "next": None}))
    client.jobs.list(status="running", metadata={"team": "a&b"}, limit=5)
    assert peer.requests[0].query == {"status": ["running"], "metadata[team]": ["a&b"], "limit": ["5"]}
    with pytest.raises(Missing):
        client.jobs.get("../keys?x#y")
    assert peer.requests[1].path == "/jobs/..%2Fkeys%3Fx%23y"
    for not_an_id in ("", "..", " "):
        with pytest.raises(errors.InvalidInput, match="is not an id"):
            client.jobs.delete(not_an_id)
    with pytest.raises(errors.InvalidInput, match=r"examples/rows\.jsonl is no uploaded dataset") as caught:
        client.datasets.preview("examples/rows.jsonl", "base")
    assert "tunery datasets upload" in (caught.value.hint or "")
    assert len(peer.requests) == 2


def test_pauses_grow_and_are_bounded():
    retries = Retries(first_s=1, longest_s=8)
    for attempt, most in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (5000, 8)]:
        assert 0.7 * most <= retries.pause_s(attempt) <= most


def test_an_export_is_asked_for_again_since_it_is_made_once(peer: Peer, client: Tunery):
    peer.on("POST", "/jobs/job_1/export", hangs_up, says(a_job(id="job_2", source_job="job_1"), 201))
    assert client.jobs.export("job_1", priority=3).source_job == "job_1"
    assert json.loads(peer.asked("POST", "/jobs/job_1/export")[1].body) == {"export": ["merged"], "priority": 3}
