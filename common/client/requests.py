"""Every route of the server that the client calls, as values; the resources only send them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from pydantic import BaseModel

from common.client.calls import Call, Nothing, delete, get, post, segment
from common.client.sending import Progress, file_body
from common.errors import InvalidInput
from common.schemas.bulk import CancelList
from common.schemas.checkpoints import CheckpointList
from common.schemas.datasets import Dataset, DatasetList
from common.schemas.estimates import JobEstimate
from common.schemas.jobs import ArtifactList, EventList, JobList, JobRead, MetricList
from common.schemas.keys import KeyCreated, KeyList
from common.schemas.precision import PrecisionRead
from common.schemas.previews import Preview
from common.schemas.quotas import Quota, QuotaLimits
from common.schemas.webhooks import Delivery, DeliveryList, WebhookCreated, WebhookList, WebhookRead
from common.schemas.workers import BaseModelList, Worker, WorkerList

_UPLOAD_TIMEOUT_S = 600
_LONG_POLL_S = 20

Options = Mapping[str, Any] | BaseModel


class JobFields(TypedDict, total=False):
    """The optional fields of a job, as in the body of `POST /jobs`."""

    validation_dataset: str | Dataset | None
    validation_split: float | None
    method: str
    suffix: str | None
    chat_template: str | None
    sample_prompts: list[str] | str | None
    hyperparameters: Options
    lora: Options
    quantization: Options | None
    seed: int
    priority: int
    not_before: datetime | str | None
    metadata: Mapping[str, str]
    export: list[str]


class CloneFields(JobFields, total=False):
    """What a clone changes: fields of the job, of which mappings are merged; None sets a field to its default."""

    model: str
    dataset: str | Dataset


class OrderFields(TypedDict, total=False):
    """Where a waiting job shall stand, as in the body of `PATCH /jobs/{id}`; None lifts `not_before`."""

    priority: int
    not_before: datetime | str | None


class WebhookFields(TypedDict, total=False):
    """What of a webhook may change, as in the body of `PATCH /webhooks/{id}`; `events` None is every event."""

    url: str
    events: list[str] | None
    description: str
    enabled: bool


def create_job(model: str, dataset: str | Dataset, fields: JobFields, idempotency_key: str | None) -> Call[JobRead]:
    """Return the call that creates a job. Its key makes sending it twice the same as sending it once."""
    return Call(
        "POST",
        "/jobs",
        JobRead,
        json=_body(model, dataset, fields),
        headers={"idempotency-key": idempotency_key or uuid.uuid4().hex},
        repeatable=True,
    )


def estimate_job(model: str, dataset: str | Dataset, fields: JobFields) -> Call[JobEstimate]:
    """Return the call that estimates what such a job would take."""
    return Call("POST", "/jobs/estimate", JobEstimate, json=_body(model, dataset, fields), repeatable=True)


def _body(model: str, dataset: str | Dataset, fields: JobFields) -> dict[str, Any]:
    return {name: _plain(value) for name, value in {"model": model, "dataset": dataset, **fields}.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Dataset):
        return value.uri
    if isinstance(value, datetime):
        # A time without a zone is this machine's.
        return (value if value.tzinfo else value.astimezone()).isoformat()
    if isinstance(value, BaseModel):
        # Only what was set: a default of this version may be no default of the server's.
        return value.model_dump(mode="json", exclude_unset=True)
    return dict(value) if isinstance(value, Mapping) else value


def clone_job(job: str, changes: CloneFields, idempotency_key: str | None) -> Call[JobRead]:
    """Return the call that submits a job like another one, with changes."""
    return Call(
        "POST",
        f"/jobs/{segment(job)}/clone",
        JobRead,
        json={name: _plain(value) for name, value in changes.items()},
        headers={"idempotency-key": idempotency_key or uuid.uuid4().hex},
        repeatable=True,
    )


class FilterFields(TypedDict, total=False):
    """Which jobs are meant: those that meet every condition."""

    status: str | Sequence[str] | None
    metadata: Mapping[str, str] | None
    model: str | None
    created_after: datetime | None
    created_before: datetime | None


def list_jobs(wanted: FilterFields, limit: int | None, after: str | None) -> Call[JobList]:
    """Return the call that reads one page of jobs, newest first."""
    asked = {name: _plain(value) for name, value in wanted.items() if name != "metadata"}
    labels = {f"metadata[{name}]": value for name, value in (wanted.get("metadata") or {}).items()}
    return get("/jobs", JobList, limit=limit, after=after, **asked, **labels)


def cancel_jobs(ids: Sequence[str] | None, wanted: FilterFields, after: str | None, dry_run: bool) -> Call[CancelList]:
    """Return the call that cancels many jobs: those of `ids`, or those that meet every condition of `wanted`."""
    body: dict[str, Any] = {"dry_run": dry_run}
    if ids is not None:
        body["ids"] = list(ids)
    if wanted or ids is None:
        chosen = {name: _plain(value) for name, value in wanted.items() if value}
        if isinstance(chosen.get("status"), str):
            chosen["status"] = [chosen["status"]]
        body["filter"] = chosen
    if after is not None:
        body["after"] = after
    return Call("POST", "/jobs/cancel", CancelList, json=body, repeatable=True)


def get_job(job: str) -> Call[JobRead]:
    """Return the call that reads one job."""
    return get(f"/jobs/{segment(job)}", JobRead)


def await_job(job: str, wait_s: float) -> Call[JobRead]:
    """Return the call that reads one job that the server may hold back until something about it changes."""
    held_s = int(max(0, min(_LONG_POLL_S, wait_s)))
    path = f"/jobs/{segment(job)}"
    return Call("GET", path, JobRead, {"wait": held_s or None}, repeatable=True, read_timeout_s=held_s + 30)


def act_on_job(job: str, action: str) -> Call[JobRead]:
    """Return the call for an action: cancel, pause, resume or retry.

    Only cancel is sent again after a lost answer: a second retry, for one, would be a second job.
    """
    return post(f"/jobs/{segment(job)}/{action}", JobRead, repeatable=action == "cancel")


def export_job(job: str, forms: str | Sequence[str], priority: int) -> Call[JobRead]:
    """Return the call that exports merged models of a finished job; what is made already is not made twice."""
    body = {"export": [forms] if isinstance(forms, str) else list(forms), "priority": priority}
    return Call("POST", f"/jobs/{segment(job)}/export", JobRead, json=body, repeatable=True)


def reorder_job(job: str, order: OrderFields) -> Call[JobRead]:
    """Return the call that moves a waiting job in the queue."""
    body = {name: _plain(value) for name, value in order.items()}
    return Call("PATCH", f"/jobs/{segment(job)}", JobRead, json=body, repeatable=True)


def delete_job(job: str) -> Call[Nothing]:
    """Return the call that removes an ended job and its objects."""
    return delete(f"/jobs/{segment(job)}")


def job_events(job: str, after: int, limit: int | None = None) -> Call[EventList]:
    """Return the call that reads the events behind the cursor `after`, oldest first."""
    return get(events_path(job), EventList, after=after, limit=limit)


def events_path(job: str) -> str:
    """Return the path of a job's events, which is also that of its stream."""
    return f"/jobs/{segment(job)}/events"


