"""A worker's place on disk and its devices: one folder per running job, removed when the job leaves the machine."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.cards import query_visible
from common.errors import InfraError
from common.jobs.lifecycle import Claim
from common.settings import Settings
from worker import bases
from worker.ml.cache import Cache, NoRoom

_LOCK = ".lock"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """Where a worker's trainer runs; `vram_bytes` is the whole memory of the card."""

    device: str
    name: str | None = None
    vram_bytes: int | None = None


def find_device(wanted: str) -> Device:
    """Return the device that `wanted` (auto, cpu or cuda:N) means on this machine, without importing torch."""
    cards = [] if wanted == "cpu" else _cards()
    if not cards:
        return Device("cpu" if wanted == "auto" else wanted)
    index = int(wanted.partition(":")[2] or 0)
    if index >= len(cards):
        raise InfraError(f"TUNERY_DEVICE is {wanted}, and this machine shows {len(cards)} cards", code="no_such_device")
    name, mebibytes = cards[index]
    return Device(f"cuda:{index}", name, mebibytes * 2**20)


def _cards() -> list[tuple[str, int]]:
    """Return (name, memory in MiB) of each visible card, in the order that CUDA_VISIBLE_DEVICES leaves."""
    lines = query_visible("name,memory.total")
    return [(name.strip(), int(memory)) for name, _, memory in (line.rpartition(",") for line in lines)]


class Workplace:
    """The folder of one worker process, held by a file lock; the folders of dead workers are cleared at the start."""

    def __init__(self, settings: Settings):
        self.id = f"{settings.worker_name or socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        self._reserve_bytes = settings.disk_reserve_bytes
        self._cache = bases.quantized_cache(settings)
        root = settings.work_dir.resolve() / "jobs"
        root.mkdir(parents=True, exist_ok=True)
        self._clear_dead(root)
        self.folder = root / self.id
        self._lock = self._take()

    def _take(self) -> IO[bytes]:
        """Make the folder and lock it; another worker may clear it between the two, since it looks abandoned then."""
        path = self.folder / _LOCK
        while True:
            self.folder.mkdir(exist_ok=True)
            lock = path.open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return lock
            lock.close()

    @staticmethod
    def _clear_dead(root: Path) -> None:
        for path in root.glob(f"*/{_LOCK}"):
            try:
                # Not "w", which would make the file again in a folder that another worker is clearing.
                lock = path.open("r+b")
            except FileNotFoundError:
                continue
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                _log.info("clearing the folder of a worker that died: %s", path.parent.name)
                shutil.rmtree(path.parent, ignore_errors=True)

    def has_room(self) -> bool:
        """Whether the disk has the reserve that a job needs; bases that are kept in 4 bit give way for it."""
        if self._cache is not None:
            with suppress(NoRoom, OSError):
                Cache(Path(self._cache.path), self._cache.most_bytes, self._reserve_bytes).make_room()
        return shutil.disk_usage(self.folder).free >= self._reserve_bytes

    @contextmanager
    def job(self, claim: Claim) -> Iterator[Path]:
        """Yield an empty folder for one attempt, and remove it afterwards."""
        with self.place(f"{claim.job_id}-a{claim.epoch}") as folder:
            yield folder

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """Yield an empty folder, and remove it afterwards."""
        folder = self.folder / name
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the worker's folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
