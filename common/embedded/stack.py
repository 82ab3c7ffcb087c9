"""What `tunery up` keeps under its data directory, and the settings that point the service at it.

    DIR/up.lock       held while a `tunery up` runs here
    DIR/up.json       its address and process id, for the command line
    DIR/environment.json  the settings of its processes while it runs, mode 0600, for the doctor
    DIR/api-key       the first API key, mode 0600
    DIR/stack.json    generated credentials and ports, mode 0600
    DIR/tunery.db     the database      DIR/valkey/  the broker's file      DIR/s3/  the objects
    DIR/models/       base models       DIR/work/    running jobs           DIR/logs/

Each part is embedded for itself: one that has an address in the settings is left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from common.embedded.children import Child
from common.embedded.ports import free_ports, is_free
from common.embedded.seaweedfs import PORTS, SeaweedFS
from common.embedded.valkey import SOCKET_PATH_BYTES, Valkey
from common.errors import InfraError
from common.settings import PREFIX, Settings, child_environment

# Any of these says that the operator has an object store: AWS needs no endpoint.
_S3_SETTINGS = {"s3_endpoint_url", "s3_access_key_id", "s3_secret_access_key", "s3_bucket"}
_LONGEST_SOCKET_NAME = "filer.sock"


@dataclass(frozen=True)
class Server:
    """A server to start, and the question whether it is ready."""

    child: Child
    is_ready: Callable[[], bool]


@dataclass(frozen=True)
class _Secrets:
    """What is generated once and kept: data in the object store stays readable after a restart."""

    s3_access_key_id: str
    s3_secret_access_key: str
    s3_ports: tuple[int, ...]


class Stack:
    """The parts to embed for `settings`, with their data under `data_dir`; nothing is started here.

    Raises:
        InfraError: the data directory or the folder for sockets cannot be used.
    """

    def __init__(self, data_dir: Path, settings: Settings):
        self.data_dir = data_dir.absolute()
        self._settings = settings
        given = {name for name in settings.model_fields_set if getattr(settings, name) not in (None, "")}
        self._embeds_database = not settings.database_url
        self.embeds_models = settings.model_dir is None
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._runtime = _runtime_dir(self.data_dir)
        except OSError as error:
            raise InfraError(
                f"cannot use the data directory {self.data_dir}: {error.strerror}",
                hint="choose another one with --data-dir",
            ) from error
        no_broker = not settings.broker_url.get_secret_value()
        self._valkey = Valkey(self.data_dir / "valkey", self._runtime / "valkey.sock") if no_broker else None
        self._s3 = None if given & _S3_SETTINGS else self._seaweedfs()

    def servers(self) -> list[Server]:
        """Return the servers to start, in order."""
        servers: list[Server] = []
        environment = child_environment({})
        if self._valkey:
            child = Child("valkey", self._valkey.argv(), environment, self.log("valkey"))
            servers.append(Server(child, self._valkey.is_ready))
        if self._s3:
            child = Child(
                "seaweedfs", self._s3.argv(), self._s3.environment(environment), self.log("seaweedfs"), grace_s=5.0
            )
            servers.append(Server(child, self._s3.is_ready))
        return servers

    def environment(self) -> dict[str, str]:
        """Return the settings, as environment variables, that point the service's processes at this stack."""
        values = {"data_dir": str(self.data_dir), "work_dir": str(self._work_dir())}
        if self._embeds_database:
            values["database_url"] = f"sqlite:///{self.data_dir / 'tunery.db'}"
        if self._valkey:
            values["broker_url"] = self._valkey.broker_url
        if self._s3:
            values["s3_endpoint_url"] = self._s3.endpoint_url
            values["s3_access_key_id"] = self._s3.access_key_id
            values["s3_secret_access_key"] = self._s3.secret_access_key
        if self.embeds_models:
            values["model_dir"] = str(self.data_dir / "models")
            (self.data_dir / "models").mkdir(exist_ok=True)
        return {f"{PREFIX}{name.upper()}": value for name, value in values.items()}

    def log(self, name: str) -> Path:
        """Return the path of a child's log."""
        return self.data_dir / "logs" / f"{name}.log"

    def remove_sockets(self) -> None:
        """Remove what the servers leave outside the data directory; call it when they have ended."""
        if self._s3:
            self._s3.remove_sockets()
        for socket_path in self._runtime.iterdir():
            socket_path.unlink()
        self._runtime.rmdir()

    def _work_dir(self) -> Path:
        chosen = "work_dir" in self._settings.model_fields_set
        return self._settings.work_dir.absolute() if chosen else self.data_dir / "work"

    def _seaweedfs(self) -> SeaweedFS:
        kept = _kept_secrets(self.data_dir / "stack.json")
        return SeaweedFS(
            self.data_dir / "s3", self._runtime, kept.s3_ports, kept.s3_access_key_id, kept.s3_secret_access_key
        )


def _runtime_dir(data_dir: Path) -> Path:
    """Return a private folder with a short path, for sockets: the same one each time for the same data directory.

    Its name can be guessed by others on the machine, so a folder that is not ours alone is refused.
    """
    digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:12]
    name = f"tunery-{os.geteuid()}-{digest}"
    folder = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(folder / _LONGEST_SOCKET_NAME)) >= SOCKET_PATH_BYTES:
        folder = Path("/tmp") / name
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise InfraError(
            f"{folder} is not a folder of this user alone", hint="remove it, or set TMPDIR to a safe place"
        )
    return folder


def _kept_secrets(path: Path) -> _Secrets:
    """Read the credentials in `path`, or generate and write them; take other ports if one of them is in use."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    ports = tuple(kept.get("s3_ports", ()))
    if len(ports) != PORTS or not all(is_free("127.0.0.1", port) for port in ports):
        ports = tuple(free_ports(PORTS))
    current = _Secrets(
        s3_access_key_id=kept.get("s3_access_key_id") or f"tunery{secrets.token_hex(8)}",
        s3_secret_access_key=kept.get("s3_secret_access_key") or secrets.token_hex(24),
        s3_ports=ports,
    )
    write_private(path, json.dumps(asdict(current), indent=1) + "\n")
    return current


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path` with mode 0600, whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(temporary).replace(path)
