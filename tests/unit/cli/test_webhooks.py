"""Webhooks and their deliveries."""

from __future__ import annotations

import json

from tests.unit.client.peer import Peer, raw, says

WEBHOOK = {
    "id": "wh_1",
    "url": "https://example.com/hook",
    "description": "",
    "events": ["job.failed"],
    "enabled": True,
    "disabled_reason": None,
    "created_at": "2026-11-01T10:00:00Z",
    "last_success_at": None,
}
DELIVERY = {
    "id": "msg_1",
    "type": "job.failed",
    "job": "job_1",
    "state": "pending",
    "attempts": 2,
    "response_status": 500,
    "error": "the receiver answered 500",
    "created_at": "2026-11-01T10:00:00Z",
    "next_attempt_at": "2026-11-01T10:05:00Z",
    "ended_at": None,
    "payload": {"type": "job.failed"},
}


def test_webhooks(peer: Peer, tunery):
    peer.on("POST", "/webhooks", says(WEBHOOK | {"secret": "whsec_new"}, 201))
    peer.on("GET", "/webhooks", says({"data": [WEBHOOK]}))
    peer.on("PATCH", "/webhooks/wh_1", says(WEBHOOK | {"enabled": False, "disabled_reason": "switched off"}))
    peer.on("POST", "/webhooks/wh_1/rotate", says(WEBHOOK | {"secret": "whsec_next"}))
    peer.on("DELETE", "/webhooks/wh_1", raw(b"", 204))
    made = tunery("webhooks", "create", "https://example.com/hook", "-e", "job.failed")
    assert "whsec_new" in made.stdout and "not shown again" in made.stderr
    sent = {"url": "https://example.com/hook", "events": ["job.failed"], "description": ""}
    assert json.loads(peer.requests[0].body) == sent
    assert "job.failed" in tunery("webhooks", "list").stdout
    off = tunery("webhooks", "change", "wh_1", "--disable", "--all-events")
    assert off.stdout == "wh_1: disabled: switched off\n"
    assert json.loads(peer.asked("PATCH", "/webhooks/wh_1")[0].body) == {"enabled": False, "events": None}
    assert "whsec_next" in tunery("webhooks", "rotate", "wh_1", "--leaked").stdout
    assert peer.asked("POST", "/webhooks/wh_1/rotate")[0].query == {"overlap_s": ["0"]}
    assert tunery("webhooks", "rm", "wh_1").stdout == "removed: wh_1\n"


def test_deliveries_of_webhooks(peer: Peer, tunery):
    peer.on("POST", "/webhooks/wh_1/ping", says(DELIVERY, 202))
    peer.on("GET", "/webhooks/wh_1/deliveries", says({"data": [DELIVERY], "has_more": True, "next": "msg_1"}))
    peer.on("POST", "/webhooks/wh_1/deliveries/msg_1/redeliver", says(DELIVERY, 202))
    assert tunery("webhooks", "ping", "wh_1").stdout == "msg_1: pending\n"
    listed = tunery("webhooks", "deliveries", "wh_1", "--state", "pending", "-n", "1")
    assert "the receiver answered 500" in listed.stdout and "--after msg_1" in listed.stderr
    assert peer.asked("GET", "/webhooks/wh_1/deliveries")[0].query == {"state": ["pending"], "limit": ["1"]}
    again = json.loads(tunery("webhooks", "redeliver", "wh_1", "msg_1", "-o", "json").stdout)
    assert again["payload"] == {"type": "job.failed"}
