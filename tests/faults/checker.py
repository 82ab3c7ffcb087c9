"""Judges a run by what it left behind, without knowing the product's code.

Every accepted job ended exactly once, as its data demands; an adapter is what an undisturbed run would have made; no
attempt wrote after another had taken over or after its lease had ended; nothing was left running.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.evidence import Bucket, Database, Row, Step, decoded, read_trail
from tests.faults.journal import entries

ENDED = {"succeeded", "failed", "cancelled"}
LEGAL = {
    "validating": {"queued", "paused", "failed", "cancelled"},
    "queued": {"running", "paused", "cancelled"},
    "running": {"succeeded", "failed", "queued", "paused", "cancelled"},
    "paused": {"queued", "cancelled"},
}
# Changes that only the holder of a live lease may make.
_BY_HOLDER = {
    ("validating", "queued"), ("validating", "paused"), ("validating", "failed"),
    ("running", "succeeded"), ("running", "failed"),
}  # fmt: skip
# Between the guard's look at the clock and the trigger's, a Postgres on a busy machine may be off its core.
_SLACK_S = 0.5
_TRAIL_SLACK_S = 0.05


@dataclass(frozen=True)
class Verdict:
    """What is wrong; each list holds sentences that name the job."""

    lost: list[str]
    doubled: list[str]
    wrong: list[str]
    stale: list[str]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.wrong or self.stale)


class Checker:
    """Compares rows, objects and logs with what was accepted."""

    def __init__(self, database: Database, bucket: Bucket, journal: Path, trail: Path):
        self._bucket = bucket
        self.accepted = {entry["job"]: entry for entry in entries(journal, "accepted")}
        self._answers = entries(journal, "accepted")
        self.rows = {row["id"]: row for row in database.rows("SELECT * FROM jobs")}
        self.audit: dict[str, list[Row]] = _by_job(database.rows("SELECT * FROM fault_audit ORDER BY n"))
        self._events = _by_job(database.rows("SELECT job_id, seq, name FROM job_events"))
        self._metrics = _by_job(database.rows("SELECT job_id, seq, epoch, step FROM metrics"))
        self._artifacts = _by_job(database.rows("SELECT * FROM artifacts"))
        self.trail = read_trail(trail)

    def judge(self) -> Verdict:
        """Return everything that is wrong."""
        return Verdict(list(self._lost()), list(self._doubled()), list(self._wrong()), list(self._stale()))

    # ---- every accepted job ended, as it had to ----------------------------------------------------------------------

    def _lost(self) -> Iterator[str]:
        for job, told in self.accepted.items():
            row = self.rows.get(job)
            if row is None:
                yield f"{job} was accepted and has no row"
            elif row["status"] not in ENDED:
                yield f"{job} is {row['status']} at the end (desired {row['desired']}, epoch {row['epoch']})"
            elif row["worker_id"] or row["lease_expires_at"]:
                yield f"{job} has ended and is still leased"
            elif row["status"] == "failed" and told["code"] is None:
                yield f"{job} ({told['way']}) failed: {decoded(row['error'])}"

    def _doubled(self) -> Iterator[str]:
        for key, count in Counter(answer["key"] for answer in self._answers).items():
            if count > 1:
                yield f"the request {key} made {count} jobs"
        for job in self.rows.keys() - self.accepted.keys():
            yield f"{job} is there and was never answered"
        for job, changes in self.audit.items():
            ends = [change for change in changes if change["status"] in ENDED - {change["old_status"]}]
            if len(ends) > 1:
                yield f"{job} ended {len(ends)} times: {[end['status'] for end in ends]}"
            if len(published := {change["manifest_key"] for change in ends if change["manifest_key"]}) > 1:
                yield f"{job} published {len(published)} manifests"
        for job, events in self._events.items():
            names = [event["name"] for event in events if event["name"].removeprefix("job.") in ENDED]
            if len(names) > 1:
                yield f"{job} tells of its end {len(names)} times: {names}"

    # ---- what was published is what an undisturbed run makes ---------------------------------------------------------

    def _wrong(self) -> Iterator[str]:
        for job, told in self.accepted.items():
            row = self.rows.get(job)
            if row is None:
                continue
            error = decoded(row["error"]) or {"code": "no reason"}
            if row["status"] == "failed" and told["code"] not in (None, error["code"]):
                yield f"{job} should fail with {told['code']} and did with {error}"
            if row["status"] == "succeeded":
                yield from self._wrong_success(job, told, row)
            elif row["manifest_key"] or self._artifacts[job]:
                yield f"{job} is {row['status']} and has a manifest"
            yield from self._wrong_sequence(job, row)
        yield from self._wrong_steps()

    def _wrong_success(self, job: str, told: dict[str, Any], row: Row) -> Iterator[str]:
        if told["code"] is not None:
            yield f"{job} ({told['way']}) succeeded"
            return
        prefix = f"{row['tenant']}/{job}/a{row['epoch']}/"
        if row["manifest_key"] != f"{prefix}manifest.json":
            yield f"{job} refers to {row['manifest_key']} and ended in attempt {row['epoch']}"
        body = self._bucket.get(row["manifest_key"])
        if body is None or hashlib.sha256(body).hexdigest() != row["manifest_sha256"]:
            yield f"{job}: the manifest in the store is not the one of the row"
            return
        manifest = json.loads(body)
        listed = {file["name"]: file for file in [*manifest["files"], manifest["archive"]]}
        rows = {item["name"]: item for item in self._artifacts[job] if item["name"] != "manifest.json"}
        if {name: file["sha256"] for name, file in rows.items()} != {
            file["name"]: file["sha256"] for file in manifest["files"]
        }:
            yield f"{job}: the rows of the artifacts are not what the manifest lists"
        for name, file in listed.items():
            content = self._bucket.get(prefix + name)
            if content is None or (len(content), hashlib.sha256(content).hexdigest()) != (
                file["bytes"],
                file["sha256"],
            ):
                yield f"{job}: {name} in the store is not what the manifest says"
        if self._bucket.get(f"{prefix}adapter/adapter_model.safetensors") != _chain(told)[told["steps"]].encode():
            yield f"{job}: the adapter is not what an undisturbed run makes"

    def _wrong_sequence(self, job: str, row: Row) -> Iterator[str]:
        numbers = sorted(each["seq"] for each in [*self._events[job], *self._metrics[job]])
        if numbers != list(range(1, row["seq"] + 1)):
            yield f"{job}: events and metrics are numbered {numbers[:50]} up to {row['seq']}"

    def _wrong_steps(self) -> Iterator[str]:
        chains = {job: _chain(told) for job, told in self.accepted.items() if told["data"]}
        for step in self.trail:
            if step.job in chains and chains[step.job][step.step] != step.value:
                yield f"{step.job}: attempt {step.epoch} computed something else at step {step.step}"

    # ---- nobody wrote who had lost his lease -------------------------------------------------------------------------

    def _stale(self) -> Iterator[str]:
        for job, changes in self.audit.items():
            guard: Row | None = None
            for change in changes:
                guard = change if change["what"] == "changed" else guard
                if reason := _illegal(change, guard):
                    yield f"{job}, audit {change['n']}: {reason}: {dict(change)}"
            claims = {row["epoch"]: row["at"] for row in changes if row["epoch"] not in (None, row["old_epoch"])}
            for step in self._steps_of(job):
                taken = min((at for epoch, at in claims.items() if epoch > step.epoch), default=None)
                if taken is not None and step.at > taken + _TRAIL_SLACK_S:
                    yield f"{job}: attempt {step.epoch} computed {step.at - taken:.3f} s after the next had begun"

    def _steps_of(self, job: str) -> list[Step]:
        if not hasattr(self, "_steps"):
            self._steps: dict[str, list[Step]] = defaultdict(list)
            for step in self.trail:
                self._steps[step.job].append(step)
        return self._steps[job]

    # ---- measures ----------------------------------------------------------------------------------------------------

    def repeated_steps(self) -> tuple[int, int]:
        """Return how many steps were computed, and how many of them had been computed before."""
        steps = [(step.job, step.step) for step in self.trail if step.what == "step"]
        return len(steps), len(steps) - len(set(steps))


def _illegal(change: Row, guard: Row | None) -> str | None:
    """Return what is wrong with one change of a job, or None; `guard` is the latest change of the job's own row."""
    what, before, after = change["what"], change["old_status"], change["status"]
    if what in ("metric", "checkpoint"):
        # The lease is judged at the guard: from there to the commit the row is held, and nobody else can take the job.
        ok = before == "running" and change["epoch"] == change["old_epoch"]
        guarded = guard is not None and guard["tx"] == change["tx"] and _alive(guard)
        return None if ok and guarded else f"a {what} of an attempt that does not own the job"
    if what != "changed":
        return None if what in ("submitted", "artifact") else "a job was deleted"
    if before in ENDED:
        return "a job was changed after its end"
    if before != after and after not in LEGAL[before]:
        return "an edge that does not exist"
    claimed = change["epoch"] != change["old_epoch"]
    if claimed and (change["epoch"] != change["old_epoch"] + 1 or (before, after) not in _CLAIMS):
        return "an epoch that does not rise by one at a claim"
    if claimed and change["old_lease"] is not None and change["old_lease"] > change["at"] + _SLACK_S:
        return "a claim over a live lease"
    if (before, after) in _BY_HOLDER and not _alive(change):
        return "the end of an attempt whose lease had ended"
    if not claimed and change["lease"] is not None and change["lease"] != change["old_lease"] and not _alive(change):
        return "a renewal of a lease that had ended"
    return None


_CLAIMS = {("queued", "running"), ("validating", "validating")}


def _alive(change: Row) -> bool:
    return change["old_lease"] is not None and change["at"] <= change["old_lease"] + _SLACK_S


def _chain(told: dict[str, Any]) -> list[str]:
    """Return the values of the chain at each step, from 0: what an undisturbed run computes."""
    value = hashlib.sha256(told["data"].encode() + str(told["seed"]).encode()).hexdigest()
    values = [value]
    for step in range(1, told["steps"] + 1):
        values.append(hashlib.sha256(f"{values[-1]}{step}".encode()).hexdigest())
    return values


def _by_job(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found
