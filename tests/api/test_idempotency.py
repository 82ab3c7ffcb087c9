"""`Idempotency-Key`: what happens at once, what was refused, and what is forgotten."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
from sqlalchemy import update

from common.db.rows import IdempotencyRow
from common.jobs import idempotency
from common.keys import Caller
from common.schemas.jobs import JobSpec
from tests.api.conftest import SPEC, Api
from worker.sweeper import IDEMPOTENCY_S, Sweeper


def create(client: httpx2.Client, key: str = "k", **changes: object) -> httpx2.Response:
    return client.post("/jobs", json={**SPEC, **changes}, headers={"idempotency-key": key})


def test_at_once_with_other_bodies_one_wins(any_api: Api) -> None:
    barrier = threading.Barrier(6)

    def send(seed: int) -> httpx2.Response:
        with any_api.client() as client:
            barrier.wait()
            return create(client, seed=seed)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, range(6)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 5
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"idempotency_key_reused"}
    with any_api.client() as client:
        assert len(client.get("/jobs").json()["data"]) == 1


def test_whoever_comes_while_the_first_is_made_waits_for_its_answer(any_api: Api) -> None:
    spec = JobSpec.model_validate(SPEC)
    with any_api.client() as client:
        first = create(client, "other").json()["id"]
        made = idempotency.Create(Caller("key", "default", False), spec, "k", 0)
        with ThreadPoolExecutor(1) as pool:
            with any_api.context.write() as session:
                assert idempotency.answered(session, made) is None
                second = pool.submit(create, client)
                threading.Event().wait(1)
                assert not second.done()
                idempotency.remember(session, made, first)
            answer = second.result(30)
        assert (answer.status_code, answer.json()["id"]) == (201, first)
        assert answer.headers["idempotent-replayed"] == "true"


def test_a_refused_create_leaves_its_key_free(any_api: Api) -> None:
    with any_api.client() as client:
        assert create(client, model="no-such-base").status_code == 400
        assert create(client, dataset="dataset:ds_absent").status_code == 400
        made = create(client)
        assert made.status_code == 201 and "idempotent-replayed" not in made.headers


def test_the_first_answer_is_given_again_whatever_became_of_the_job(any_api: Api) -> None:
    with any_api.client() as client:
        first = create(client).json()["id"]
        client.post(f"/jobs/{first}/cancel")
        again = create(client)
        assert (again.status_code, again.json()["id"], again.json()["status"]) == (201, first, "cancelled")


def test_keys_are_forgotten_after_a_day(any_api: Api) -> None:
    with any_api.client() as client:
        first = create(client).json()["id"]
        age(any_api, IDEMPOTENCY_S - 60)
        Sweeper(any_api.context).sweep()
        assert create(client).json()["id"] == first
        age(any_api, 120)
        Sweeper(any_api.context).sweep()
        other = create(client, seed=7)
        assert other.status_code == 201 and other.json()["id"] != first


def age(api: Api, seconds: float) -> None:
    with api.context.write() as session:
        session.execute(update(IdempotencyRow).values(created_at=IdempotencyRow.created_at - seconds))
