"""Creates that may be sent twice: the same `Idempotency-Key` from the same tenant gets the same job."""

from __future__ import annotations

import hashlib
import json

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from common.db.engine import db_now
from common.db.rows import IdempotencyRow
from common.errors import WrongState
from common.jobs import lifecycle
from common.schemas.jobs import JobSpec

_PARAM = "Idempotency-Key"


def answered(session: Session, tenant: str, key: str, spec: JobSpec) -> str | None:
    """Return the id of the job that this key has made already, or None.

    Raises:
        WrongState: the key made a job from another body.
    """
    own = select(IdempotencyRow).where(IdempotencyRow.tenant == tenant, IdempotencyRow.key == key)
    row = session.scalar(own)
    if row is None:
        return None
    if row.body_sha256 != _digest(spec):
        raise WrongState(
            f"this {_PARAM} was used for a job with another body",
            code="idempotency_key_reused",
            param=_PARAM,
            hint="Use a new key for a new job.",
        )
    return row.job_id


def submit(session: Session, tenant: str, key: str, spec: JobSpec) -> tuple[str, bool]:
    """Submit a job unless the key has made one; return the job's id and whether it is new.

    Raises:
        WrongState: the key made a job from another body.
    """
    try:
        # A savepoint: of two creates at once, the one that loses takes its job back and answers the other's.
        with session.begin_nested():
            job_id = lifecycle.submit(session, tenant, spec)
            session.add(
                IdempotencyRow(
                    tenant=tenant,
                    key=key,
                    body_sha256=_digest(spec),
                    job_id=job_id,
                    created_at=session.scalar(select(db_now())),
                )
            )
    except IntegrityError:
        first = answered(session, tenant, key, spec)
        if first is None:
            raise
        return first, False
    return job_id, True


def _digest(spec: JobSpec) -> str:
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
