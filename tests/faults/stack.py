"""A whole installation in processes of its own, with a proxy in front of each part that is reached over a network.

API, preflight worker, two GPU workers, sweeper, Valkey, SeaweedFS, and SQLite or Postgres. Leases last a few seconds,
and the trainer is the hash chain, so that a fault and its recovery fit into a moment.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

import migrations
from common import context as contexts
from common import keys
from common.embedded.ports import free_ports
from common.embedded.seaweedfs import PORTS, SeaweedFS
from common.embedded.valkey import Valkey
from common.settings import Settings
from tests.faults import audit
from tests.faults.proxy import Proxy
from tests.faults.service import Keeper, Service
from tests.processes import environment
from tests.servers import prepare_postgres

WORKERS = ("train-1", "train-2")
LEASE_S = 3.0
_PLAIN = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
_TMPFS_BYTES = 48 * 2**20
_DATABASE = "tunery"
_PREFIX = "tunery-faults-"


@dataclass(frozen=True)
class Direct:
    """The addresses of database and store behind the proxies: for the checker, which must not suffer faults."""

    database_url: str
    s3_endpoint_url: str
    s3_access_key_id: str
    s3_secret_access_key: str
    s3_bucket: str


class Stack:
    """The installation under test. `proxies` are broker, store and, over Postgres, database."""

    def __init__(self, folder: Path, database: str, randomness: random.Random):
        self.folder = folder
        self.database = database
        self.keeper = Keeper(randomness, pause_s=(0.1, 1.5))
        self.proxies: dict[str, Proxy] = {}
        ports = free_ports(PORTS + 4)
        self.api_port, self._front_ports = ports[0], ports[1:4]
        self._valkey = Valkey(folder / "valkey", folder / "v.sock")
        self._s3 = SeaweedFS(folder / "s3", folder, tuple(ports[4:]), "key" + uuid.uuid4().hex[:17], uuid.uuid4().hex)
        self.work_dir = folder / "work"
        self.tmpfs = False
        self.key = ""

    # ---- up and down -------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start everything and wait until a job can be taken."""
        self.work_dir.mkdir()
        self.tmpfs = _mount(self.work_dir)
        self._start_servers()
        self._prepare()
        self._start_processes()

    def down(self) -> None:
        """End everything."""
        self.keeper.close()
        for proxy in self.proxies.values():
            proxy.close()
        self._s3.remove_sockets()
        if self.tmpfs:
            subprocess.run(["umount", "--lazy", str(self.work_dir)], check=True)

    def heal(self) -> None:
        """End every fault that lasts."""
        for proxy in self.proxies.values():
            proxy.heal()

    @property
    def services(self) -> dict[str, Service]:
        """Every process, by its name."""
        return self.keeper.services

    @property
    def url(self) -> str:
        """The address of the API."""
        return f"http://127.0.0.1:{self.api_port}"

    def _start_servers(self) -> None:
        services = [
            self._server("valkey", self._valkey.argv(), _PLAIN, self._valkey.is_ready),
            self._server("seaweedfs", self._s3.argv(), self._s3.environment(_PLAIN), self._s3.is_ready),
        ]
        if self.database == "postgres":
            argv = prepare_postgres(self.folder, self.folder / "pg")
            admin = f"postgresql+psycopg://postgres@/postgres?host={self.folder / 'pg'}"
            services.append(self._server("postgres", argv, _PLAIN, lambda: _answers(admin)))
        self.keeper.start(*services)
        if self.database == "postgres":
            with create_engine(admin, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as connection:
                connection.execute(text(f"CREATE DATABASE {_DATABASE}"))
            self._front("database", 0, self.folder / "pg" / ".s.PGSQL.5432")
        self._front("broker", 1, self._valkey.socket_path)
        self._front("store", 2, ("127.0.0.1", self._s3.ports[0]))

    def _front(self, name: str, number: int, upstream: Path | tuple[str, int]) -> None:
        self.proxies[name] = Proxy(("127.0.0.1", self._front_ports[number]), upstream)
        self.proxies[name].start()

    def _prepare(self) -> None:
        base = self.folder / "models" / "tiny"
        base.mkdir(parents=True)
        (base / "config.json").write_text("{}")
        (base / "model.safetensors").touch()
        (base / "tunery.json").write_text(json.dumps({"id": "org/tiny", "revision": "c0ffee"}))
        parts = contexts.build(self.settings())
        parts.store.ensure_bucket()
        migrations.upgrade(parts.sessions.engine)
        audit.install(parts.sessions.engine)
        with parts.write() as session:
            _, self.key = keys.create(session, name="faults", tenant="t", admin=True)
        parts.close()

    def _start_processes(self) -> None:
        api = self._process("api", ["api"])
        workers = [self._process(name, ["worker", "train"]) for name in WORKERS]
        others = [self._process(name, ["worker", name]) for name in ("preflight", "sweeper")]
        for service, word in [(api, "Uvicorn running"), *((worker, "ready") for worker in [*workers, others[0]])]:
            service.is_ready = lambda service=service, word=word: word in service.said()
        self.keeper.start(api, *others, *workers, timeout_s=120)

    def _server(
        self, name: str, argv: Sequence[str], variables: dict[str, str], is_ready: Callable[[], bool]
    ) -> Service:
        return Service(name, argv, variables, self._log(name), is_ready, lasting=True)

    def _process(self, name: str, words: list[str]) -> Service:
        variables = environment(self.settings(worker_name=name))
        return Service(name, [sys.executable, "-m", *words], variables, self._log(name))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    # ---- addresses ---------------------------------------------------------------------------------------------------

    @property
    def direct(self) -> Direct:
        """Where database and store really are."""
        url = f"sqlite:///{self.folder / 'tunery.db'}"
        if self.database == "postgres":
            url = f"postgresql+psycopg://postgres@/{_DATABASE}?host={self.folder / 'pg'}"
        s3 = self._s3
        return Direct(url, s3.endpoint_url, s3.access_key_id, s3.secret_access_key, "tunery")

    def settings(self, **changes: object) -> Settings:
        """Return the settings of the processes, with changes by name."""
        database, broker, store = self._front_ports
        values = {
            "database_url": self.direct.database_url
            if self.database == "sqlite"
            else f"postgresql+psycopg://postgres@127.0.0.1:{database}/{_DATABASE}",
            "broker_url": f"redis://127.0.0.1:{broker}/0",
            "s3_endpoint_url": f"http://127.0.0.1:{store}",
            "s3_access_key_id": self._s3.access_key_id,
            "s3_secret_access_key": self._s3.secret_access_key,
            "work_dir": self.work_dir,
            "model_dir": self.folder / "models",
            "data_dir": self.folder / "data",
            "port": self.api_port,
            "lease_s": LEASE_S,
            "retry_max_s": 1.0,
            "stop_grace_s": 5.0,
            "progress_deadline_s": 15.0,
            # Random kills must not look like a trainer that cannot run.
            "crash_loop_attempts": 50,
            "disk_reserve_bytes": 0,
            "trainer_module": "tests.faults.hash_trainer",
            "preflight_module": "tests.faults.hash_check",
            "device": "cpu",
        }
        return Settings.model_validate(values | changes)

    # ---- faults of the disk and the broker's data --------------------------------------------------------------------

    def fill_disk(self) -> None:
        """Take all that is left on the workers' disk."""
        block = bytes(2**20)
        try:
            with (self.work_dir / "filler").open("ab", buffering=0) as filler:
                while filler.write(block):
                    pass
        except OSError:
            return

    def free_disk(self) -> None:
        """Give it back."""
        (self.work_dir / "filler").unlink(missing_ok=True)

    def wipe_broker(self) -> None:
        """Lose everything that the broker knew."""
        for path in self._valkey.folder.rglob("*"):
            if path.is_file():
                path.unlink()


@contextmanager
def running(folder: Path, database: str, randomness: random.Random) -> Iterator[Stack]:
    """Yield a stack that is up; afterwards nothing of it runs."""
    stack = Stack(folder, database, randomness)
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


@contextmanager
def own_folder() -> Iterator[Path]:
    """Yield a folder with a short path (sockets live in it), which is gone afterwards.

    What a run left that was killed itself is cleared first: its processes died with it, its disk is still mounted.
    """
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/owner"):
        if not psutil.pid_exists(int(owner.read_text() or 0)):
            _remove(owner.parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder.chmod(0o711)
    (folder / "owner").write_text(str(os.getpid()))
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    if (folder / "work").is_mount():
        subprocess.run(["umount", "--lazy", str(folder / "work")], capture_output=True, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)


def _mount(folder: Path) -> bool:
    """Put a small disk of its own at `folder`, where the system allows it."""
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, timeout=10).returncode == 0


def _answers(url: str) -> bool:
    engine = create_engine(url, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            return connection.scalar(text("SELECT 1")) == 1
    except OperationalError:
        return False


def waited_for(seen: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until `seen()` and return True, or False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not seen():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
