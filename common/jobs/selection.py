"""Which jobs of a tenant are meant: by status, labels, base model and age. The same for lists and for bulk wishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement

from common.db.rows import JobRow
from common.errors import InvalidInput

# Times are shown in whole microseconds: whoever asks with one that was shown means the very job.
_SHOWN_S = 1e-6


@dataclass(frozen=True)
class Selection:
    """Jobs that meet every condition that is given; `metadata` None is for jobs without any label.

    A job of the moment `created_before` is not among them, one of `created_after` is. Without `exports`, those that
    only merge what another job trained are left out.
    """

    status: Sequence[str] = ()
    metadata: Mapping[str, str] | None = field(default_factory=dict)
    model: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    exports: bool = True

    def conditions(self, tenant: str) -> list[ColumnElement[bool]]:
        """Return the conditions over the rows of jobs.

        Raises:
            InvalidInput: jobs cannot be found by such a label.
        """
        found = [JobRow.tenant == tenant]
        if self.status:
            found.append(JobRow.status.in_(self.status))
        if self.metadata is None:
            found.append(JobRow.metadata_ == {})
        for key, value in (self.metadata or {}).items():
            check_label(key, value)
            found.append(JobRow.metadata_[key].as_string() == value)
        if self.model is not None:
            found.append(JobRow.model == self.model)
        if not self.exports:
            found.append(JobRow.source_job.is_(None))
        if self.created_after is not None:
            found.append(JobRow.created_at >= self.created_after.timestamp() - _SHOWN_S)
        if self.created_before is not None:
            found.append(JobRow.created_at < self.created_before.timestamp() - _SHOWN_S)
        return found


EVERY = Selection()


def check_label(key: str, value: str) -> None:
    """Raise InvalidInput where jobs cannot be found by the label."""
    # Quotes and backslashes cannot be written in a path of SQLite's JSON functions.
    if not key or set(key) & set('"\\\x00') or "\x00" in value:
        raise InvalidInput(f"metadata[{key[:64]}]: jobs cannot be listed by this key or value", param="metadata")
