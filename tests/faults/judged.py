"""An installation whose every change is audited, and whose jobs the checker judges afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import update

from common.db.engine import db_now
from common.db.rows import JobRow
from tests.faults import audit
from tests.faults.checker import Checker, Verdict
from tests.faults.evidence import Bucket, Database
from tests.faults.journal import Journal
from tests.worker.conftest import TENANT, Bench
from worker.sweeper import Sweeper

DATA = '{"text": "a"}\n{"text": "b"}\n'


class Judged:
    """A bench that remembers what it submitted, as a user would."""

    def __init__(self, bench: Bench, folder: Path):
        self.bench = bench
        self.journal = Journal(folder / "journal.jsonl")
        self.trail = folder / "trail"
        audit.install(bench.context.sessions.engine)

    def submit(self, steps: int = 6, *, data: str = DATA, code: str | None = None, **metadata: object) -> str:
        """Submit a job that must succeed, or fail with `code`."""
        dataset = self.bench.dataset(data)
        job_id = self.bench.submit(dataset, steps=steps, trail=self.trail, **metadata)
        self.accepted(job_id, steps, data, code)
        return job_id

    def accepted(self, job_id: str, steps: int, data: str = DATA, code: str | None = None) -> None:
        """Remember a job that was accepted."""
        spec: dict[str, Any] = self.bench.row(job_id).spec
        self.journal.write(
            "accepted", job=job_id, key=job_id, tries=1, seconds=0, way="test", seed=spec["seed"], steps=steps,
            code=code, data=data,
        )  # fmt: skip

    def expire(self, job_id: str) -> None:
        """Let the lease of a job end as if its time had passed, and the sweeper find it."""
        late = update(JobRow).where(JobRow.id == job_id, JobRow.lease_expires_at > db_now())
        with self.bench.context.write() as session:
            session.execute(late.values(lease_expires_at=db_now()))
        Sweeper(self.bench.context).sweep()

    def finish(self) -> None:
        """Check and train whatever waits, in this process."""
        self.bench.check()
        self.bench.train()

    def checker(self) -> Checker:
        """Return a checker over what there is now."""
        settings = self.bench.context.settings
        secret = settings.s3_secret_access_key
        assert settings.s3_endpoint_url and settings.s3_access_key_id and secret
        bucket = Bucket(
            settings.s3_endpoint_url, settings.s3_access_key_id, secret.get_secret_value(), settings.s3_bucket
        )
        return Checker(Database(settings.database_url), bucket, self.journal.path, self.trail)

    def verdict(self) -> Verdict:
        """Judge what there is now."""
        return self.checker().judge()


__all__ = ["DATA", "TENANT", "Judged"]
