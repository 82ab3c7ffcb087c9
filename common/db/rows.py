"""The tables. Times are seconds since the epoch by the database's clock; sizes are bytes.

`jobs.seq` numbers a job's events and metrics in one sequence without gaps: every write of either increments it in the
same UPDATE that checks the lease, so the row lock orders them and a reader's cursor never skips one.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, String, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Without a value the column is NULL, and not the JSON null, which "IS NOT NULL" would find.
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Id = String(40)


def _partial(name: str, *columns: str, where: str) -> Index:
    """Return an index of the rows that meet a condition alone; both databases read it in the same words."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


class Base(DeclarativeBase):
    """Declarative base with the constraint names that migrations need."""

    type_annotation_map = {float: Double, dict[str, Any]: Json, str: Text, int: BigInteger}


class JobRow(Base):
    """A job: what was asked (`spec`, frozen), its state, the present attempt, and how far it is."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    spec: Mapped[dict[str, Any]]
    model: Mapped[str]
    priority: Mapped[int] = mapped_column(default=0)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")
    # Of an export: the job whose adapter it merges. No foreign key: an export outlives its source.
    source_job: Mapped[str | None] = mapped_column(Id)

    # Written by common/jobs/lifecycle only.
    status: Mapped[str] = mapped_column(String(16))
    desired: Mapped[str] = mapped_column(String(8), default="run")
    epoch: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[float | None]
    # The pause after a fault, and the user's own wish: a check waits for the first only.
    not_before: Mapped[float] = mapped_column(default=0.0)
    hold_until: Mapped[float] = mapped_column(default=0.0)
    claimed_at: Mapped[float | None]
    attempts: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    faults: Mapped[int] = mapped_column(default=0)
    shrink: Mapped[int] = mapped_column(default=0)
    seq: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=0)

    stage: Mapped[str | None] = mapped_column(String(32))
    # How far the check is, as it last said; of a job that is not being checked it means nothing.
    checked: Mapped[dict[str, Any] | None]
    step: Mapped[int] = mapped_column(default=0)
    max_steps: Mapped[int | None]
    loss: Mapped[float | None]
    tokens_per_s: Mapped[float | None]
    eta_s: Mapped[float | None]

    # Found by preflight: what the base is exactly, and what the data is.
    base_id: Mapped[str | None]
    base_revision: Mapped[str | None]
    dataset_sha256: Mapped[str | None] = mapped_column(String(64))
    preflight: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]

    error: Mapped[dict[str, Any] | None]
    manifest_key: Mapped[str | None]
    manifest_sha256: Mapped[str | None] = mapped_column(String(64))

    created_at: Mapped[float]
    queued_at: Mapped[float | None]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]

    __table_args__ = (
        Index("jobs_by_tenant", "tenant", "id"),
        Index("jobs_by_tenant_status", "tenant", "status", "id"),
        Index("jobs_by_tenant_model", "tenant", "model", "id"),
        # Partial: claiming and sweeping look at the live jobs only, so that a million ended ones cost nothing.
        _partial("jobs_to_check", "priority", "created_at", where="status = 'validating'"),
        # Each tenant's jobs of each priority lie in the order in which they are claimed.
        _partial("jobs_to_claim", "tenant", "priority", "created_at", "id", where="status = 'queued'"),
        _partial("jobs_leased", "lease_expires_at", where="lease_expires_at is not null"),
        _partial("jobs_running", "tenant", where="status = 'running'"),
        _partial("jobs_exported", "source_job", where="source_job is not null"),
        # How fast jobs on the same base were, for forecasts.
        _partial("jobs_succeeded", "base_id", "finished_at", where="status = 'succeeded'"),
    )


class LabelRow(Base):
    """A label of a job, once more beside `jobs.metadata`: an index that both databases have finds jobs by it."""

    __tablename__ = "job_labels"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512), primary_key=True)
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, index=True)


class UsageRow(Base):
    """How long an attempt held a worker. It outlives its job: deleting jobs gives no hours back."""

    __tablename__ = "usage"

    job_id: Mapped[str] = mapped_column(Id, primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[float]
    ended_at: Mapped[float]

    __table_args__ = (
        Index("usage_by_tenant", "tenant", "ended_at", "started_at"),
        Index("usage_by_age", "ended_at"),
    )


class QuotaRow(Base):
    """What a tenant may use; None is no limit. `max_queued` counts every job that waits, paused ones too."""

    __tablename__ = "quotas"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    max_running: Mapped[int | None]
    max_queued: Mapped[int | None]
    max_gpu_hours: Mapped[float | None]
    max_priority: Mapped[int | None]


class EventRow(Base):
    """Something that happened to a job."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    name: Mapped[str] = mapped_column(String(64))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


class MetricRow(Base):
    """Values logged at a step by one attempt."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    epoch: Mapped[int]
    step: Mapped[int]
    kind: Mapped[str] = mapped_column(String(8))
    values: Mapped[dict[str, Any]]


class CheckpointRow(Base):
    """A checkpoint that lies complete in the object store under `prefix`."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    prefix: Mapped[str]
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]
    at: Mapped[float]


