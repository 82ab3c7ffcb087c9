"""What a child is given: the dataset's files in its folder, and `spec.json` that says what to do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.context import Context
from common.db.rows import JobRow
from common.errors import InvalidInput
from common.jobs.lifecycle import Claim
from common.settings import Settings
from common.uris import without_signature
from worker import fetch
from worker.bases import Base
from worker.fetch import Fetched
from worker.trainer.protocol import BaseRef, TrainSpec


@dataclass(frozen=True)
class Files:
    """The fetched datasets of a job; of an export also the folder of the adapter, and there rows may be missing."""

    train: Fetched | None
    validation: Fetched | None
    adapter: str | None = None


def fetch_files(context: Context, job: JobRow, folder: Path, alive: Callable[[], None]) -> Files:
    """Fetch the datasets of `job` into `folder`; raises as `fetch.dataset` does.

    Raises:
        InvalidInput: besides, the training data is not what the check saw.
    """
    train = fetch.dataset(context, job.tenant, job.spec["dataset"], folder, "train", alive)
    # None before the check.
    if job.dataset_sha256 not in (None, train.sha256):
        raise InvalidInput(
            "dataset: its content changed after the job was checked",
            code="dataset_changed",
            param="dataset",
            hint="Upload it with POST /datasets, which never changes.",
        )
    held_out = job.spec.get("validation_dataset")
    if held_out is None:
        return Files(train, None)
    return Files(
        train, fetch.dataset(context, job.tenant, held_out, folder, "validation", alive, param="validation_dataset")
    )


def of(settings: Settings, claim: Claim, job: JobRow, base: Base, base_folder: Path, files: Files) -> TrainSpec:
    """Return the spec of an attempt at `job`."""
    return TrainSpec(
        job_id=job.id,
        attempt=claim.epoch,
        job=_unsigned(job.spec),
        base=BaseRef(str(base_folder.resolve()), base.id, base.revision),
        train_file=files.train.file if files.train else "",
        train_sha256=files.train.sha256 if files.train else str(job.dataset_sha256),
        validation_file=files.validation.file if files.validation else None,
        threads=settings.trainer_threads,
        limits=limits(settings),
        adapter=files.adapter,
        source_job=job.source_job,
    )


def limits(settings: Settings) -> dict[str, int]:
    """Return the bounds of a dataset as a child takes them."""
    return {
        "max_bytes": settings.max_dataset_bytes,
        "max_row_bytes": settings.max_row_bytes,
        "max_rows": settings.max_rows,
    }


def _unsigned(job: dict[str, Any]) -> dict[str, Any]:
    # The spec lies beside the process that runs model code, and is published with the artifacts.
    links = {name: without_signature(job[name]) for name in ("dataset", "validation_dataset") if job.get(name)}
    return job | links


def write(folder: Path, spec: TrainSpec, **changes: Any) -> TrainSpec:
    """Write `spec` with `changes` into `folder` and return it."""
    changed = replace(spec, **changes)
    changed.write(folder)
    return changed
