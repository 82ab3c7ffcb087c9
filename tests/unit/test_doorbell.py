"""A worker comes back soon after its broker, however long that was away."""

from __future__ import annotations

import pytest
from kombu.exceptions import OperationalError

from common.jobs.doorbell import RETRY_S, celery_app
from common.settings import Settings


def test_the_connection_is_tried_again_within_seconds_after_a_long_outage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: None)
    settings = Settings.model_validate({"broker_url": "redis://127.0.0.1:1/0"})
    pauses: list[float] = []
    with celery_app(settings) as app, app.connection_for_read() as connection, pytest.raises(OperationalError):
        connection.ensure_connection(lambda error, interval: pauses.append(interval), 40)
    assert len(pauses) >= 40 and max(pauses) <= RETRY_S