def job_metrics(job: str, after: int) -> Call[MetricList]:
    """Return the call that reads the metrics behind the cursor `after`, oldest first."""
    return get(f"/jobs/{segment(job)}/metrics", MetricList, after=after)


def job_artifacts(job: str) -> Call[ArtifactList]:
    """Return the call that reads every published file with fresh signed links."""
    return get(f"/jobs/{segment(job)}/artifacts", ArtifactList)


def job_checkpoints(job: str) -> Call[CheckpointList]:
    """Return the call that reads every complete checkpoint, the highest step first."""
    return get(f"/jobs/{segment(job)}/checkpoints", CheckpointList)


def job_precision(job: str) -> Call[PrecisionRead]:
    """Return the call that reads how each module of a finished job's model was held."""
    return get(f"/jobs/{segment(job)}/precision", PrecisionRead)


def upload_dataset(path: Path, name: str | None, on_progress: Progress | None) -> Call[Dataset]:
    """Return the call that uploads a file; raises InvalidInput for one that is absent or empty.

    The server knows content that it has: sent twice, it is one dataset.
    """
    body = file_body(path, name, on_progress)
    return Call("POST", "/datasets", Dataset, upload=body, repeatable=True, read_timeout_s=_UPLOAD_TIMEOUT_S)


def list_datasets(limit: int | None, after: str | None) -> Call[DatasetList]:
    """Return the call that reads one page of datasets, newest first."""
    return get("/datasets", DatasetList, limit=limit, after=after)


def get_dataset(dataset: str) -> Call[Dataset]:
    """Return the call that reads one dataset; takes its id or its URI."""
    return get(f"/datasets/{segment(dataset.removeprefix('dataset:'))}", Dataset)


def delete_dataset(dataset: str) -> Call[Nothing]:
    """Return the call that removes a dataset; takes its id or its URI."""
    return delete(f"/datasets/{segment(dataset.removeprefix('dataset:'))}")


class PreviewFields(TypedDict, total=False):
    """What a preview may be asked besides; None is the server's default."""

    rows: int | None
    offset: int | None
    max_length: int | None
    loss: str | None
    chat_template: str | None


