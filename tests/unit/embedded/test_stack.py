"""What the embedded stack hands to the service, and what it keeps between runs."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from common.embedded.ports import free_ports, is_free
from common.embedded.stack import Stack
from common.embedded.valkey import SOCKET_PATH_BYTES
from common.errors import InfraError
from common.settings import Settings

_EMBEDDED = {
    "TUNERY_BROKER_URL",
    "TUNERY_DATABASE_URL",
    "TUNERY_DATA_DIR",
    "TUNERY_MODEL_DIR",
    "TUNERY_S3_ACCESS_KEY_ID",
    "TUNERY_S3_ENDPOINT_URL",
    "TUNERY_S3_SECRET_ACCESS_KEY",
    "TUNERY_WORK_DIR",
}


def _names(stack: Stack) -> list[str]:
    return [server.child.name for server in stack.servers()]


def test_with_nothing_set_everything_is_embedded(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "data", Settings())
    assert _names(stack) == ["valkey", "seaweedfs"]
    environment = stack.environment()
    assert set(environment) == _EMBEDDED
    assert environment["TUNERY_DATABASE_URL"] == f"sqlite:///{tmp_path}/data/tunery.db"
    assert environment["TUNERY_MODEL_DIR"] == str(tmp_path / "data" / "models")
    stack.remove_sockets()


@pytest.mark.parametrize(
    ("given", "servers", "absent"),
    [
        ({"database_url": "postgresql+psycopg://h/d"}, ["valkey", "seaweedfs"], {"TUNERY_DATABASE_URL"}),
        ({"broker_url": "redis://h/0"}, ["seaweedfs"], {"TUNERY_BROKER_URL"}),
        (
            {"s3_endpoint_url": "http://h:9000"},
            ["valkey"],
            {"TUNERY_S3_ENDPOINT_URL", "TUNERY_S3_ACCESS_KEY_ID", "TUNERY_S3_SECRET_ACCESS_KEY"},
        ),
        (
            {"s3_bucket": "on-aws"},
            ["valkey"],
            {"TUNERY_S3_ENDPOINT_URL", "TUNERY_S3_ACCESS_KEY_ID", "TUNERY_S3_SECRET_ACCESS_KEY"},
        ),
        ({"model_dir": "/models"}, ["valkey", "seaweedfs"], {"TUNERY_MODEL_DIR"}),
    ],
)
def test_a_part_that_has_an_address_is_left_alone(tmp_path: Path, given, servers, absent) -> None:
    stack = Stack(tmp_path / "data", Settings(**given))
    assert _names(stack) == servers
    assert set(stack.environment()) == _EMBEDDED - absent
    stack.remove_sockets()


def test_empty_settings_count_as_unset(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "data", Settings(database_url="", broker_url="", s3_endpoint_url="", s3_access_key_id=""))
    assert set(stack.environment()) == _EMBEDDED
    stack.remove_sockets()


def test_credentials_are_generated_once_and_readable_by_the_owner_alone(tmp_path: Path) -> None:
    first = Stack(tmp_path, Settings()).environment()
    second = Stack(tmp_path, Settings())
    assert second.environment() == first
    other = Stack(tmp_path / "other", Settings())
    assert other.environment()["TUNERY_S3_SECRET_ACCESS_KEY"] != first["TUNERY_S3_SECRET_ACCESS_KEY"]
    assert (tmp_path / "stack.json").stat().st_mode & 0o777 == 0o600
    second.remove_sockets()
    other.remove_sockets()


def test_the_secret_is_in_no_argument_list(tmp_path: Path) -> None:
    stack = Stack(tmp_path, Settings())
    secret = stack.environment()["TUNERY_S3_SECRET_ACCESS_KEY"]
    assert not any(secret in argument for server in stack.servers() for argument in server.child.argv)
    stack.remove_sockets()


def test_ports_that_are_in_use_are_replaced(tmp_path: Path) -> None:
    Stack(tmp_path, Settings())
    kept = json.loads((tmp_path / "stack.json").read_text())
    with socket.create_server(("127.0.0.1", kept["s3_ports"][3])):
        stack = Stack(tmp_path, Settings())
    changed = json.loads((tmp_path / "stack.json").read_text())
    assert not set(changed["s3_ports"]) & {kept["s3_ports"][3]}
    assert changed["s3_secret_access_key"] == kept["s3_secret_access_key"]
    stack.remove_sockets()


def test_a_long_temporary_directory_still_gives_a_short_socket_path(tmp_path: Path, monkeypatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    stack = Stack(tmp_path / "data", Settings())
    path = stack.environment()["TUNERY_BROKER_URL"].removeprefix("redis+socket://").partition("?")[0]
    assert len(os.fsencode(path)) < SOCKET_PATH_BYTES
    stack.remove_sockets()


def test_a_socket_folder_that_others_can_enter_is_refused(tmp_path: Path, server_dir: Path, monkeypatch) -> None:
    # Not tmp_path, which may be too long for sockets.
    monkeypatch.setattr("tempfile.tempdir", str(server_dir))
    Stack(tmp_path / "data", Settings())
    (folder,) = server_dir.glob(f"tunery-{os.geteuid()}-*")
    folder.chmod(0o755)
    with pytest.raises(InfraError, match="is not a folder of this user alone"):
        Stack(tmp_path / "data", Settings())


def test_a_data_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfraError, match=r"cannot use the data directory .*file"):
        Stack(tmp_path / "file", Settings())


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(is_free("127.0.0.1", port) for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert not is_free("127.0.0.1", ports[0])
    with pytest.raises(OSError, match="assign requested address"):
        is_free("192.0.2.1", 80)
