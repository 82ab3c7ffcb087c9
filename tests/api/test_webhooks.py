"""Webhooks are made, changed, tried out and looked into; their secrets are shown once."""

from __future__ import annotations

from collections.abc import Callable

import httpx2
import pytest
from sqlalchemy import update
from standardwebhooks import Webhook

from common.db.rows import DeliveryRow
from common.webhooks import outbox, registry
from common.webhooks.outbox import Result
from tests.api.conftest import SPEC, Api

URL = "https://example.com/hook"


def create(client: httpx2.Client, **fields: object) -> dict:
    answer = client.post("/webhooks", json={"url": URL, **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_a_secret_is_shown_once(any_api: Api) -> None:
    with any_api.client() as client:
        made = create(client, description="our chat", events=["job.failed", "job.succeeded"])
        assert Webhook(made["secret"]) and made["secret"].startswith("whsec_")
        [listed] = client.get("/webhooks").json()["data"]
        assert listed == {name: value for name, value in made.items() if name != "secret"}
        assert client.get(f"/webhooks/{made['id']}").json() == listed
        rotated = client.post(f"/webhooks/{made['id']}/rotate").json()
        assert rotated["secret"] != made["secret"] and rotated["id"] == made["id"]
        changed = client.patch(f"/webhooks/{made['id']}", json={"events": None, "enabled": False}).json()
        assert (changed["events"], changed["enabled"], changed["disabled_reason"]) == (None, False, "switched off")
        assert client.patch(f"/webhooks/{made['id']}", json={"enabled": True}).json()["disabled_reason"] is None
        assert client.delete(f"/webhooks/{made['id']}").status_code == 204
        assert client.get(f"/webhooks/{made['id']}").status_code == 404


def test_a_leaked_secret_ends_at_once(api: Api, client: httpx2.Client) -> None:
    made = create(client)
    client.post(f"/webhooks/{made['id']}/ping")
    rotated = client.post(f"/webhooks/{made['id']}/rotate", params={"overlap_s": 0}).json()
    with api.context.write() as session:
        [due] = outbox.claim(session, 9, ())
    assert due.secrets == (rotated["secret"],)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://example.com/hook", "webhook_http"),
        ("https://127.0.0.1/hook", "private_address"),
        ("https://2130706433/hook", "private_address"),
        ("https://[::ffff:10.0.0.1]/hook", "private_address"),
        ("https://169.254.169.254/latest/meta-data", "private_address"),
        ("https://localhost/hook", "private_address"),
        ("http://93.184.215.14/hook", "webhook_http"),
        ("ftp://example.com/hook", "webhook_url"),
        ("https://user:word@example.com/hook", "webhook_url"),
        ("https:///hook", "webhook_url"),
        ("https://[::1", "webhook_url"),
        ("https://example.com:0/", "webhook_url"),
        ("https://example.com:99999/", "webhook_url"),
        ("https://exämple.com/hook", "webhook_url"),
        ("https://example.com/a b", "webhook_url"),
        ("not a url", "webhook_url"),
        ("", "invalid_input"),
    ],
)
def test_urls_that_may_not_be_called(client: httpx2.Client, url: str, code: str) -> None:
    answer = client.post("/webhooks", json={"url": url})
    assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (400, code, "url"), answer.text
    made = create(client)
    assert client.patch(f"/webhooks/{made['id']}", json={"url": url}).status_code == 400
    assert client.get(f"/webhooks/{made['id']}").json()["url"] == URL
    client.delete(f"/webhooks/{made['id']}")


def test_plain_http_is_for_the_operators_networks(start: Callable[..., Api], sqlite_url: str) -> None:
    api = start(sqlite_url, fetch_networks=["10.1.0.0/16"])
    with api.client() as client:
        assert client.post("/webhooks", json={"url": "http://10.1.2.3:9000/hook"}).status_code == 201
        assert client.post("/webhooks", json={"url": "http://10.2.2.3/hook"}).json()["code"] == "private_address"
        assert client.post("/webhooks", json={"url": "http://hooks.example/"}).json()["code"] == "webhook_http"


