"""Removes the files whose time is over: uploads that nobody completed, and datasets that were kept for a while."""

from __future__ import annotations

from common import datasets, direct_uploads, part_uploads
from common.context import Context
from common.errors import NotFound, WrongState


def remove_expired(context: Context) -> None:
    """Remove what has expired; a dataset that a live job reads stays until that job has ended.

    Raises:
        InfraError: the store is away; what is left is found again.
    """
    part_uploads.remove_expired(context)
    direct_uploads.remove_expired(context)
    with context.read() as session:
        over = datasets.expired(session)
    for tenant, dataset_id in over:
        try:
            datasets.remove(context, tenant, dataset_id)
        except (NotFound, WrongState):
            continue