class ArtifactRow(Base):
    """One published file of a succeeded job."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(512), primary_key=True)
    key: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))


class DatasetRow(Base):
    """An uploaded file; the object lies under its hash, once per tenant."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(255))
    key: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    expires_at: Mapped[float | None]

    __table_args__ = (
        Index("datasets_by_tenant", "tenant", "id"),
        Index("datasets_by_key", "key"),
        _partial("datasets_expiring", "expires_at", where="expires_at is not null"),
    )


class UploadRow(Base):
    """A file that arrives in parts; `bytes` is its announced size, `lasts_s` how long the whole is kept after that.

    Of one whose parts go straight to the store, the SHA-256 was announced too; `store_upload` is the store's id of it.
    """

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int]
    lasts_s: Mapped[int | None]
    state: Mapped[str] = mapped_column(String(16))
    dataset_id: Mapped[str | None] = mapped_column(Id)
    sha256: Mapped[str | None] = mapped_column(String(64))
    part_bytes: Mapped[int | None]
    store_upload: Mapped[str | None]
    created_at: Mapped[float]
    expires_at: Mapped[float]

    __table_args__ = (
        Index("uploads_by_expiry", "expires_at"),
        _partial("uploads_by_content", "tenant", "sha256", where="sha256 is not null"),
    )


class UploadPartRow(Base):
    """One part of an upload, an object of its own under `key`."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    upload_id: Mapped[str] = mapped_column(Id, ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    key: Mapped[str]
    bytes: Mapped[int]
    created_at: Mapped[float]


class ApiKeyRow(Base):
    """An API key: its SHA-256 (the key has 256 random bits, so no slow hash is needed), tenant and use."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(128))
    hint: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    admin: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    revoked_at: Mapped[float | None]

    __table_args__ = (Index("api_keys_by_tenant", "tenant", "id"),)


class WorkerRow(Base):
    """A worker process, as it last reported itself."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    desired: Mapped[str] = mapped_column(String(8), default="run")
    device: Mapped[str] = mapped_column(String(32))
    device_name: Mapped[str | None] = mapped_column(String(128))
    vram_bytes: Mapped[int | None]
    free_bytes: Mapped[int | None]
    job_id: Mapped[str | None] = mapped_column(Id)
    base_model: Mapped[str | None]
    started_at: Mapped[float]
    heartbeat_at: Mapped[float]

    __table_args__ = (Index("workers_by_heartbeat", "heartbeat_at"),)


class IdempotencyRow(Base):
    """A create that was answered: the same `Idempotency-Key` from the same tenant gets the same job."""

    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[float]

    __table_args__ = (Index("idempotency_by_age", "created_at"),)


class PreviewRow(Base):
    """A preview of a dataset that a preflight worker makes: `id` is a hash of what was asked and by whom."""

    __tablename__ = "previews"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    asked: Mapped[dict[str, Any]] = mapped_column(Json)
    state: Mapped[str] = mapped_column(String(16))
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)
    attempts: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[float | None]
    created_at: Mapped[float]
    expires_at: Mapped[float]

    __table_args__ = (Index("previews_by_state", "state", "created_at"),)


class WebhookRow(Base):
    """Where a tenant wants to be told. `events` None: of everything. The secret must be readable, to sign with it."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    url: Mapped[str]
    description: Mapped[str] = mapped_column(default="")
    events: Mapped[list[str] | None] = mapped_column(Json)
    secret: Mapped[str] = mapped_column(String(64))
    # After a rotation both sign, until everybody who verifies has the new one.
    old_secret: Mapped[str | None] = mapped_column(String(64))
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]
    last_success_at: Mapped[float | None]
    disabled_at: Mapped[float | None]
    disabled_reason: Mapped[str | None]

    __table_args__ = (Index("webhooks_by_tenant", "tenant", "id"),)


class DeliveryRow(Base):
    """One event for one webhook: written with the event itself, sent later. `body` is what is signed, to the byte.

    `attempts` counts every try and tells a late answer from the present one; `failures` counts those since it was last
    asked for, and so says how long the next pause is.
    """

    __tablename__ = "webhook_deliveries"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    webhook_id: Mapped[str] = mapped_column(Id, ForeignKey("webhooks.id", ondelete="CASCADE"))
    type: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(Id)
    body: Mapped[str]
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[float]
    lease_expires_at: Mapped[float | None]
    answer: Mapped[int | None]
    error: Mapped[str | None]
    created_at: Mapped[float]
    ended_at: Mapped[float | None]

    __table_args__ = (
        Index("webhook_deliveries_by_webhook", "webhook_id", "id"),
        _partial("webhook_deliveries_due", "next_at", where="state = 'pending'"),
        _partial("webhook_deliveries_ended", "ended_at", where="ended_at is not null"),
    )


class LeaderRow(Base):
    """Who leads: a lease by name, for the sweeper."""

    __tablename__ = "leaders"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    holder: Mapped[str] = mapped_column(String(128))
    expires_at: Mapped[float]
