"""A whole installation for a test: a migrated database, a real broker and a real store, as one `Context`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common import context as contexts
from common.context import Context
from common.db.engine import Sessions, make_engine
from common.settings import Settings
from tests.servers import S3


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A database of each kind in turn, with every table and no row."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["sqlite", "postgres"])
def empty_database_url(request: pytest.FixtureRequest) -> str:
    """A database of each kind in turn, without tables."""
    return str(request.getfixturevalue(f"empty_{request.param}_url"))


@pytest.fixture
def sessions(database_url: str) -> Iterator[Sessions]:
    """Sessions over a database of each kind in turn."""
    engine = make_engine(database_url)
    yield Sessions(engine)
    engine.dispose()


@pytest.fixture
def make_settings(valkey_url: str, s3: S3, tmp_path: Path) -> Callable[..., Settings]:
    """Return settings of an installation with a bucket and a broker prefix of its own; changes by name."""

    def make(database_url: str, **changes: object) -> Settings:
        values = {
            "database_url": database_url,
            "broker_url": valkey_url,
            "broker_prefix": f"test-{uuid.uuid4().hex}",
            "s3_endpoint_url": s3.endpoint_url,
            "s3_access_key_id": s3.access_key_id,
            "s3_secret_access_key": s3.secret_access_key,
            "s3_bucket": s3.new_bucket(),
            "work_dir": tmp_path / "work",
            "model_dir": tmp_path / "models",
            "disk_reserve_bytes": 0,
            "device": "cpu",
        }
        return Settings.model_validate(values | changes)

    return make


@pytest.fixture
def installation(make_settings: Callable[..., Settings], sqlite_url: str) -> Iterator[Context]:
    """A migrated installation over SQLite."""
    made = contexts.build(make_settings(sqlite_url))
    yield made
    made.close()
