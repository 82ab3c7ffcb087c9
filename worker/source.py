"""What an export is made of: the adapter that its source job published, and rows to compare the models on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.context import Context
from common.db.rows import JobRow
from common.errors import InfraError, InvalidInput, NotFound, UserError
from common.jobs import queries
from worker import fetch, publish
from worker.fetch import Fetched
from worker.specs import Files

_ADAPTER = "adapter"


def fetch_source(
    context: Context, job: JobRow, folder: Path, alive: Callable[[], None], missing: Callable[[str], None]
) -> Files:
    """Fetch what the export `job` merges into `folder`. Its dataset only helps to compare: where it is gone or away,
    `missing` is told why, and the export goes on without.

    Raises:
        InvalidInput: the source, or its adapter, is not there any more, or not what was published.
        InfraError: the store is away.
    """
    adapter = folder / _ADAPTER
    try:
        with context.read() as session:
            source = queries.row(session, job.tenant, str(job.source_job))
        publish.adapter(context.store, source, adapter)
    except NotFound as error:
        raise InvalidInput(f"{job.source_job}, whose adapter this is, was deleted", code="source_gone") from error
    except InfraError as error:
        if error.code != "artifact_altered":
            raise
        # Another try would read the same.
        raise InvalidInput(error.message, code=error.code, hint="Tell the operator.") from error
    validation = job.spec.get("validation_dataset")
    param = "dataset" if validation is None else "validation_dataset"
    try:
        rows = fetch.dataset(context, job.tenant, job.spec[param], folder, "rows", alive, param)
        _check_same(rows, param, job)
    except (UserError, InfraError) as error:
        missing(error.message)
        return Files(None, None, _ADAPTER)
    return Files(None, rows, _ADAPTER) if validation else Files(rows, None, _ADAPTER)


def _check_same(rows: Fetched, param: str, job: JobRow) -> None:
    if param == "dataset" and rows.sha256 != job.dataset_sha256:
        raise InvalidInput("dataset: its content has changed since", param=param, code="dataset_changed")
