"""Makes previews, between the checks of jobs: seconds each, by a child without credentials, like a check's."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from common import previews
from common.context import Context
from common.db.rows import PreviewRow
from common.errors import InfraError, UserError
from common.jobs.lifecycle import Failure
from common.schemas.jobs import JobSpec
from common.schemas.previews import PreviewAsked
from worker import bases, fetch, specs
from worker.asking import ask
from worker.shares import Shares
from worker.trainer.protocol import BaseRef, Result, TrainSpec
from worker.workplace import Workplace

MODULE = "worker.trainer.preview"
# Both together end before the lease does.
_FETCH_S = 100.0
_CHILD_S = 60.0
# Then a check has its turn: whoever asks again and again must not keep all jobs from being checked.
TURN_S = 30.0
_log = logging.getLogger(__name__)


class _Leaves(Exception):
    """The worker drains."""


def make(context: Context, workplace: Workplace, draining: threading.Event, shares: Shares) -> bool:
    """Answer the previews that wait, for as long as a turn lasts; return whether more may wait."""
    deadline = time.monotonic() + TURN_S
    while not draining.is_set():
        with context.write() as session:
            row = previews.claim(session, workplace.id, shares.spent())
        if row is None:
            return False
        with shares.spending(row.tenant):
            _make(context, workplace, draining, row)
        if time.monotonic() > deadline:
            return True
    return False


def _make(context: Context, workplace: Workplace, draining: threading.Event, row: PreviewRow) -> None:
    try:
        with workplace.place(f"preview-{row.id[:16]}-a{row.attempts}") as folder:
            state, result = _answer(context, folder, draining, row)
    except _Leaves:
        with context.write() as session:
            previews.give_back(session, row)
        return
    except OSError:
        # No folder could be made: the lease runs out, and another worker may have room.
        _log.exception("the preview %s could not be begun", row.id)
        return
    with context.write() as session:
        previews.settle(session, row, state, result)


def _answer(context: Context, folder: Path, draining: threading.Event, row: PreviewRow) -> tuple[str, dict[str, Any]]:
    try:
        answer = _ask(context, folder, draining, row)
    except UserError as error:
        return _said(previews.REFUSED, error.code, error.message, error.hint, error.param)
    except (InfraError, OSError) as error:
        code = error.code if isinstance(error, InfraError) else "worker_io"
        return _said(previews.BROKEN, code, str(error))
    except _Leaves:
        raise
    except Exception as error:
        _log.exception("the preview %s broke", row.id)
        return _said(previews.BROKEN, "preview_broke", f"the preview failed ({type(error).__name__})")
    if isinstance(answer, Result):
        return previews.READY, answer.report
    return _said(previews.REFUSED, answer.code, answer.message, answer.hint, answer.param)


def _said(
    state: str, code: str, message: str, hint: str | None = None, param: str | None = None
) -> tuple[str, dict[str, Any]]:
    return state, {"code": code, "message": message, "hint": hint, "param": param}


def _ask(context: Context, folder: Path, draining: threading.Event, row: PreviewRow) -> Result | Failure:
    deadline = time.monotonic() + _FETCH_S

    def alive() -> None:
        if draining.is_set():
            raise _Leaves
        if time.monotonic() > deadline:
            raise InfraError("dataset or base model could not be fetched in time", code="fetch_late")

    asked, settings = PreviewAsked.model_validate(row.asked), context.settings
    base = bases.resolve(asked.model, settings)
    path = bases.fetch(base, settings, alive, weights=False)
    file = fetch.dataset(context, row.tenant, f"dataset:{asked.dataset}", folder, "train", alive)
    deadline += _CHILD_S
    wished = {"max_length": asked.max_length or "auto", "loss": asked.loss}
    job = JobSpec(
        model=asked.model,
        dataset=f"dataset:{asked.dataset}",
        hyperparameters=wished,  # type: ignore[arg-type]
        chat_template=asked.chat_template,
    )
    spec = TrainSpec(
        f"preview-{row.id}", row.attempts, job.model_dump(mode="json"),
        BaseRef(str(path.resolve()), base.id, base.revision), file.file, file.sha256, device="cpu",
        limits=specs.limits(settings),
    )  # fmt: skip
    spec.write(folder)
    return ask([MODULE, str(folder), str(asked.rows), str(asked.offset)], folder, settings, alive, _CHILD_S)
