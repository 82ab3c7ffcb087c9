"""The bell: a Celery message that says "look at the database". It carries no job, no authority and no state.

A lost, doubled or late bell does no harm: the sweeper rings again for work that waits. Ringing never delays a commit
or an answer: a thread sends, and a broker that is away costs a log line.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

from celery import Celery
from sqlalchemy.orm import Session

from common.settings import Settings

TRAIN = "train"
PREFLIGHT = "preflight"

_RINGS = "tunery_rings"
_EXPIRES_S = 60
_log = logging.getLogger(__name__)


def celery_app(settings: Settings) -> Celery:
    """Return the Celery app of this installation. Every setting here was measured; docs/decisions says what it avoids."""
    app = Celery("tunery", broker=settings.broker_url.get_secret_value())
    app.conf.update(
        # Early acknowledgement: late acks are delivered again after the visibility timeout while the job still runs.
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        # Threads, concurrency 1: the main thread still hears signals; prefork would fork CUDA.
        worker_pool="threads",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_create_missing_queues=False,
        task_queues={TRAIN: {}, PREFLIGHT: {}},
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        task_publish_retry=False,
        # Without these a half-open connection or a frozen broker blocks without limit.
        broker_transport_options={
            "socket_timeout": 5,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 5,
            "global_keyprefix": f"{settings.broker_prefix}:",
        },
    )
    return app


def after_commit(session: Session, which: str) -> None:
    """Remember to ring `which` once `session` has committed."""
    session.info.setdefault(_RINGS, set()).add(which)


def remembered(session: Session) -> set[str]:
    """Return and forget what is to be rung for `session`."""
    rings: set[str] = session.info.pop(_RINGS, set())
    return rings


class Doorbell:
    """Rings queues from a thread of its own."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._pending: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ring(self, which: str) -> None:
        """Ask for one message to `which`, soon. Asking again before it is sent changes nothing."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
                self._thread.start()
            if which not in self._waiting:
                self._waiting.add(which)
                self._pending.put(which)

    def close(self, timeout_s: float = 6.0) -> None:
        """Send what is pending, as far as that takes no longer than `timeout_s`, and stop."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._pending.put(None)
            thread.join(timeout_s)

    def _run(self) -> None:
        app = celery_app(self._settings)
        while (which := self._pending.get()) is not None:
            with self._lock:
                self._waiting.discard(which)
            self._send(app, which)
        app.close()

    @staticmethod
    def _send(app: Any, which: str) -> None:
        try:
            app.send_task(f"tunery.{which}", queue=which, expires=_EXPIRES_S, retry=False, ignore_result=True)
        except Exception as error:  # the broker's client raises many kinds; none of them may stop the bell
            _log.warning("the broker did not take the bell for %r (%s); the sweeper will ring again", which, error)
