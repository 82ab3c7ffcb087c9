"""A job as server-sent events: what happened, what was measured, how it stands; one cursor for all of it.

`event` and `metric` carry their cursor as the message's id, so that a client that comes back with Last-Event-ID goes
on exactly there. `job`, the state as a whole, carries none: it repeats, and must not move anybody's cursor.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic_core import to_json
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from api import freshness
from api.watching import Watcher
from common import keys
from common.context import Context
from common.errors import NotFound, Unauthenticated
from common.jobs import queries, standing, states
from common.keys import Caller

PING_S = 15.0
_BATCH = 200
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What is new behind a cursor: messages as they are sent, the new cursor, and the job's version and tag."""

    messages: bytes
    after: int
    version: int
    tag: str
    more: bool
    waits: bool
    ended: bool


def read(context: Context, who: Caller, job_id: str, after: int, shown_tag: str) -> Batch:
    """Return what follows the cursor `after`, and the job's state unless it was shown with that tag already.

    Raises:
        NotFound: no such job in the caller's tenant.
        Unauthenticated: the caller's key was revoked.
    """
    with context.read() as session:
        # A stream may last for days: whoever lost the key meanwhile is told nothing more.
        keys.check(session, who)
        # The row before its history: a state must not be shown before what led to it.
        row = queries.row(session, who.tenant, job_id)
        changes = queries.changes(session, job_id, after=after, limit=_BATCH)
        messages = [
            format_sse_event(data_str=to_json(value, inf_nan_mode="null").decode(), event=kind, id=str(cursor))
            for cursor, kind, value in changes
        ]
        more = len(changes) == _BATCH
        job = standing.told(session, row)
        if not more and (tag := freshness.tag(job, row.version)) != shown_tag:
            messages.append(format_sse_event(data_str=job.model_dump_json(), event="job"))
            shown_tag = tag
        last = changes[-1][0] if changes else after
        ended = job.status in states.TERMINAL and not more
        return Batch(b"".join(messages), last, row.version, shown_tag, more, job.waits_for is not None, ended)


async def follow(context: Context, watcher: Watcher, who: Caller, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Yield messages until the job has ended and everything was sent, the key was revoked, or the server closes."""
    tag = ""
    with watcher.subscribe(job_id, -1) as subscription:
        while not watcher.closed:
            try:
                batch = await run_in_threadpool(read, context, who, job_id, after, tag)
            except (NotFound, Unauthenticated):
                return
            except SQLAlchemyError as error:
                # The client comes back with its cursor, and hears 503 as long as the database is away.
                _log.warning("the stream of %s was cut: %s", job_id, error)
                return
            after = batch.after
            if batch.messages:
                yield batch.messages
            if batch.ended:
                return
            if batch.more:
                continue
            tag = batch.tag
            subscription.saw(batch.version)
            while not await subscription.wait(PING_S):
                yield KEEPALIVE_COMMENT
                if batch.waits:
                    # Its place may have moved, which changes nothing about the job itself.
                    break
