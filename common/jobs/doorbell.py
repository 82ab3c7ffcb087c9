"""The bell: a Celery message that says "look at the database". It carries no job, no authority and no state.

A lost, doubled or late bell does no harm: the sweeper rings again for work that waits. Ringing never delays a commit
or an answer: a thread sends, and a broker that is away costs a log line.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import Celery
from kombu import Connection
from kombu.pools import ProducerPool
from sqlalchemy.orm import Session

from common.settings import Settings

TRAIN = "train"
PREFLIGHT = "preflight"
RETRY_S = 5

_RINGS = "tunery_rings"
_EXPIRES_S = 60
_log = logging.getLogger(__name__)


class EagerConnection(Connection):
    """A connection that is tried again every RETRY_S at the latest.

    kombu 5.7 waits for up to 30 s after a long outage, and Celery 5.7 has no setting for it: claims would resume later.
    """

    def ensure_connection(self, *arguments: Any, **options: Any) -> Any:
        """Connect, however long that takes."""
        eager = {"interval_start": 1, "interval_step": 1, "interval_max": RETRY_S}
        return super().ensure_connection(*arguments, **eager | options)


def celery_app(settings: Settings) -> Celery:
    """Return the Celery app of this installation. docs/decisions says what each setting avoids."""
    app = Celery("tunery", broker=settings.broker_url.get_secret_value())
    app.amqp.Connection = EagerConnection
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
        self._wanted: dict[str, int] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def ring(self, which: str, times: int = 1) -> None:
        """Ask for `times` messages to `which`, soon. Asking again before they are sent adds nothing."""
        with self._changed:
            self._wanted[which] = max(times, self._wanted.get(which, 0))
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_s: float = 6.0) -> None:
        """Send what is pending, as far as that takes no longer than `timeout_s`, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        app = celery_app(self._settings)
        # A pool of its own: Celery 5.7 shares one with every app of the process, and only forgets it when it is closed.
        connections = app.connection_for_write().Pool(limit=1)
        producers = ProducerPool(connections, limit=1)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing)
                if not self._wanted:
                    break
                which, times = self._wanted.popitem()
            self._send(app, producers, which, times)
        producers.force_close_all()
        connections.force_close_all()
        app.close()

    @staticmethod
    def _send(app: Celery, producers: ProducerPool, which: str, times: int) -> None:
        options = {"queue": which, "expires": _EXPIRES_S, "retry": False, "ignore_result": True}
        try:
            with producers.acquire(block=True) as producer:
                for _ in range(times):
                    app.send_task(f"tunery.{which}", producer=producer, **options)
        except Exception as error:  # the broker's client raises many kinds; none of them may stop the bell
            _log.warning("the broker did not take the bell for %r (%s); the sweeper will ring again", which, error)
