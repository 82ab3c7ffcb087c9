"""A worker comes back soon after its broker, however long that was away, and a bell leaves no connection behind."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError

from common.jobs.doorbell import RETRY_S, TRAIN, Doorbell, celery_app
from common.settings import Settings
from tests.processes import wait_until


def test_the_connection_is_tried_again_within_seconds_after_a_long_outage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: None)
    settings = Settings.model_validate({"broker_url": "redis://127.0.0.1:1/0"})
    pauses: list[float] = []
    with celery_app(settings) as app, app.connection_for_read() as connection, pytest.raises(OperationalError):
        connection.ensure_connection(lambda error, interval: pauses.append(interval), 40)
    assert len(pauses) >= 40 and max(pauses) <= RETRY_S


def sockets() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(str(descriptor.readlink()))
    return {link for link in found if link.startswith("socket:")}


def test_a_closed_bell_leaves_no_connection_to_the_broker(valkey_url: str):
    before = sockets()
    bell = Doorbell(Settings.model_validate({"broker_url": valkey_url, "broker_prefix": "test-closed-bell"}))
    bell.ring(TRAIN)
    wait_until(lambda: sockets() > before, 30, "the connection to the broker")
    bell.close()
    assert sockets() <= before


def test_a_closed_bell_leaves_another_of_its_process_alone(valkey_url: str):
    settings = Settings.model_validate({"broker_url": valkey_url, "broker_prefix": "test-two-bells"})
    first, second = Doorbell(settings), Doorbell(settings)
    first.ring(TRAIN)
    first.close()
    second.ring(TRAIN)
    second.close()
    with celery_app(settings) as app:
        assert app.control.purge() == 2
