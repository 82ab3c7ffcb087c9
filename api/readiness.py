"""Can a job be taken? Each part is asked with a deadline, and never by two threads at once.

The database at the newest migration and the bucket must answer. A broker or workers that are away delay jobs but lose
none, so they are told as warnings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import migrations
from common import workers
from common.context import Context
from common.errors import TuneryError
from common.jobs.doorbell import PREFLIGHT, TRAIN, celery_app

DEADLINE_S = 3.0
_REQUIRED = ("database", "migration", "store")


@dataclass(frozen=True)
class Answer:
    """What a part says: whether it is well, and if not, why."""

    ok: bool
    detail: str | None = None


class Readiness:
    """Asks the parts of an installation. Safe to use from several threads."""

    def __init__(self, context: Context):
        self._context = context
        self._lock = threading.Lock()
        self._asked: dict[str, Future[Answer]] = {}
        self._parts: dict[str, Callable[[], Answer]] = {
            "database": self._database,
            "migration": self._migration,
            "store": self._store,
            "broker": self._broker,
            "preflight_worker": lambda: self._worker(PREFLIGHT),
            "train_worker": lambda: self._worker(TRAIN),
        }

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Return whether a job can be taken, and what each part says."""
        futures = {name: self._ask(name) for name in self._parts}
        wait(futures.values(), timeout=DEADLINE_S)
        answers = {name: self._answer(future) for name, future in futures.items()}
        ready = all(answers[name].ok for name in _REQUIRED)
        warnings = [
            f"{name}: {answer.detail}" for name, answer in answers.items() if not answer.ok and name not in _REQUIRED
        ]
        checks = {name: {"ok": answer.ok, "detail": answer.detail} for name, answer in answers.items()}
        return ready, {"ready": ready, "checks": checks, "warnings": warnings}

    def _ask(self, name: str) -> Future[Answer]:
        """Return the question to a part that is under way, or begin one."""
        with self._lock:
            future = self._asked.get(name)
            if future is None or future.done():
                future = self._asked[name] = Future()
                threading.Thread(target=self._run, args=(name, future), name=f"ready-{name}", daemon=True).start()
            return future

    def _run(self, name: str, future: Future[Answer]) -> None:
        try:
            future.set_result(self._parts[name]())
        except TuneryError as error:
            future.set_result(Answer(False, error.message))
        except Exception as error:
            # Drivers raise many kinds, whose texts may hold addresses and user names: the kind is enough here.
            future.set_result(Answer(False, f"does not answer ({type(error).__name__})"))

    @staticmethod
    def _answer(future: Future[Answer]) -> Answer:
        return future.result() if future.done() else Answer(False, f"no answer within {DEADLINE_S:g} s")

    def _database(self) -> Answer:
        with self._context.sessions.engine.connect() as connection:
            connection.exec_driver_sql("select 1")
        return Answer(True)

    def _migration(self) -> Answer:
        present, newest = migrations.present(self._context.sessions.engine), migrations.newest()
        if present != newest:
            return Answer(False, f"the database is at {present}, this server needs {newest}: run python -m migrations")
        return Answer(True)

    def _store(self) -> Answer:
        self._context.store.check()
        return Answer(True)

    def _broker(self) -> Answer:
        with (
            celery_app(self._context.settings) as app,
            app.connection_for_write(connect_timeout=DEADLINE_S) as connection,
        ):
            # Not default_channel, which tries a hundred times.
            connection.connect()
        return Answer(True)

    def _worker(self, kind: str) -> Answer:
        with self._context.read() as session:
            alive = [each for each in workers.listed(session) if each.kind == kind and each.state in ("idle", "busy")]
        return Answer(True) if alive else Answer(False, f"no {kind} worker is heard; jobs wait until one starts")
