"""Creates that may be sent twice.

The same `Idempotency-Key` from the same tenant gets the same job. Clients that repeat a create by themselves and send
no such header, OpenAI's for one, get it too: without one, the same body from the same API key is the same create for a
short while. Both are rows of one table; a blank, which no header may hold, tells the second kind.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import select
from sqlalchemy.orm import Session

from common.db.engine import clock, db_now
from common.db.locks import lock
from common.db.rows import IdempotencyRow, JobRow
from common.errors import WrongState
from common.keys import Caller
from common.schemas.jobs import JobSpec

_PARAM = "Idempotency-Key"


@dataclass(frozen=True)
class Create:
    """A request for a job. `window_s`: for how long an equal request without a key counts as the same create."""

    who: Caller
    spec: JobSpec
    key: str | None
    window_s: float
    clone_of: str | None = None

    @property
    def is_single(self) -> bool:
        """Whether nothing can tell that this create was sent before."""
        return self.key is None and not self.window_s

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of what is asked for."""
        asked = self.spec.model_dump(mode="json")
        if self.clone_of is not None:
            # A clone without changes is another job, however soon it follows.
            asked["clone_of"] = self.clone_of
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The key of this create's row, unique within its tenant."""
        return self.key or f"same {self.who.key_id} {self.digest}"


def answered(session: Session, create: Create) -> str | None:
    """Return the id of the job that this create has made already, or None.

    Until the transaction ends nobody else is told: of two creates at once, the second gets the first one's job.

    Raises:
        WrongState: the key made a job from another body.
    """
    if create.is_single:
        return None
    lock(session, f"{create.who.tenant}/{create.name}")
    own = (IdempotencyRow.tenant == create.who.tenant) & (IdempotencyRow.key == create.name)
    if create.key is None:
        # Whoever cancelled the job has heard of it, and means another one now.
        recent = (IdempotencyRow.created_at > db_now() - create.window_s) & (JobRow.desired != "cancel")
        return session.scalar(select(JobRow.id).join(IdempotencyRow).where(own, recent))
    row = session.scalar(select(IdempotencyRow).where(own))
    if row is not None and row.body_sha256 != create.digest:
        raise WrongState(
            f"this {_PARAM} was used for a job with another body",
            code="idempotency_key_reused",
            param=_PARAM,
            hint="Use a new key for a new job.",
        )
    return row.job_id if row else None


def remember(session: Session, create: Create, job_id: str) -> None:
    """Note that `job_id` is the answer to this create, which `answered` knew nothing of."""
    if create.is_single:
        return
    session.merge(
        IdempotencyRow(
            tenant=create.who.tenant,
            key=create.name,
            body_sha256=create.digest,
            job_id=job_id,
            created_at=clock(session),
        )
    )
    session.flush()
