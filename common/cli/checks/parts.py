"""The parts behind a server, where this machine has their settings: database, broker, object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli.checks.finding import Finding, guarded
from common.client.address import environment_of_up
from common.settings import PREFIX

if TYPE_CHECKING:
    from common.settings import Settings

_CONNECT_S = 5


def left_by_up(data_dir: Path) -> dict[str, Any]:
    """Return the settings of the parts that a running `tunery up` started, by name; none where none runs."""
    return {name.removeprefix(PREFIX).lower(): value for name, value in environment_of_up(data_dir).items()}


def look_at_parts(settings: Settings) -> list[Finding]:
    """Return what there is to say about the parts; those without a setting are left out."""
    findings = []
    if settings.database_url:
        hint = "check TUNERY_DATABASE_URL, and that the database runs"
        findings.append(guarded("database", hint, lambda: _database(settings)))
    if settings.broker_url.get_secret_value():
        hint = "check TUNERY_BROKER_URL, and that the broker runs"
        findings.append(guarded("broker", hint, lambda: _broker(settings)))
    if settings.s3_endpoint_url or settings.s3_access_key_id:
        hint = "check TUNERY_S3_ENDPOINT_URL, its credentials, and that they may write to TUNERY_S3_BUCKET"
        findings.append(guarded("object store", hint, lambda: _store(settings)))
    return findings


def _database(settings: Settings) -> Finding:
    import migrations
    from common.db.engine import make_engine

    engine = make_engine(settings.database_url)
    try:
        current, newest = migrations.present(engine), migrations.newest()
    finally:
        engine.dispose()
    kind = engine.dialect.name
    if current != newest:
        detail = f"{kind} is at revision {current or 'none'}, this version wants {newest}"
        return Finding("database", "fail", detail, "run `python -m migrations` with the server's settings")
    return Finding("database", "ok", f"{kind}, revision {current}")


def _broker(settings: Settings) -> Finding:
    from common.jobs.doorbell import celery_app

    app = celery_app(settings)
    try:
        connection: Any = app.connection_for_write(connect_timeout=_CONNECT_S)
        with connection:
            # A round trip and not only a connect: a frozen server still accepts connections.
            connection.ensure_connection(max_retries=1, timeout=_CONNECT_S)
            with connection.channel():
                pass
            return Finding("broker", "ok", f"{connection.transport_cls}: answers")
    finally:
        app.close()


def _store(settings: Settings) -> Finding:
    from common.storage.store import Store

    store = Store(settings)
    key, body = f"doctor/{os.urandom(8).hex()}", os.urandom(1024)
    store.put_bytes(key, body, content_type="application/octet-stream")
    try:
        whole = store.get_bytes(key) == body
    finally:
        store.delete([key])
    where = f"bucket {settings.s3_bucket} at {settings.s3_endpoint_url or 'AWS'}"
    if not whole:
        return Finding("object store", "fail", f"{where} gave back other bytes than it got", "do not use this store")
    return Finding("object store", "ok", f"{where}: wrote, read and removed an object")
