"""Each embedded server starts, answers, and keeps its data through kill -9 and a restart."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import boto3
import psycopg
import pytest
import redis
from botocore.exceptions import ClientError
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from common.embedded.children import Child, Children
from common.embedded.ports import free_ports, is_free
from common.embedded.seaweedfs import PORTS, SeaweedFS
from common.embedded.valkey import Valkey
from tests.servers import S3

_ENVIRONMENT = {"PATH": os.environ["PATH"]}


@pytest.fixture
def own_children() -> Iterator[Children]:
    children = Children(say=print)
    yield children
    children.stop()


def _kill(children: Children, name: str) -> None:
    """SIGKILL the child and wait until it is gone, so that its ports and sockets are free."""
    pid = children.pids()[name]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_valkey_keeps_its_data_through_a_kill(server_dir: Path, own_children: Children) -> None:
    server = Valkey(server_dir / "a folder with spaces", server_dir / "own.sock")
    child = Child("valkey", server.argv(), _ENVIRONMENT, server_dir / "own-valkey.log")
    own_children.start(child, server.is_ready)
    client = redis.Redis(unix_socket_path=str(server.socket_path))
    client.rpush("queue", "bell")
    _kill(own_children, "valkey")
    assert not server.is_ready()
    own_children.start(child, server.is_ready)
    assert client.lrange("queue", 0, -1) == [b"bell"]
    client.close()


def test_valkey_listens_on_its_socket_alone(server_dir: Path, own_children: Children) -> None:
    server = Valkey(server_dir / "alone", server_dir / "alone.sock")
    own_children.start(Child("valkey", server.argv(), _ENVIRONMENT, server_dir / "alone.log"), server.is_ready)
    assert server.socket_path.stat().st_mode & 0o077 == 0
    assert _listening_ports(own_children.pids()["valkey"]) == set()


def test_seaweedfs_keeps_objects_through_a_kill_and_on_other_ports(server_dir: Path, own_children: Children) -> None:
    def start() -> SeaweedFS:
        server = SeaweedFS(server_dir / "own-s3", server_dir, tuple(free_ports(PORTS)), "access", "secret-secret")
        child = Child("s3", server.argv(), server.environment(_ENVIRONMENT), server_dir / "own-s3.log")
        own_children.start(child, server.is_ready)
        return server

    body = os.urandom(6 * 2**20)
    first = start()
    client = _s3_client(first.endpoint_url, "access", "secret-secret")
    client.create_bucket(Bucket="kept")
    client.put_object(Bucket="kept", Key="a/b", Body=body)
    _kill(own_children, "s3")
    second = start()
    client = _s3_client(second.endpoint_url, "access", "secret-secret")
    assert client.get_object(Bucket="kept", Key="a/b")["Body"].read() == body
    for server in (first, second):
        server.remove_sockets()


def test_seaweedfs_refuses_who_has_no_key(s3) -> None:
    bucket = s3.new_bucket()
    _s3_client(s3.endpoint_url, s3.access_key_id, s3.secret_access_key).put_object(Bucket=bucket, Key="x", Body=b"1")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        _s3_client(s3.endpoint_url, s3.access_key_id, "wrong").get_object(Bucket=bucket, Key="x")
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        _s3_client(s3.endpoint_url, "wrong", "wrong").list_buckets()


def test_seaweedfs_is_not_reachable_from_outside(s3, children: Children) -> None:
    for port in s3.server.ports:
        assert is_free("127.0.0.2", port), f"something listens on port {port} beyond 127.0.0.1"
    assert _listening_ports(children.pids()["seaweedfs"]) <= set(s3.server.ports)


def test_postgres_databases_are_fresh(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE only_here (id int)"))
        assert connection.scalar(text("SELECT count(*) FROM pg_tables WHERE tablename = 'only_here'")) == 1
    engine.dispose()


def test_postgres_keeps_rows_through_a_kill(postgres_url: str, children: Children) -> None:
    plain = make_url(postgres_url).set(drivername="postgresql").render_as_string()
    with psycopg.connect(plain) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
    _kill(children, "postgres")
    while children.pids().get("postgres") is None:
        children.revive()
    row = _first_answer(plain, "SELECT value FROM kept")
    assert row == (7,)


def _first_answer(url: str, query: str) -> tuple[object, ...] | None:
    while True:  # bounded by the test's own time limit
        try:
            with psycopg.connect(url) as connection:
                return connection.execute(query).fetchone()
        except psycopg.OperationalError:
            continue


def _s3_client(endpoint_url: str, key: str, secret: str):
    return boto3.client(
        "s3", endpoint_url=endpoint_url, aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1"
    )


def _listening_ports(pid: int) -> set[int]:
    """TCP ports that process `pid` listens on, from /proc."""
    inodes = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
                ports.add(int(columns[1].rsplit(":", 1)[1], 16))
    return ports


def test_seaweedfs_takes_many_buckets(s3: S3):
    client = s3.client()
    for _ in range(100):
        bucket = s3.new_bucket()
        client.put_object(Bucket=bucket, Key="a", Body=b"x")
