"""A worker that says when it uploads a checkpoint, so that it can be killed meanwhile.

It is a fork of a process that has imported everything already (multiprocessing's fork server): a kill costs no imports.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from sqlalchemy import event

from common import context as contexts
from common.jobs import lifecycle
from common.settings import Settings
from common.storage import store
from worker import publish
from worker.supervisor import Supervisor
from worker.training import Training
from worker.workplace import Device, Workplace

# The smallest part that S3 allows: a checkpoint of a few megabytes goes up in several, as a real one does.
PART_BYTES = 5 * 2**20
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


@contextmanager
def worker_that_uploads(settings: Settings, number: int) -> Iterator[tuple[Any, Connection]]:
    """Start a worker; yield its process, and a pipe that says `begun` and `ended` of its checkpoint `number`, from 1.

    It has ended when its row is committed. The process is killed on leaving.
    """
    heard, said = _forks.Pipe(duplex=False)
    process = _forks.Process(target=_work, args=(settings, number, said))
    process.start()
    said.close()
    try:
        yield process, heard
    finally:
        process.kill()
        process.join()
        heard.close()


def _work(settings: Settings, number: int, said: Connection) -> None:
    store.PART_BYTES = PART_BYTES
    uploads, rows = itertools.count(1), itertools.count(1)
    upload, record = publish.checkpoint, lifecycle.checkpointed

    @functools.wraps(upload)
    def uploading(*arguments: Any) -> Any:
        if next(uploads) == number:
            said.send("begun")
        return upload(*arguments)

    @functools.wraps(record)
    def recording(session: Any, *arguments: Any, **options: Any) -> None:
        record(session, *arguments, **options)
        if next(rows) == number:
            event.listen(session, "after_commit", lambda _: said.send("ended"))

    publish.checkpoint, lifecycle.checkpointed = uploading, recording
    context = contexts.build(settings)
    Supervisor(context, Training(), Workplace(settings), Device("cpu")).work_off(most=1)
