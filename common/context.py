"""Builds what a process needs from its settings, once: sessions, store, doorbell. Nobody downstream asks which kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.orm import Session

from common.db.engine import Sessions, make_engine
from common.errors import TuneryError
from common.jobs.doorbell import Doorbell, remembered
from common.settings import PREFIX, Settings
from common.storage.store import Store


@dataclass(frozen=True)
class Context:
    """The parts of an installation, as this process reaches them."""

    settings: Settings
    sessions: Sessions
    store: Store
    doorbell: Doorbell

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session for looking."""
        with self.sessions.read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session; commit at the end of the block, then ring what lifecycle asked for."""
        with self.sessions.write() as session:
            yield session
        for which in remembered(session):
            self.doorbell.ring(which)

    def close(self) -> None:
        """Send the last bells and close the connections."""
        self.doorbell.close()
        self.store.close()
        self.sessions.engine.dispose()


def build(settings: Settings) -> Context:
    """Return the context for `settings`.

    Raises:
        TuneryError: a part of the installation has no address.
    """
    for name, value in (
        ("DATABASE_URL", settings.database_url),
        ("BROKER_URL", settings.broker_url.get_secret_value()),
    ):
        if not value:
            raise TuneryError(
                f"{PREFIX}{name} is not set",
                code="not_configured",
                hint="Set it, or let `tunery up` start an embedded stack.",
            )
    return Context(settings, Sessions(make_engine(settings.database_url)), Store(settings), Doorbell(settings))
