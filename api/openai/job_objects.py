"""Jobs, their events and their checkpoints as OpenAI's clients read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from api.openai.hyperparameters import ShownHyperparameters
from api.openai.hyperparameters import shown as shown_hyperparameters
from api.openai.job_create import in_openai_param, in_openai_words
from api.openai.values import Page
from common import files, fine_tuned
from common.datasets import SCHEME
from common.db.rows import CheckpointRow, JobRow
from common.errors import InvalidInput
from common.jobs import queries
from common.schemas.jobs import Event, JobRead, Metric

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
# A paused job is one that waits: their clients know no other word for it. `tunery.status` says which it is.
_STATUS: dict[str, Status] = {"validating": "validating_files", "paused": "queued"}
_LEVEL = {"info": "info", "warning": "warn", "error": "error"}
# Loss and accuracy by kind. The whole validation file is evaluated each time: both of OpenAI's names are true.
_METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"loss": ("train_loss",), "mean_token_accuracy": ("train_mean_token_accuracy",)},
    "eval": {
        "loss": ("valid_loss", "full_valid_loss"),
        "mean_token_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    },
}


class JobErrorObject(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class ShownSupervised(BaseModel):
    """`method.supervised`."""

    hyperparameters: ShownHyperparameters


class ShownMethod(BaseModel):
    """How a job trains."""

    type: Literal["supervised"] = "supervised"
    supervised: ShownSupervised


class FineTuningJob(BaseModel):
    """A job. Times are whole seconds since the epoch; `tunery` is the same job as `GET /jobs/{id}` shows it."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobErrorObject | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: ShownHyperparameters
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Status
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[dict[str, Any]] = []
    metadata: dict[str, str] | None
    method: ShownMethod
    user_provided_suffix: str | None
    tunery: JobRead


class FineTuningJobPage(Page):
    """A page of jobs, newest first."""

    data: list[FineTuningJob]


class EventObject(BaseModel):
    """Something that happened to a job, or what was measured at a step."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventPage(Page):
    """A page of events, newest first."""

    data: list[EventObject]


class CheckpointMetrics(BaseModel):
    """What was measured at a checkpoint; of the training, what was logged last before it."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointObject(BaseModel):
    """A checkpoint."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class CheckpointPage(Page):
    """A page of checkpoints, the highest step first."""

    data: list[CheckpointObject]


def shown(job: JobRow, *, has_results: bool, now: float) -> FineTuningJob:
    """Return a job as OpenAI's clients read it; `now` is in seconds since the epoch."""
    read = queries.shown(job)
    succeeded = job.status == "succeeded"
    hyperparameters = shown_hyperparameters(job)
    finish = now + job.eta_s if job.status == "running" and job.eta_s is not None else None
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at),
        error=_error(job),
        fine_tuned_model=fine_tuned.name(job) if succeeded and job.source_job is None else None,
        finished_at=None if job.finished_at is None else int(job.finished_at),
        hyperparameters=hyperparameters,
        model=job.model,
        organization_id=job.tenant,
        result_files=[files.result_id(job.id)] if has_results else [],
        seed=read.seed,
        status=_STATUS.get(job.status, job.status),
        trained_tokens=(job.report or {}).get("tokens_trained") if succeeded else None,
        training_file=read.dataset.removeprefix(SCHEME),
        validation_file=read.validation_dataset and read.validation_dataset.removeprefix(SCHEME),
        estimated_finish=None if finish is None else int(finish),
        metadata=job.metadata_ or None,
        method=ShownMethod(supervised=ShownSupervised(hyperparameters=hyperparameters)),
        user_provided_suffix=read.suffix,
        tunery=read,
    )


def _error(job: JobRow) -> JobErrorObject | None:
    if job.error is None:
        return None
    texts = [in_openai_words(job.error["message"]), job.error.get("hint")]
    message = " ".join(text if text.endswith(".") else f"{text}." for text in texts if text)
    return JobErrorObject(code=job.error["code"], message=message, param=in_openai_param(job.error.get("param")))


def shown_event(job: JobRow, item: Event | Metric) -> EventObject:
    """Return an event, or what was measured at a step, as an event of OpenAI's."""
    own = {"id": part_id("ftevent", job.id, item.id), "created_at": int(item.at.timestamp())}
    if isinstance(item, Event):
        return EventObject(**own, level=_LEVEL[item.level], message=item.message, type="message", data=item.data)
    values = {"step": item.step, "total_steps": job.max_steps, **_renamed(item)}
    loss = "training loss" if item.kind == "train" else "full validation loss"
    message = f"Step {item.step}/{job.max_steps}: {loss}={item.values.get('loss', float('nan')):.4f}"
    return EventObject(**own, level="info", message=message, type="metrics", data=values)


def _renamed(metric: Metric) -> dict[str, float]:
    """Return the values of a metric under OpenAI's names, and the others under Tunery's."""
    theirs = _METRICS[metric.kind]
    values = {name: value for name, value in metric.values.items() if name not in theirs}
    return values | {
        name: metric.values[ours] for ours, names in theirs.items() if ours in metric.values for name in names
    }


def shown_checkpoint(job: JobRow, row: CheckpointRow, metrics: Sequence[Metric]) -> CheckpointObject:
    """Return a checkpoint; `metrics` were measured at its step, those of the training at the last one before."""
    values: dict[str, float] = {}
    for metric in metrics:
        values |= _renamed(metric)
    return CheckpointObject(
        id=part_id("ftckpt", job.id, row.step),
        created_at=int(row.at),
        fine_tuned_model_checkpoint=fine_tuned.checkpoint_name(job, row.step),
        fine_tuning_job_id=job.id,
        metrics=CheckpointMetrics(**{**values, "step": row.step}),
        step_number=row.step,
    )


def part_id(kind: str, job_id: str, number: int) -> str:
    """Return the id of a job's event or checkpoint."""
    return f"{kind}_{job_id.removeprefix('job_')}_{number}"


def part_number(kind: str, job_id: str, after: str | None) -> int | None:
    """Return the number in the id that `part_id` made.

    Raises:
        InvalidInput: it is no such id of this job.
    """
    if after is None:
        return None
    found = re.fullmatch(re.escape(part_id(kind, job_id, 0))[:-1] + r"(\d{1,18})", after, re.ASCII)
    if found is None:
        raise InvalidInput("after: is no id from this list", param="after", hint="Begin the list anew.")
    return int(found[1])
