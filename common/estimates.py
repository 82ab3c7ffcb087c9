"""What a job would take: tokens, steps, memory on each known worker, time. Nothing is created.

Tokens come from the check of an earlier job on the same dataset, or from a sample; the base's sizes from its folder,
from an earlier check, or from the hub. No session is open while store or hub are asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from common import base_models, datasets, sampling, submission, workers
from common.context import Context
from common.db.rows import JobRow
from common.errors import TuneryError
from common.jobs import forecast, line, quotas
from common.jobs.lifecycle import Event
from common.keys import Caller
from common.memory import fitting
from common.memory.fits import on_worker, on_workers, room
from common.memory.fitting import BatchPlan, Rows
from common.memory.setup import read_setup
from common.memory.shape import Shape, read_shape, stored_shape
from common.schedule import auto_epochs, resolve_max_length, total_steps
from common.schemas.estimates import JobEstimate, TokenEstimate, WorkerEstimate
from common.schemas.jobs import JobSpec
from common.schemas.workers import Worker

# What decides how a dataset is counted, besides its content and the base's tokenizer.
_COUNTED_ALIKE = ("model", "dataset", "validation_split", "chat_template")
_LOOKED_AT = 50


@dataclass
class _Foreseen:
    # What is found out on the way, and why what is missing cannot be told.
    spec: JobSpec
    shape: Shape | None = None
    max_length: int = 0
    tokens: TokenEstimate | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> Rows:
        """The rows as a micro-batch sees them: as long as they may be, where they are not known."""
        longest, mean = self.max_length, self.max_length / 2
        if self.tokens is not None:
            longest, mean = self.tokens.longest_row_tokens, self.tokens.tokens / max(1, self.tokens.rows)
        asked = self.spec.hyperparameters
        return fitting.read_rows(asked, longest=longest, mean=mean, max_length=self.max_length)


def estimate(context: Context, who: Caller, spec: JobSpec) -> JobEstimate:
    """Return what `spec` would take.

    Raises:
        InvalidInput: as submitting it would, or as its check would: rows longer than the base's context.
        OverQuota: the tenant may submit no job now.
    """
    found = _Foreseen(spec)
    with context.read() as session:
        submission.check(session, context.settings, who.tenant, spec)
        quotas.admit(session, who.tenant, spec.priority)
        known = _checked_shape(session, who.tenant, spec)
    found.shape = known or _shape(context, found)
    found.max_length = resolve_max_length(spec.hyperparameters, found.shape.context if found.shape else None)
    with context.read() as session:
        found.tokens = _counted(session, who.tenant, found)
    found.tokens = found.tokens or _sampled(context, who.tenant, found)
    with context.read() as session:
        return _settled(session, context, who.tenant, found)


def of_check(session: Session, spec: JobSpec, report: Mapping[str, Any]) -> tuple[dict[str, Any], list[Event]]:
    """Return what the report of a check says of memory, and a warning where no worker that is known has so much."""
    shape = stored_shape(report.get("shape"))
    if shape is None:
        return {}, []
    setup, wish = read_setup(spec, shape), fitting.read_wish(spec.hyperparameters)
    lengths = {"longest": report["longest_row_tokens"], "mean": report["tokens"] / max(1, report["rows"])}
    rows = fitting.read_rows(spec.hyperparameters, **lengths, max_length=report["max_length"])
    crew = _trainers(session)
    memory, _ = on_workers(wish, setup, rows, crew)
    told = {
        "device": memory.device,
        "estimated": memory.model_dump(include={"parts", "paged_bytes", "allocated_bytes", "total_bytes"}),
        "estimated_bytes": memory.total_bytes,
        "batch": memory.model_dump(include={"rows", "length", "checkpointed_layers"}),
    }
    fits = [on_worker(wish, setup, rows, worker) for worker in crew]
    if not fits or any(worker.fits is not False for worker in fits):
        return {"memory": told}, []
    message = (
        f"about {memory.total_bytes / 2**30:.1f} GiB are needed, more than the card of any worker has free "
        f"(the largest is {memory.device}): it may run out of memory; a smaller batch or max_length, or checkpointing, "
        "takes less"
    )
    data = {"needed_bytes": memory.total_bytes, "largest_bytes": max(room(worker) or 0 for worker in crew)}
    return {"memory": told}, [Event("memory.tight", message, "warning", data)]


def _trainers(session: Session) -> list[Worker]:
    return [worker for worker in workers.listed(session) if worker.kind == "train" and worker.state != "gone"]


def _checked_shape(session: Session, tenant: str, spec: JobSpec) -> Shape | None:
    """Return the shape that the check of an earlier job of the tenant has found."""
    query = select(JobRow.preflight).where(
        JobRow.tenant == tenant, JobRow.model == spec.model, JobRow.preflight.is_not(None)
    )
    found = session.scalar(query.order_by(JobRow.id.desc()).limit(1))
    return stored_shape((found or {}).get("shape"))


def _shape(context: Context, found: _Foreseen) -> Shape | None:
    # The hub's library takes a fifth of the API's start, and only this asks it.
    from common import hub

    model = found.spec.model
    try:
        name = model.partition("@")[0]
        config = hub.config(model, context.settings) if "/" in name else base_models.config(name, context.settings)
    except TuneryError as error:
        found.unknown["memory"] = f"the base's configuration could not be read: {error.message}"
        return None
    shape = read_shape(config)
    if shape is None:
        found.unknown["memory"] = "the base's config.json does not say its sizes"
    return shape


def _counted(session: Session, tenant: str, found: _Foreseen) -> TokenEstimate | None:
    """Return what the check of an earlier job has counted on the same dataset, for the same tokenizer and cut."""
    spec = found.spec
    same = (JobRow.tenant == tenant, JobRow.model == spec.model, JobRow.spec["dataset"].as_string() == spec.dataset)
    query = select(JobRow.id, JobRow.spec, JobRow.preflight).where(*same, JobRow.preflight.is_not(None))
    asked = spec.model_dump(mode="json")
    for row in session.execute(query.order_by(JobRow.id.desc()).limit(_LOOKED_AT)):
        report: Mapping[str, Any] = row.preflight
        alike = all(row.spec.get(name) == asked[name] for name in _COUNTED_ALIKE) and _cuts(row.spec) == _cuts(asked)
        if alike and report.get("max_length") == found.max_length and "tokens" in report:
            tokens, longest = report["tokens"], report["longest_row_tokens"]
            return TokenEstimate(
                source="counted",
                job=row.id,
                rows=report["rows"],
                tokens=tokens,
                low=tokens,
                high=tokens,
                longest_row_tokens=longest,
            )
    return None


def _cuts(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    asked = spec["hyperparameters"]
    return asked.get("loss", "auto"), asked.get("packing") == "wrapped"


def _sampled(context: Context, tenant: str, found: _Foreseen) -> TokenEstimate | None:
    spec = found.spec
    if not spec.dataset.startswith(datasets.SCHEME):
        found.unknown["tokens"] = (
            "only uploaded datasets, and those that the check of a job has seen, can be estimated: "
            "POST /datasets uploads one"
        )
        return None
    with context.read() as session:
        row = datasets.get(session, tenant, spec.dataset.removeprefix(datasets.SCHEME))
    with context.store.open(row.key) as stream:
        head = stream.read(min(row.bytes, sampling.SAMPLE_BYTES))
    sample = sampling.read_sample(head, row.bytes, found.max_length)
    if sample is None:
        found.unknown["tokens"] = "the rows of this format are read by the check of a job only"
        return None
    rows = max(1, round(sample.rows * (1 - (spec.validation_split or 0.0))))
    tokens = round(rows * sample.mean)
    most = rows * found.max_length
    return TokenEstimate(
        source="sampled",
        rows=rows,
        tokens=tokens,
        low=round(tokens * sampling.LOW),
        high=min(most, round(tokens * sampling.HIGH)),
        longest_row_tokens=min(found.max_length, round(sample.longest * sampling.HIGH)),
    )


def _settled(session: Session, context: Context, tenant: str, found: _Foreseen) -> JobEstimate:
    spec = found.spec
    crew = _trainers(session)
    setup = read_setup(spec, found.shape) if found.shape else None
    wish = fitting.read_wish(spec.hyperparameters)
    memory, plan = on_workers(wish, setup, found.rows, crew) if setup else (None, None)
    steps, train_tokens = _steps(found, plan)
    if found.tokens is not None:
        found.tokens.train_tokens = train_tokens
    elif spec.hyperparameters.max_steps in (-1, "auto"):
        steps, found.unknown["steps"] = None, found.unknown["tokens"]
    speeds = forecast.speeds_by_device(session, base_models.public_id(spec.model, context.settings), spec.method)
    shown = [_timed(on_worker(wish, setup, found.rows, worker), worker.device, speeds, train_tokens) for worker in crew]
    if not crew:
        found.unknown["workers"] = "no GPU worker is connected"
    return JobEstimate(
        tokens=found.tokens,
        steps=steps,
        memory=memory,
        workers=shown,
        position=line.next_position(session, tenant, spec.priority),
        not_before=spec.not_before,
        unknown=found.unknown,
    )


def _steps(found: _Foreseen, plan: BatchPlan | None) -> tuple[int | None, int | None]:
    """Return the optimizer steps, and the tokens of all of them."""
    asked, tokens = found.spec.hyperparameters, found.tokens
    rows = tokens.rows if tokens else 0
    packed = asked.packing not in (False, "auto")
    sequences = max(1, -(-tokens.tokens // found.max_length)) if packed and tokens else rows
    epochs = auto_epochs(rows) if asked.num_train_epochs == "auto" else asked.num_train_epochs
    most = -1 if asked.max_steps == "auto" else asked.max_steps
    micro, accumulation = (plan.micro_batch, plan.accumulation) if plan else _given(found.spec)
    steps = total_steps(sequences, micro, accumulation, epochs, most)
    if tokens is None:
        return steps, None
    seen = steps * micro * accumulation / max(1, sequences) if most > 0 else epochs
    return steps, round(tokens.tokens * seen)


def _given(spec: JobSpec) -> tuple[int, int]:
    wish = fitting.read_wish(spec.hyperparameters)
    return wish.micro_batch or 4, wish.accumulation or 4


def _timed(
    shown: WorkerEstimate, device: str | None, speeds: Mapping[str, forecast.Speed], train_tokens: int | None
) -> WorkerEstimate:
    speed = speeds.get(shown.device_name or device or "")
    if speed is None:
        told = "no job of this method on this base has succeeded on such a device, so its speed is not known"
        return shown.model_copy(update={"message": shown.message or told})
    duration_s = None if train_tokens is None else round(speed.duration_s(train_tokens), 1)
    return shown.model_copy(update={"tokens_per_s": round(speed.tokens_per_s, 1), "duration_s": duration_s})