def preview_dataset(dataset: str | Dataset, model: str, fields: PreviewFields) -> Call[Preview]:
    """Return the call that reads rows as `model` will see them; takes an id or a URI.

    Raises:
        InvalidInput: it is the path of a file, or a URI of what was not uploaded.
    """
    name = dataset.id if isinstance(dataset, Dataset) else dataset.removeprefix("dataset:")
    if "/" in name:
        hint = "`tunery datasets upload FILE` uploads a file and says its URI"
        raise InvalidInput(f"dataset: {name} is no uploaded dataset", param="dataset", hint=hint)
    path = f"/datasets/{segment(name)}/preview"
    if fields.get("chat_template") is None:
        return get(path, Preview, model=model, wait=_LONG_POLL_S, **fields)
    body = {"model": model} | {name: value for name, value in fields.items() if value is not None}
    return Call("POST", path, Preview, params={"wait": _LONG_POLL_S}, json=body, repeatable=True)


def list_base_models() -> Call[BaseModelList]:
    """Return the call that reads the base models at hand."""
    return get("/base-models", BaseModelList)


def list_workers() -> Call[WorkerList]:
    """Return the call that reads the workers."""
    return get("/workers", WorkerList)


def drain_worker(worker: str) -> Call[Worker]:
    """Return the call that drains a worker: it takes no further job."""
    return post(f"/workers/{segment(worker)}/drain", Worker, repeatable=True)


def create_key(name: str, tenant: str | None) -> Call[KeyCreated]:
    """Return the call that creates a key; sent once, since its secret is shown once."""
    body = {"name": name} if tenant is None else {"name": name, "tenant": tenant}
    return Call("POST", "/keys", KeyCreated, json=body)


def list_keys(tenant: str | None) -> Call[KeyList]:
    """Return the call that reads a tenant's keys."""
    return get("/keys", KeyList, tenant=tenant)


def revoke_key(key: str, tenant: str | None) -> Call[Nothing]:
    """Return the call that revokes a key."""
    return delete(f"/keys/{segment(key)}", tenant=tenant)


def get_quota(tenant: str | None) -> Call[Quota]:
    """Return the call that reads what a tenant may use, and uses."""
    return get("/quota", Quota, tenant=tenant)


def set_quota(limits: QuotaLimits, tenant: str | None) -> Call[Quota]:
    """Return the call that sets every limit of a tenant."""
    return Call("PUT", "/quota", Quota, {"tenant": tenant}, json=limits.model_dump(mode="json"), repeatable=True)


def create_webhook(url: str, events: Sequence[str] | None, description: str) -> Call[WebhookCreated]:
    """Return the call that creates a webhook; sent once, since its secret is shown once."""
    body = {"url": url, "events": None if events is None else list(events), "description": description}
    return Call("POST", "/webhooks", WebhookCreated, json=body)


def list_webhooks() -> Call[WebhookList]:
    """Return the call that reads the tenant's webhooks."""
    return get("/webhooks", WebhookList)


def get_webhook(webhook: str) -> Call[WebhookRead]:
    """Return the call that reads one webhook."""
    return get(f"/webhooks/{segment(webhook)}", WebhookRead)


def change_webhook(webhook: str, fields: WebhookFields) -> Call[WebhookRead]:
    """Return the call that changes a webhook's events or URL, or switches it on or off."""
    return Call("PATCH", f"/webhooks/{segment(webhook)}", WebhookRead, json=dict(fields), repeatable=True)


def delete_webhook(webhook: str) -> Call[Nothing]:
    """Return the call that removes a webhook and its deliveries."""
    return delete(f"/webhooks/{segment(webhook)}")


def rotate_webhook(webhook: str, overlap_s: int | None) -> Call[WebhookCreated]:
    """Return the call for a new secret; sent once, since a second one would end the overlap with the first."""
    return Call("POST", f"/webhooks/{segment(webhook)}/rotate", WebhookCreated, {"overlap_s": overlap_s})


def ping_webhook(webhook: str) -> Call[Delivery]:
    """Return the call that sends a webhook a test message."""
    return post(f"/webhooks/{segment(webhook)}/ping", Delivery)


def list_deliveries(webhook: str, state: str | None, limit: int | None, after: str | None) -> Call[DeliveryList]:
    """Return the call that reads one page of a webhook's deliveries, newest first."""
    return get(f"/webhooks/{segment(webhook)}/deliveries", DeliveryList, state=state, limit=limit, after=after)


def get_delivery(webhook: str, delivery: str) -> Call[Delivery]:
    """Return the call that reads one delivery."""
    return get(f"/webhooks/{segment(webhook)}/deliveries/{segment(delivery)}", Delivery)


def redeliver(webhook: str, delivery: str) -> Call[Delivery]:
    """Return the call that makes a delivery again."""
    return post(f"/webhooks/{segment(webhook)}/deliveries/{segment(delivery)}/redeliver", Delivery)
