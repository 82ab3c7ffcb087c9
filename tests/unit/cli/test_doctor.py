"""The doctor against real parts, and against broken ones."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

import migrations
from common import settings
from common.cli.checks import machine, parts, server
from common.cli.checks.finding import Finding
from tests.servers import S3
from tests.unit.client.peer import Peer, problem, raw, says


@pytest.fixture(autouse=True)
def _fresh_settings():
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_parts_that_work(sqlite_url: str, valkey_url: str, s3: S3):
    found = parts.look_at_parts(
        settings.Settings(
            database_url=sqlite_url,
            broker_url=valkey_url,
            s3_endpoint_url=s3.endpoint_url,
            s3_bucket=s3.new_bucket(),
            s3_access_key_id=s3.access_key_id,
            s3_secret_access_key=s3.secret_access_key,
        )
    )
    assert [(finding.check, finding.verdict) for finding in found] == [
        ("database", "ok"),
        ("broker", "ok"),
        ("object store", "ok"),
    ]
    assert migrations.newest() in found[0].detail
    assert "wrote, read and removed" in found[2].detail


def test_a_postgres_that_was_never_migrated(empty_postgres_url: str):
    (found,) = parts.look_at_parts(settings.Settings(database_url=empty_postgres_url))
    assert found.verdict == "fail"
    assert "none" in found.detail and "python -m migrations" in str(found.hint)


def test_parts_that_are_away(s3: S3, tmp_path: Path):
    away = settings.Settings(
        database_url="postgresql+psycopg://x@127.0.0.1:9/x",
        broker_url="redis://127.0.0.1:9/0",
        s3_endpoint_url=s3.endpoint_url,
        s3_bucket="absent-bucket",
        s3_access_key_id=s3.access_key_id,
        s3_secret_access_key="wrong",
    )
    found = parts.look_at_parts(away)
    assert [finding.verdict for finding in found] == ["fail", "fail", "fail"]
    for finding, name in zip(found, ("TUNERY_DATABASE_URL", "TUNERY_BROKER_URL", "TUNERY_S3_BUCKET"), strict=True):
        assert finding.detail and name in str(finding.hint)


def test_what_is_not_set_is_not_looked_at():
    assert parts.look_at_parts(settings.Settings()) == []


def test_this_machine(tmp_path: Path):
    found = by_name(machine.look_at_machine(tmp_path / "not" / "there"))
    assert found["python"].verdict == "ok"
    assert found["packages: server"].verdict == "ok" and "sqlalchemy" in found["packages: server"].detail
    assert found["disk"].verdict in ("ok", "warn") and str(tmp_path) in found["disk"].detail
    assert found["gpu"].verdict in ("ok", "warn")


READY = {"ready": True, "checks": {"database": {"ok": True, "detail": None}}, "warnings": []}


def healthy(peer: Peer) -> None:
    peer.on("GET", "/livez", says({"status": "ok"}))
    peer.on("GET", "/readyz", says(READY))
    peer.on("GET", "/jobs", says({"data": [], "has_more": False, "next": None}))


def test_a_healthy_server(peer: Peer, tunery):
    healthy(peer)
    done = tunery("doctor")
    assert done.exit_code == 0, done.output
    for line in (f"ok    server: {peer.url}", "ok    ready: database ok", "ok    clock: in step", "ok    api key:"):
        assert line in done.stdout
    document = json.loads(tunery("doctor", "-o", "json").stdout)
    assert {item["verdict"] for item in document["data"]} <= {"ok", "warn"}


def test_a_server_that_is_not_ready_and_does_not_know_the_key(peer: Peer, tunery):
    healthy(peer)
    peer.script[("GET", "/readyz")].clear()
    broken = {"ready": False, "checks": {"database": {"ok": False, "detail": "refused"}}, "warnings": []}
    peer.on("GET", "/readyz", says(broken, 503), says({**READY, "warnings": ["no worker trains"]}), raw(b"<html>"))
    peer.script[("GET", "/jobs")].clear()
    peer.on("GET", "/jobs", problem(401, "unauthenticated", "the key is not known"))
    done = tunery("doctor")
    assert done.exit_code == 1
    assert "fail  ready: database: refused" in done.stdout and "→ mend the part" in done.stdout
    assert "fail  api key: the key is not known" in done.stdout
    assert "warn  ready: no worker trains" in tunery("doctor").stdout
    assert "fail  ready: /readyz answered 200 and no report" in tunery("doctor").stdout


def test_nobody_and_a_stranger_at_the_address(peer: Peer, tunery, monkeypatch: pytest.MonkeyPatch):
    done = tunery("doctor")
    assert done.exit_code == 1 and "/livez answered 404" in done.stdout
    monkeypatch.setenv("TUNERY_URL", "http://127.0.0.1:9")
    done = tunery("doctor")
    assert done.exit_code == 1 and "no server answers at http://127.0.0.1:9" in done.stdout
    monkeypatch.delenv("TUNERY_URL")
    assert "tunery up" in tunery("doctor").stdout


@pytest.mark.parametrize(("skew_s", "verdict"), [(0, "ok"), (10, "ok"), (60, "warn"), (-60, "warn"), (3600, "fail")])
def test_the_clock(peer: Peer, skew_s: int, verdict: str):
    import httpx2

    date = format_datetime(datetime.now(UTC) - timedelta(seconds=skew_s), usegmt=True)

    def answer(exchange):
        exchange.date_time_string = lambda *_: date
        exchange.reply(200, b"")

    peer.on("GET", "/livez", answer)
    found = server._clock(httpx2.get(f"{peer.url}/livez"))
    assert found.verdict == verdict
    assert skew_s == 0 or ("ahead" if skew_s > 0 else "behind") in found.detail


def test_a_server_without_a_date(peer: Peer):
    import httpx2

    assert server._clock(httpx2.Response(200)).verdict == "warn"
