"""One attempt at one job: fetch, train in a child process, publish, settle.

Whatever happens, exactly one of these ends it: `publish`, `fail`, `fault`, `release`, or, where the lease is lost,
nothing at all: then the job is somebody else's.
"""

from __future__ import annotations

import errno
import logging
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from common.context import Context
from common.db.rows import JobRow
from common.errors import InfraError, InvalidInput, LeaseLost, UserError
from common.jobs import lifecycle, queries
from common.jobs.lifecycle import Claim, Event, Failure, Limits
from worker import bases, failures, publish, specs
from worker.driving import Driver
from worker.heart import Heart, Interrupted
from worker.recorder import Recorder
from worker.resuming import Checkpoints
from worker.source import fetch_source
from worker.trainer import protocol
from worker.trainer.protocol import Checkpoint, Failed, Result, TrainSpec
from worker.trainers import Trainers
from worker.writing import persist

_POLL_S = 0.2
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Attempt:
    """An attempt under `claim`, whose lease `heart` renews, in `folder`, on `device`, by one of `trainers`."""

    def __init__(self, context: Context, claim: Claim, heart: Heart, folder: Path, device: str, trainers: Trainers):
        self._context = context
        self._settings = context.settings
        self._claim = claim
        self._heart = heart
        self._folder = folder
        self._device = device
        self._trainers = trainers
        self._limits = Limits(self._settings.crash_loop_attempts, self._settings.retry_max_s)
        self._recorder = Recorder(context, claim)
        self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._pending: list[Future[None]] = []
        self._result: Result | None = None
        self._failed: Failed | None = None
        self.base_id: str | None = None

    def run(self) -> None:
        """Take the attempt to its end. Never raises: an error of this program is a fault of the attempt too."""
        try:
            self._run()
        except LeaseLost as error:
            _log.warning("%s: the lease is lost: %s", self._claim.job_id, error.message)
        except Exception as error:
            _log.exception("%s: the attempt broke", self._claim.job_id)
            self._settle_broken(error)
        finally:
            self._uploads.shutdown(wait=True, cancel_futures=True)

    def _settle_broken(self, error: Exception) -> None:
        """Count an error of this program as a crash: what breaks every attempt must end the job, with a reason."""
        failure = Failure("crash", "worker_broke", f"The worker failed ({type(error).__name__}).")
        try:
            self._fault(failure)
        except Exception as again:
            # The lease runs out and the sweeper queues the job again.
            _log.warning("%s: the attempt could not be settled: %r", self._claim.job_id, again)

    def _run(self) -> None:
        try:
            spec = self._fetch()
            while (code := self._train(spec)) == protocol.BAD_CHECKPOINT and spec.resume_from is not None:
                spec = self._resume_elsewhere(spec)
            self._heart_or_stop()
            self._settle(spec, code)
        except Interrupted as stop:
            self._release_for(stop.wish)
        except UserError as error:
            self._fail(failures.of_user(error))
        except InfraError as error:
            self._fault(failures.of_infrastructure(error))
        except OSError as error:
            reason = "disk_full" if error.errno == errno.ENOSPC else "worker_io"
            self._fault(failures.of_disk(reason, f"The worker's disk failed: {error.strerror}."))
        except (DBAPIError, PoolTimeout) as error:
            self._fault(Failure("infra", "database_away", f"The database was away ({type(error).__name__})."))

    # ---- fetch -------------------------------------------------------------------------------------------------------

    def _fetch(self) -> TrainSpec:
        with self._context.read() as session:
            job = queries.row(session, self._claim.tenant, self._claim.job_id)
        files = self._files(job)
        base = self._base(job)
        self.base_id = base.id
        path = bases.fetch(base, self._settings, self._heart.check, weights=True)
        spec = specs.of(self._settings, self._claim, job, base, path, files)
        self._checkpoints = Checkpoints(self._context, self._claim, self._folder, self._recorder)
        return specs.write(
            self._folder,
            spec,
            resume_from=self._checkpoints.next(spec.config_hash, self._heart.check),
            device=self._device,
            shrink=job.shrink,
            keep=self._settings.warm_base_s > 0,
            cache=bases.quantized_cache(self._settings),
            claimed_at=self._heart.claimed_at,
        )

    def _resume_elsewhere(self, spec: TrainSpec) -> TrainSpec:
        """Return the spec with the next older checkpoint, or none: the trainer could not use the one that it got."""
        said, self._failed = self._failed, None
        self._checkpoints.refuse(said.message if said else "the trainer could not use it")
        shutil.rmtree(self._folder / str(spec.resume_from), ignore_errors=True)
        following = self._checkpoints.next(spec.config_hash, self._heart.check)
        return specs.write(self._folder, spec, resume_from=following)

    def _files(self, job: JobRow) -> specs.Files:
        if job.source_job is None:
            return specs.fetch_files(self._context, job, self._folder, self._heart.check)

        def missing(reason: str) -> None:
            self._recorder.event("export.without_data", f"The data is not there to compare on: {reason}.", "warning")

        return fetch_source(self._context, job, self._folder, self._heart.check, missing)

    def _base(self, job: JobRow) -> bases.Base:
        pinned = bases.Base(str(job.base_id), job.base_revision)
        name = job.spec["model"].partition("@")[0]
        if "/" in name:
            return pinned
        found = bases.local(name, self._settings)
        if (found.id, found.revision) != (pinned.id, pinned.revision):
            raise InvalidInput(
                f"model: the folder {name!r} holds {found.id}@{found.revision} now; "
                f"the job was checked with {pinned.id}@{pinned.revision}",
                code="base_changed",
                param="model",
                hint="Submit the job again, or ask the operator for the base that was there.",
            )
        return found

    # ---- train -------------------------------------------------------------------------------------------------------

    def _train(self, spec: TrainSpec) -> int:
        driver = Driver(self._heart, self._settings, self._hear, self._recorder.flush_if_due)
        key = spec.base_key()
        child = self._trainers.take(key)
        ended = None if child is None else driver.drive(child, self._folder, again=True)
        if ended is not None and ended.unheard and self._heart.wish == "run":
            _log.info("%s: the process that held the base was gone", spec.job_id)
            ended = None
        if child is None or ended is None:
            child = self._trainers.start(self._folder)
            ended = driver.drive(child, self._folder)
        if ended.code not in (protocol.DONE, protocol.DRAINED):
            _log.warning("%s: the trainer ended with %d:\n%s", spec.job_id, ended.code, child.log_tail())
        if ended.waits:
            self._trainers.keep(child, key if self._heart.wish == "run" else None)
        self._finish_uploads()
        return ended.code

    def _hear(self, message: protocol.Message) -> None:
        if isinstance(message, Checkpoint):
            self._pending.append(self._uploads.submit(self._keep, message))
        elif isinstance(message, Result):
            self._result = message
        elif isinstance(message, Failed):
            self._failed = message
        else:
            self._recorder.take(message)

    def _keep(self, message: Checkpoint) -> None:
        """Upload a checkpoint and record it; one that cannot be uploaded costs work if the worker dies, not the job."""
        if self._heart.lost:
            return
        try:
            kept = publish.checkpoint(self._context.store, self._claim, self._folder / message.folder)
            self._write(
                lambda session: lifecycle.checkpointed(
                    session,
                    self._claim,
                    step=message.step,
                    prefix=kept.prefix,
                    manifest_sha256=kept.manifest_sha256,
                    num_bytes=kept.bytes,
                )
            )
            # The trainer does not look back: what lies in the store need not fill this disk.
            shutil.rmtree(self._folder / message.folder, ignore_errors=True)
        except (InfraError, OSError) as error:
            _log.warning("%s: the checkpoint at step %d was not kept: %s", self._claim.job_id, message.step, error)

    def _finish_uploads(self) -> None:
        self._recorder.flush()
        for pending in self._pending:
            self._await(pending)
        self._pending.clear()
        self._recorder.flush()

    def _await(self, upload: Future[T]) -> T:
        """Return what `upload` returns; a store that does not answer must not keep a cancelled job alive."""
        while True:
            try:
                return upload.result(timeout=_POLL_S)
            except FutureTimeout:
                if upload.done():
                    raise
                self._heart_or_stop()

    # ---- settle ------------------------------------------------------------------------------------------------------

    def _heart_or_stop(self) -> None:
        if self._heart.lost:
            raise LeaseLost(f"attempt {self._claim.epoch} lost its lease")
        if self._heart.wish == "cancel":
            raise Interrupted("cancel")

    def _settle(self, spec: TrainSpec, code: int) -> None:
        if self._result is not None:
            # With its result a run is whole. What its process met afterwards, writing its base down, is not the job's.
            self._publish(spec, self._result)
        elif code == protocol.DRAINED or (code == -signal.SIGKILL and self._heart.wish in ("pause", "drain")):
            self._release_for(self._heart.wish)
        elif code in (protocol.BAD_INPUT, protocol.DIVERGED):
            self._fail(self._failure("user_error" if code == protocol.BAD_INPUT else "diverged"))
        else:
            self._fault(self._failure(*failures.kind_of_exit(code), code))

    def _failure(self, kind: str, attempts: int | None = None, code: int = 0) -> Failure:
        if (said := self._failed) is not None and kind == "user_error":
            return failures.of_refusal(said)
        if said is not None:
            return Failure(kind, said.code, said.message, said.hint, said.param, attempts)
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Failure(kind, "trainer_died", f"The trainer ended with {ended}.", attempts=attempts)

    def _publish(self, spec: TrainSpec, result: Result) -> None:
        self._recorder.stage("publish")
        published = self._await(
            self._uploads.submit(
                publish.artifacts, self._context.store, self._claim, spec, self._folder / "out", result.report
            )
        )
        self._heart_or_stop()
        self._write(lambda session: lifecycle.publish(session, self._claim, published, result.report))

    def _fail(self, failure: Failure) -> None:
        self._write(lambda session: lifecycle.fail(session, self._claim, failure))

    def _fault(self, failure: Failure) -> None:
        self._write(lambda session: lifecycle.fault(session, self._claim, failure, self._limits))

    def _release_for(self, wish: str) -> None:
        if wish == "lost":
            raise LeaseLost(f"attempt {self._claim.epoch} lost its lease")
        event = Event("job.released", "The worker is leaving; the job goes on from its last checkpoint.")
        self._write(lambda session: lifecycle.release(session, self._claim, event))

    def _write(self, change: Callable[[Session], T]) -> T:
        return persist(self._context, self._heart, change)
