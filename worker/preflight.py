"""The work of a preflight worker: check a job on the CPU before a GPU is asked for.

Pins the base model to a revision and the dataset to its hash; every row is parsed and tokenised in a child process
with bounded memory and time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from common import estimates
from common.context import Context
from common.errors import InfraError, LeaseLost, UserError
from common.jobs import doorbell, lifecycle, queries
from common.jobs.lifecycle import Claim, Failure, Limits
from common.schemas.jobs import JobSpec
from worker import bases, failures, previews, specs
from worker.asking import ask
from worker.heart import Heart, Interrupted
from worker.shares import Shares
from worker.trainer.protocol import Checked, Message, Result, TrainSpec
from worker.workplace import Device, Workplace
from worker.writing import persist

_log = logging.getLogger(__name__)


class Preflight:
    """Checks jobs."""

    kind = doorbell.PREFLIGHT

    def __init__(self) -> None:
        self._shares = Shares()

    def prepare(self, context: Context, workplace: Workplace, draining: threading.Event) -> bool:
        """Make previews that wait: somebody sits before them."""
        return previews.make(context, workplace, draining, self._shares)

    def claim(self, context: Context, worker_id: str) -> Claim | None:
        """Claim the next job that waits for its check."""
        with context.write() as session:
            return lifecycle.claim_preflight(session, worker_id, context.settings.lease_s, self._shares.spent())

    def run(self, context: Context, claim: Claim, heart: Heart, workplace: Workplace, device: Device) -> None:
        """Check one job and accept, reject or postpone it."""
        try:
            with self._shares.spending(claim.tenant), workplace.job(claim) as folder:
                _Check(context, claim, heart, folder).run()
        except (LeaseLost, Interrupted) as error:
            _log.info("%s: the check was given up (%s)", claim.job_id, error)
        except Exception:
            # The lease runs out and the sweeper rings again.
            _log.exception("%s: the check could not be settled", claim.job_id)

    def mark(self) -> int | None:
        """Return the same all the time: nothing of a check is on a card."""
        return 0

    def close(self) -> None:
        """Do nothing: a check leaves nothing behind."""


class _Check:
    def __init__(self, context: Context, claim: Claim, heart: Heart, folder: Path):
        self._context = context
        self._claim = claim
        self._heart = heart
        self._folder = folder
        self._limits = Limits(context.settings.crash_loop_attempts, context.settings.retry_max_s)

    def run(self) -> None:
        try:
            spec = self._fetch()
            settings = self._context.settings
            command = [settings.preflight_module, str(self._folder)]
            alive, timeout_s = self._heart.check_mere_life, settings.preflight_timeout_s
            answer = ask(command, self._folder, settings, alive, timeout_s, self._hear)
        except UserError as error:
            self._reject(failures.of_user(error))
        except InfraError as error:
            self._postpone(failures.of_infrastructure(error))
        except OSError as error:
            self._postpone(failures.of_disk("worker_io", f"The checking worker's disk failed: {error.strerror}."))
        except (DBAPIError, PoolTimeout) as error:
            self._postpone(Failure("infra", "database_away", f"The database was away ({type(error).__name__})."))
        except Interrupted as stop:
            if stop.wish != "drain":
                raise
            # Given back at once: nobody should wait for the end of this lease.
            self._postpone(Failure("infra", "drained", "The checking worker is leaving."))
        except LeaseLost:
            raise
        except Exception as error:
            # An error of this program, counted: what breaks every check must end the job, with a reason.
            _log.exception("%s: the check broke", self._claim.job_id)
            self._postpone(Failure("crash", "check_broke", f"The check failed ({type(error).__name__})."))
        else:
            self._settle(spec, answer)

    def _fetch(self) -> TrainSpec:
        context, alive = self._context, self._heart.check_mere_life
        with context.read() as session:
            job = queries.row(session, self._claim.tenant, self._claim.job_id)
        base = bases.resolve(job.spec["model"], context.settings)
        path = bases.fetch(base, context.settings, alive, weights=False)
        files = specs.fetch_files(context, job, self._folder, alive)
        return specs.write(self._folder, specs.of(context.settings, self._claim, job, base, path, files), device="cpu")

    def _hear(self, message: Message) -> None:
        """Show how far the check is; what the database does not take at once is not worth a second try."""
        if not isinstance(message, Checked):
            return
        try:
            with self._context.write() as session:
                lifecycle.checking(session, self._claim, vars(message))
        except (DBAPIError, PoolTimeout) as error:
            _log.warning("%s: the database did not take a report (%s)", self._claim.job_id, type(error).__name__)

    def _settle(self, spec: TrainSpec, answer: Result | Failure) -> None:
        if isinstance(answer, Failure):
            (self._reject if answer.kind == "user_error" else self._postpone)(answer)
            return
        self._write(lambda session: self._accept(session, spec, answer.report))

    def _accept(self, session: Session, spec: TrainSpec, report: dict[str, Any]) -> None:
        memory, warnings = estimates.of_check(session, JobSpec.model_validate(spec.job), report)
        lifecycle.accept(
            session,
            self._claim,
            base_id=spec.base.id,
            base_revision=spec.base.revision,
            dataset_sha256=spec.train_sha256,
            report=report | memory,
            warnings=warnings,
        )

    def _reject(self, failure: Failure) -> None:
        self._write(lambda session: lifecycle.reject(session, self._claim, failure))

    def _postpone(self, failure: Failure) -> None:
        self._write(lambda session: lifecycle.postpone(session, self._claim, failure, self._limits))

    def _write(self, change: Callable[[Session], None]) -> None:
        persist(self._context, self._heart, change)
