"""Which jobs of a tenant are meant: by status, labels, base model and age. The same for lists and for bulk wishes.

Each query is written so that an index gives its first rows in their order, however many jobs there are: `id` and
`created_at` grow together, a label leads to its jobs, and of several statuses each is asked for by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import ColumnElement, ScalarSelect, Select, and_, exists, func, select, union_all
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from common.db.rows import JobRow, LabelRow
from common.errors import InvalidInput
from common.ids import before_all
from common.jobs import states

# Times are shown in whole microseconds: whoever asks with one that was shown means the very job.
_SHOWN_S = 1e-6
# Ids carry the time of whoever made them, `created_at` is the database's: no two clocks are further apart.
_CLOCKS_S = 86_400.0
# Of labels that more jobs carry, it does not matter which leads.
COUNT_MOST = 1000


@dataclass(frozen=True)
class Selection:
    """Jobs that meet every condition that is given; `metadata` None is for jobs without any label.

    `created_after` is inclusive, `created_before` is not. Without `exports`, those that
    only merge what another job trained are left out.
    """

    status: Sequence[str] = ()
    metadata: Mapping[str, str] | None = field(default_factory=dict)
    model: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    exports: bool = True

    def newest(self, session: Session, tenant: str, *, after: str | None, limit: int) -> Select[str]:
        """Return the query for the ids of the first `limit` of them, newest first, that are older than the id `after`.

        Of several labels it looks first which few jobs carry: that one leads.

        Raises:
            InvalidInput: jobs cannot be found by such a label.
        """
        labels = _rarest_first(session, [_Label(tenant, *each) for each in (self.metadata or {}).items()])
        if len(set(self.status)) < 2:
            return self._newest(tenant, labels, after, limit)
        alone = (replace(self, status=(status,)) for status in sorted(set(self.status)))
        parts = (each._newest(tenant, labels, after, limit) for each in alone)
        every = union_all(*(select(part.subquery().c.id) for part in parts)).subquery()
        return select(every.c.id).order_by(every.c.id.desc()).limit(limit)

    def _newest(self, tenant: str, labels: Sequence[_Label], after: str | None, limit: int) -> Select[str]:
        # Of the jobs that have not ended there are few: they are looked through for their labels.
        few = bool(self.status) and self.status[0] not in states.TERMINAL
        found = labels[0] if labels and not few else None
        others = labels if found is None else labels[1:]
        job_id = JobRow.id if found is None else found.row.job_id
        query = select(job_id.label("id")).where(*self._conditions(tenant), *(label.of(JobRow.id) for label in others))
        if found is not None:
            query = query.join(JobRow, JobRow.id == job_id).where(found.means)
        for bound in self._bounds(job_id):
            query = query.where(bound)
        if after:
            query = query.where(job_id < after)
        return query.order_by(job_id.desc()).limit(limit)

    def _conditions(self, tenant: str) -> list[ColumnElement[bool]]:
        found = [JobRow.tenant == tenant]
        if self.status:
            found.append(JobRow.status == self.status[0])
        if self.metadata is None:
            found.append(JobRow.metadata_ == {})
        if self.model is not None:
            found.append(JobRow.model == self.model)
        if not self.exports:
            found.append(JobRow.source_job.is_(None))
        if self.created_after is not None:
            found.append(JobRow.created_at >= self.created_after.timestamp() - _SHOWN_S)
        if self.created_before is not None:
            found.append(JobRow.created_at < self.created_before.timestamp() - _SHOWN_S)
        return found

    def _bounds(self, job_id: InstrumentedAttribute[str]) -> list[ColumnElement[bool]]:
        """Return where in the order of ids the moments lie, with room for clocks that differ."""
        found = []
        if self.created_after is not None:
            found.append(job_id >= before_all("job", self.created_after.timestamp() - _CLOCKS_S))
        if self.created_before is not None:
            found.append(job_id < before_all("job", self.created_before.timestamp() + _CLOCKS_S))
        return found


EVERY = Selection()


class _Label:
    """A label that is asked for, as a row of its table."""

    def __init__(self, tenant: str, key: str, value: str):
        check_label(key, value)
        self.row = aliased(LabelRow)
        self.means = and_(self.row.tenant == tenant, self.row.key == key, self.row.value == value)

    def of(self, job_id: InstrumentedAttribute[str]) -> ColumnElement[bool]:
        """Return the condition that a job carries it."""
        return exists().where(self.means, self.row.job_id == job_id)

    def num_jobs(self) -> ScalarSelect[int]:
        """Return how many jobs carry it, as far as COUNT_MOST, as SQL."""
        carry = select(self.row.job_id).where(self.means).limit(COUNT_MOST).subquery()
        return select(func.count()).select_from(carry).scalar_subquery()


def _rarest_first(session: Session, labels: list[_Label]) -> list[_Label]:
    if len(labels) < 2:
        return labels
    counts = session.execute(select(*(label.num_jobs() for label in labels))).one()
    return [labels[place] for place in sorted(range(len(labels)), key=counts.__getitem__)]


def check_label(key: str, value: str) -> None:
    """Raise InvalidInput where no job can carry the label."""
    if not key or "\x00" in key or "\x00" in value:
        raise InvalidInput(f"metadata[{key[:64]}]: jobs cannot be listed by this key or value", param="metadata")
