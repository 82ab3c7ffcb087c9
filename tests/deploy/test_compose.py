"""docker-compose.yml, as Compose itself reads it: its settings exist, its commands run, its order holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from common.embedded.children import Child, Children
from common.embedded.ports import free_ports
from common.embedded.seaweedfs import PORTS, SeaweedFS
from common.embedded.valkey import Valkey
from common.settings import PREFIX, Settings
from tests.deploy.commands import SERVER_ONLY, answers_help

_ROOT = Path(__file__).parents[2]
_COMPOSE = Path(sys.executable).with_name("docker-compose")
_SECRETS = {
    "POSTGRES_PASSWORD": "pg-secret",
    "BROKER_PASSWORD": "broker-secret",
    "S3_ACCESS_KEY_ID": "s3-key",
    "S3_SECRET_ACCESS_KEY": "s3-secret",
}
_OURS = ("migrate", "api", "preflight", "sweeper", "worker", "serve")


def _config(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(_COMPOSE), "-f", "docker-compose.yml", "--profile", "serve", "config", *arguments]
    # An env file of our own: a developer's .env must not decide what the tests see.
    values = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COMPOSE_ENV_FILES": os.devnull, **environment}
    return subprocess.run(command, cwd=_ROOT, env=values, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = _config("--format", "json", **_SECRETS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def test_compose_accepts_the_file_without_a_warning() -> None:
    done = _config("-q", **_SECRETS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", _SECRETS)
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_credential_is_refused_by_name(name: str, value: str | None) -> None:
    given = {key: secret for key, secret in _SECRETS.items() if key != name}
    done = _config("-q", **(given if value is None else given | {name: value}))
    assert done.returncode != 0
    assert name in done.stderr
    assert "set it in .env" in done.stderr


def test_the_example_names_every_variable_and_no_other() -> None:
    done = _config("--variables", **_SECRETS)
    assert done.returncode == 0, done.stderr
    used = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    lines = (_ROOT / "deploy" / "env.example").read_text().splitlines()
    named = {line.lstrip("#").partition("=")[0] for line in lines if "=" in line and " " not in line}
    assert named == used


def test_every_setting_exists(services: dict[str, Any]) -> None:
    for name in _OURS:
        for variable in services[name]["environment"]:
            field = variable.removeprefix(PREFIX).lower()
            assert variable.startswith(PREFIX), f"{name}: {variable} is none of our settings"
            assert field in Settings.model_fields, f"{name}: {variable} is no field of common.settings.Settings"


def test_the_settings_are_valid_values(services: dict[str, Any]) -> None:
    for name in _OURS:
        values = {key.removeprefix(PREFIX).lower(): value for key, value in services[name]["environment"].items()}
        settings = Settings(**values)
        assert settings.database_url.startswith("postgresql+psycopg://")
        assert "broker-secret" in settings.broker_url.get_secret_value()


@pytest.mark.parametrize("name", _OURS)
def test_its_command_runs_with_what_its_image_installs(services: dict[str, Any], name: str) -> None:
    service = services[name]
    blocked = SERVER_ONLY if service["image"] == "tunery-api" else ()
    answers_help(service["command"], blocked)


def test_secrets_reach_only_those_that_use_them(services: dict[str, Any]) -> None:
    fetching = {name for name, service in services.items() if f"{PREFIX}HF_TOKEN" in service.get("environment", {})}
    assert fetching == {"preflight", "worker", "serve"}


def test_everything_waits_for_what_it_needs(services: dict[str, Any]) -> None:
    conditions = {
        name: {other: wait["condition"] for other, wait in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    healthy = "service_healthy"
    assert conditions["migrate"] == {"postgres": healthy, "redis": healthy, "s3": healthy}
    migrated = {"migrate": "service_completed_successfully", "redis": healthy, "s3": healthy}
    for name in ("api", "preflight", "sweeper", "worker", "serve"):
        assert conditions[name] == migrated
    for name in ("postgres", "redis", "s3", "api"):
        assert "healthcheck" in services[name], f"others wait for {name}, which says nothing of its health"


def test_the_worker_reserves_gpus_and_has_time_to_give_a_job_back(services: dict[str, Any]) -> None:
    worker = services["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", -1, ["gpu"])
    assert worker["stop_grace_period"] == "2m0s"
    assert float(worker["environment"]["TUNERY_STOP_GRACE_S"]) + 30 <= 120


def test_serving_is_optional_and_takes_one_card(services: dict[str, Any]) -> None:
    assert services["serve"]["profiles"] == ["serve"]
    (device,) = services["serve"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["0"]


def test_only_what_clients_reach_is_published_and_on_loopback(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert set(published) == {"api", "s3", "serve"}
    assert all(port["host_ip"] == "127.0.0.1" for ports in published.values() for port in ports)


def test_the_processes_of_ours_have_no_privileges(services: dict[str, Any]) -> None:
    for name in _OURS:
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.fixture
def own_children() -> Iterator[Children]:
    children = Children(say=print)
    yield children
    children.stop()


def test_the_store_starts_with_the_flags_of_the_file(
    services: dict[str, Any], server_dir: Path, own_children: Children
) -> None:
    """The same version of the same program, with other ports: one machine may run several."""
    service = services["s3"]
    probe = SeaweedFS(server_dir / "compose", server_dir, tuple(free_ports(PORTS)), "s3-key", "s3-secret")
    program = probe.argv()[0]
    assert service["image"].endswith(_version(program))
    flags = [flag.replace("-dir=/data", f"-dir={server_dir / 'compose'}") for flag in service["command"]]
    flags = [flag for flag in flags if flag != "-s3.port=8333"]
    places = (".port=", ".port.grpc=", ".localSocket=")
    ports = [flag for flag in probe.argv() if any(place in flag for place in places)]
    entrypoint = [program, *service["entrypoint"][1:]]
    environment = {"PATH": os.environ["PATH"], **service["environment"]}
    child = Child("s3", (*entrypoint, *flags, *ports), environment, server_dir / "compose-s3.log", grace_s=2)
    own_children.start(child, probe.is_ready)
    probe.remove_sockets()


def _version(program: str) -> str:
    words = subprocess.run([program, "version"], capture_output=True, text=True, check=True).stdout.split()
    return f":{words[2]}"


def test_the_broker_wants_its_password(services: dict[str, Any], server_dir: Path, own_children: Children) -> None:
    service = services["redis"]
    assert service["command"][0] == "valkey-server"
    server = Valkey(server_dir / "compose-valkey", server_dir / "compose.sock")
    program, *place = server.argv()
    flags = [*service["command"][1:], *place[: place.index("--appendonly")]]
    child = Child("redis", (program, *flags), {"PATH": os.environ["PATH"]}, server_dir / "compose-valkey.log")
    own_children.start(child, server.socket_path.exists)
    refused = redis.Redis(unix_socket_path=str(server.socket_path))
    with pytest.raises(redis.AuthenticationError):
        refused.ping()
    refused.close()
    password = service["environment"]["REDISCLI_AUTH"]
    client = redis.Redis(unix_socket_path=str(server.socket_path), password=password)
    assert client.ping()
    client.close()