@pytest.mark.parametrize("body", [{}, {"url": None}, {"enabled": None}, {"events": []}, {"events": ["job.exploded"]}])
def test_changes_that_make_no_sense(client: httpx2.Client, body: dict) -> None:
    made = create(client)
    answer = client.patch(f"/webhooks/{made['id']}", json=body)
    assert answer.status_code == 400 and answer.json()["code"] == "invalid_input"


def test_there_is_a_most(client: httpx2.Client) -> None:
    for _ in range(registry.MOST):
        create(client)
    answer = client.post("/webhooks", json={"url": URL})
    assert answer.status_code == 409 and answer.json()["code"] == "too_many_webhooks"


def test_deliveries_are_seen_and_made_again(any_api: Api) -> None:
    with any_api.client() as client:
        hook = create(client)["id"]
        jobs = [client.post("/jobs", json=SPEC).json()["id"] for _ in range(3)]
        first = client.get(f"/webhooks/{hook}/deliveries", params={"limit": 2}).json()
        rest = client.get(f"/webhooks/{hook}/deliveries", params={"after": first["next"]}).json()
        found = first["data"] + rest["data"]
        assert [delivery["job"] for delivery in found] == jobs[::-1] and first["has_more"] and not rest["has_more"]
        assert found[0]["type"] == found[0]["payload"]["type"] == "job.validating"
        assert (found[0]["state"], found[0]["attempts"]) == ("pending", 0) and found[0]["next_attempt_at"]
        path = f"/webhooks/{hook}/deliveries/{found[0]['id']}"
        with any_api.context.write() as session:
            [due] = [due for due in outbox.claim(session, 9, ()) if due.id == found[0]["id"]]
        under_way = client.post(f"{path}/redeliver")
        assert under_way.status_code == 409 and under_way.json()["code"] == "delivery_under_way"
        with any_api.context.write() as session:
            assert outbox.settle(session, due, Result(200)) == "delivered"
        ended = client.get(path).json()
        assert (ended["state"], ended["response_status"], ended["next_attempt_at"]) == ("delivered", 200, None)
        assert client.get(f"/webhooks/{hook}").json()["last_success_at"]
        listed = client.get(f"/webhooks/{hook}/deliveries", params={"state": "delivered"}).json()["data"]
        assert [delivery["id"] for delivery in listed] == [due.id]
        assert client.post(f"{path}/redeliver").json()["state"] == "pending"
        with any_api.context.write() as session:
            [again] = outbox.claim(session, 9, ())
        assert (again.id, again.body) == (due.id, due.body)


def test_a_webhook_that_is_off_is_sent_nothing(client: httpx2.Client) -> None:
    hook = create(client)["id"]
    ping = client.post(f"/webhooks/{hook}/ping")
    assert ping.status_code == 202 and ping.json()["type"] == "webhook.ping" and ping.json()["job"] is None
    client.patch(f"/webhooks/{hook}", json={"enabled": False})
    assert client.get(f"/webhooks/{hook}/deliveries").json()["data"][0]["state"] == "failed"
    for path in (f"/webhooks/{hook}/ping", f"/webhooks/{hook}/deliveries/{ping.json()['id']}/redeliver"):
        refused = client.post(path)
        assert refused.status_code == 409 and refused.json()["code"] == "webhook_disabled"
    client.patch(f"/webhooks/{hook}", json={"enabled": True})
    assert client.post(f"/webhooks/{hook}/deliveries/{ping.json()['id']}/redeliver").status_code == 202


def test_the_deliveries_of_one_webhook_are_not_anothers(api: Api, client: httpx2.Client) -> None:
    one, other = create(client)["id"], create(client)["id"]
    ping = client.post(f"/webhooks/{one}/ping").json()["id"]
    assert client.get(f"/webhooks/{other}/deliveries/{ping}").status_code == 404
    assert client.post(f"/webhooks/{other}/deliveries/{ping}/redeliver").status_code == 404
    with api.context.write() as session:
        session.execute(update(DeliveryRow).values(state="delivered"))
    assert client.get(f"/webhooks/{one}/deliveries/{ping}").json()["state"] == "delivered"
