"""The one writer of status keeps its promises on every database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import ceil

import pytest
from sqlalchemy import select, update

from common.db.engine import Sessions, db_now
from common.db.rows import EventRow, JobRow
from common.errors import LeaseLost, NotFound, WrongState
from common.jobs import lifecycle, queries, states
from common.jobs.lifecycle import Claim, Event, Failure, Limits, MetricPoint, Published
from common.jobs.selection import Selection
from common.schemas.jobs import CheckProgress, JobSpec
from worker.shares import Shares

LIMITS = Limits(crash_loop_attempts=3, retry_max_s=60)
SPEC = JobSpec(model="org/base", dataset="s3://bucket/train.jsonl")
PUBLISHED = Published(
    "t/j/a2/manifest.json", "f" * 64, [{"name": "manifest.json", "key": "k", "bytes": 1, "sha256": "f" * 64}]
)
INFRA = Failure("infra", "store_away", "The store is away.")


class Jobs:
    """A short way to say what happens to jobs in these tests."""

    def __init__(self, sessions: Sessions):
        self.sessions = sessions

    def do(self, verb: Callable, *arguments, **options):
        with self.sessions.write() as session:
            return verb(session, *arguments, **options)

    def submit(self, tenant: str = "t", **changes) -> str:
        return self.do(lifecycle.submit, tenant, SPEC.model_copy(update=changes))

    def checked(self, tenant: str = "t", base_id: str = "org/base", **changes) -> str:
        """Submit a job and accept it."""
        job_id = self.submit(tenant, **changes)
        claim = self.do(lifecycle.claim_preflight, "checker", 60)
        self.accept(claim, base_id)
        return job_id

    def accept(self, claim: Claim, base_id: str = "org/base") -> None:
        self.do(lifecycle.accept, claim, base_id=base_id, base_revision="c0ffee", dataset_sha256="d" * 64, report={})

    def claim(self, worker: str = "w", lease_s: float = 60, held: str | None = None) -> Claim:
        claim = self.do(lifecycle.claim, worker, lease_s, held)
        assert claim is not None
        return claim

    def running(self, **changes) -> Claim:
        self.checked(**changes)
        return self.claim()

    def row(self, job_id: str) -> JobRow:
        with self.sessions.read() as session:
            return session.scalars(select(JobRow).where(JobRow.id == job_id)).one()

    def status(self, job_id: str) -> str:
        return self.row(job_id).status

    def end_lease(self, job_id: str) -> None:
        """Let the lease of a job end now, as if its time had passed."""
        late = update(JobRow).where(JobRow.id == job_id).values(lease_expires_at=db_now() - 1)
        with self.sessions.write() as session:
            session.execute(late)

    def expire(self, job_id: str) -> str | None:
        return self.do(lifecycle.expire, [job_id]).get(job_id)

    def age(self, job_id: str, seconds: float) -> None:
        older = {"created_at": JobRow.created_at - seconds, "queued_at": JobRow.queued_at - seconds}
        with self.sessions.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(older))

    def events(self, job_id: str) -> list[str]:
        with self.sessions.read() as session:
            return list(session.scalars(select(EventRow.name).where(EventRow.job_id == job_id).order_by(EventRow.seq)))


@pytest.fixture
def jobs(sessions: Sessions) -> Jobs:
    return Jobs(sessions)


def test_a_job_goes_the_whole_way(jobs: Jobs):
    job_id = jobs.checked()
    claim = jobs.claim()
    jobs.do(lifecycle.publish, claim, PUBLISHED, {"loss": 1.0})
    row = jobs.row(job_id)
    assert (row.status, row.worker_id, row.lease_expires_at) == ("succeeded", None, None)
    assert row.finished_at is not None and row.report == {"loss": 1.0}
    assert jobs.events(job_id) == ["job.submitted", "job.checking", "job.accepted", "job.claimed", "job.succeeded"]


def test_nothing_to_claim(jobs: Jobs):
    jobs.submit()
    assert jobs.do(lifecycle.claim, "w", 60) is None


def test_each_claim_raises_the_epoch(jobs: Jobs):
    first = jobs.running()
    jobs.end_lease(first.job_id)
    assert jobs.expire(first.job_id) == "queued"
    second = jobs.claim("other")
    assert second.epoch == first.epoch + 1


WORKER_WRITES = {
    "renew": lambda s, c: lifecycle.renew(s, c),
    "advance": lambda s, c: lifecycle.advance(s, c, progress={"step": 99}, events=[Event("x", "y")]),
    "checkpointed": lambda s, c: lifecycle.checkpointed(s, c, step=9, prefix="p", manifest_sha256="f", num_bytes=1),
    "publish": lambda s, c: lifecycle.publish(s, c, PUBLISHED, {}),
    "fail": lambda s, c: lifecycle.fail(s, c, INFRA),
    "fault": lambda s, c: lifecycle.fault(s, c, INFRA, LIMITS),
    "release": lambda s, c: lifecycle.release(s, c, Event("job.released", "x")),
}


@pytest.mark.parametrize("write", WORKER_WRITES.values(), ids=WORKER_WRITES)
@pytest.mark.parametrize("how", ["late", "expired", "claimed again", "same worker, next epoch"])
def test_a_stale_attempt_writes_nothing(jobs: Jobs, write: Callable, how: str):
    stale = jobs.running()
    jobs.end_lease(stale.job_id)
    if how != "late":
        jobs.expire(stale.job_id)
    if how == "claimed again":
        jobs.claim("other")
    if how == "same worker, next epoch":
        jobs.claim(stale.worker_id)
    before = vars(jobs.row(stale.job_id)) | {"_sa_instance_state": None}
    with pytest.raises(LeaseLost):
        jobs.do(write, stale)
    assert vars(jobs.row(stale.job_id)) | {"_sa_instance_state": None} == before


def test_a_renewal_lasts_the_whole_lease_again(jobs: Jobs):
    claim = jobs.running()
    soon = update(JobRow).where(JobRow.id == claim.job_id).values(lease_expires_at=db_now() + 1)
    with jobs.sessions.write() as session:
        session.execute(soon)
    assert jobs.do(lifecycle.renew, claim) == "run"
    with jobs.sessions.read() as session:
        left = session.scalar(select(JobRow.lease_expires_at - db_now()).where(JobRow.id == claim.job_id))
    assert 55 < left <= 60


def test_order_is_priority_then_age(jobs: Jobs):
    old, new, urgent = jobs.checked(), jobs.checked(), jobs.checked(priority=5)
    jobs.age(old, 10)
    assert [jobs.claim().job_id for _ in range(3)] == [urgent, old, new]


def test_the_tenant_with_fewer_running_jobs_comes_first(jobs: Jobs):
    first, second = jobs.checked("busy"), jobs.checked("busy")
    jobs.age(first, 30), jobs.age(second, 20)
    other = jobs.checked("quiet")
    assert [jobs.claim().job_id for _ in range(3)] == [first, other, second]


def test_a_held_base_is_preferred_within_bounds(jobs: Jobs):
    older, same = jobs.checked(base_id="org/other"), jobs.checked(base_id="org/base")
    jobs.age(older, 10)
    assert jobs.claim(held="org/base").job_id == same
    starving, again = jobs.checked(base_id="org/other"), jobs.checked(base_id="org/base")
    jobs.age(starving, lifecycle.PREFER_HELD_BASE_S + 20)
    jobs.age(older, 5)
    assert jobs.claim(held="org/base").job_id == starving
    assert jobs.claim(held="org/base").job_id == again


def test_no_two_workers_get_one_job(jobs: Jobs):
    wanted = {jobs.checked() for _ in range(12)}
    got: list[str] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        start.wait()
        while (claim := jobs.do(lifecycle.claim, name, 60)) is not None:
            got.append(claim.job_id)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len(got) == 12 and set(got) == wanted


@pytest.mark.parametrize("state", ["validating", "queued", "paused"])
def test_cancel_of_a_waiting_job_is_at_once(jobs: Jobs, state: str):
    job_id = jobs.submit() if state == "validating" else jobs.checked()
    if state == "paused":
        jobs.do(lifecycle.pause, "t", job_id)
    jobs.do(lifecycle.request_cancel, "t", job_id)
    assert jobs.status(job_id) == "cancelled" and jobs.row(job_id).finished_at is not None
    jobs.do(lifecycle.request_cancel, "t", job_id)
    assert jobs.events(job_id).count("job.cancelled") == 1


def test_a_tenant_whose_checks_are_slow_does_not_keep_the_others_waiting(jobs: Jobs):
    clock = [0.0]
    shares = Shares(lambda: clock[0])
    slow = [jobs.submit("slow") for _ in range(3)]
    order = [*slow[:1], jobs.submit("quick"), *slow[1:]]
    for job_id in order:
        claim = jobs.do(lifecycle.claim_preflight, "checker", 60, shares.spent())
        assert claim.job_id == job_id
        with shares.spending(claim.tenant):
            clock[0] += 300.0 if claim.tenant == "slow" else 1.0
    clock[0] += 4 * 3600
    assert shares.spent() == {}, "what was long ago counts no more"


def test_priority_comes_before_a_tenants_share(jobs: Jobs):
    urgent = jobs.submit("slow", priority=1)
    jobs.submit("quick")
    assert jobs.do(lifecycle.claim_preflight, "checker", 60, {"slow": 900}).job_id == urgent


def test_cancel_of_a_checked_job_refuses_its_checker(jobs: Jobs):
    job_id = jobs.submit()
    claim = jobs.do(lifecycle.claim_preflight, "checker", 60)
    jobs.do(lifecycle.request_cancel, "t", job_id)
    with pytest.raises(LeaseLost):
        jobs.accept(claim)
    assert jobs.status(job_id) == "cancelled"


@pytest.mark.parametrize(("wish", "target"), [("pause", "paused"), ("cancel", "cancelled")])
@pytest.mark.parametrize("end", ["release", "expire", "fault"])
def test_a_wish_decides_where_an_interrupted_run_goes(jobs: Jobs, wish: str, target: str, end: str):
    claim = jobs.running()
    jobs.do(lifecycle.pause if wish == "pause" else lifecycle.request_cancel, "t", claim.job_id)
    assert jobs.do(lifecycle.renew, claim) == wish
    if end == "release":
        jobs.do(lifecycle.release, claim, Event("job.released", "x"))
    elif end == "fault":
        jobs.do(lifecycle.fault, claim, INFRA, LIMITS)
    else:
        jobs.end_lease(claim.job_id)
        jobs.expire(claim.job_id)
    row = jobs.row(claim.job_id)
    assert row.status == target and (row.finished_at is not None) == (target == "cancelled")
    assert jobs.events(claim.job_id)[-1] == f"job.{target}"


def test_pause_and_resume(jobs: Jobs):
    job_id = jobs.checked()
    jobs.do(lifecycle.pause, "t", job_id)
    jobs.do(lifecycle.pause, "t", job_id)
    assert jobs.status(job_id) == "paused" and jobs.do(lifecycle.claim, "w", 60) is None
    jobs.do(lifecycle.resume, "t", job_id)
    assert jobs.claim().job_id == job_id


def test_a_pause_while_validating_parks_the_accepted_job(jobs: Jobs):
    job_id = jobs.submit()
    claim = jobs.do(lifecycle.claim_preflight, "checker", 60)
    jobs.do(lifecycle.pause, "t", job_id)
    jobs.accept(claim)
    assert jobs.status(job_id) == "paused"


def test_only_the_present_check_says_how_far_it_is(jobs: Jobs):
    job_id = jobs.submit()
    claim = jobs.do(lifecycle.claim_preflight, "checker", 60)
    far = {"param": "dataset", "rows": 7, "bytes": 70, "total_bytes": 100}
    jobs.do(lifecycle.checking, claim, far)
    assert queries.shown(jobs.row(job_id)).checked == CheckProgress(**far)
    jobs.end_lease(job_id)
    with pytest.raises(LeaseLost):
        jobs.do(lifecycle.checking, claim, far)
    again = jobs.do(lifecycle.claim_preflight, "other", 60)
    assert queries.shown(jobs.row(job_id)).checked is None, "another check begins anew"
    jobs.do(lifecycle.checking, again, far)
    jobs.accept(again)
    assert queries.shown(jobs.row(job_id)).checked is None
    with pytest.raises(LeaseLost):
        jobs.do(lifecycle.checking, again, far)


def test_a_pause_can_be_withdrawn(jobs: Jobs):
    claim = jobs.running()
    jobs.do(lifecycle.pause, "t", claim.job_id)
    jobs.do(lifecycle.resume, "t", claim.job_id)
    assert jobs.do(lifecycle.renew, claim) == "run"
    with pytest.raises(WrongState):
        jobs.do(lifecycle.resume, "t", claim.job_id)


def test_terminal_states_never_leave(jobs: Jobs):
    claim = jobs.running()
    jobs.do(lifecycle.fail, claim, Failure("user_error", "bad_row", "row 7 is no JSON", "Mend it.", "dataset"))
    job_id = claim.job_id
    assert jobs.row(job_id).error == {
        "code": "bad_row", "message": "row 7 is no JSON", "hint": "Mend it.", "param": "dataset",
    }  # fmt: skip
    for verb in (lifecycle.request_cancel, lifecycle.pause, lifecycle.resume):
        with pytest.raises(WrongState):
            jobs.do(verb, "t", job_id)
    assert jobs.expire(job_id) is None
    assert jobs.status(job_id) == "failed"


@pytest.mark.parametrize("verb", [lifecycle.request_cancel, lifecycle.pause, lifecycle.resume])
def test_another_tenants_job_does_not_exist(jobs: Jobs, verb: Callable):
    job_id = jobs.checked("theirs")
    with pytest.raises(NotFound):
        jobs.do(verb, "mine", job_id)
    assert jobs.status(job_id) == "queued"


def test_a_crash_loop_ends_and_a_checkpoint_starts_the_count_again(jobs: Jobs):
    crash = Failure("crash", "trainer_died", "The trainer ended with signal SIGSEGV.")
    job_id = jobs.checked()
    for number in range(5):
        with jobs.sessions.write() as session:
            session.execute(update(JobRow).values(not_before=0))
        claim = jobs.claim()
        if number == 1:
            jobs.do(lifecycle.checkpointed, claim, step=5, prefix="p/", manifest_sha256="f" * 64, num_bytes=10)
        outcome = jobs.do(lifecycle.fault, claim, crash, LIMITS)
        if outcome == "failed":
            break
    assert number == 3 and jobs.row(job_id).error["code"] == "crash_loop"


def test_out_of_memory_shrinks_three_times(jobs: Jobs):
    oom = Failure("oom", "out_of_memory", "The card has no more memory.")
    job_id = jobs.checked()
    outcomes = [jobs.do(lifecycle.fault, jobs.claim(), oom, LIMITS) for _ in range(4)]
    assert outcomes == ["queued"] * 3 + ["failed"]
    assert jobs.row(job_id).shrink == 3 and jobs.row(job_id).error["code"] == "out_of_memory"


def test_infrastructure_faults_wait_longer_each_time_and_never_end_a_job(jobs: Jobs):
    job_id = jobs.checked()
    pauses = []
    for _ in range(9):
        with jobs.sessions.write() as session:
            session.execute(update(JobRow).values(not_before=0))
        jobs.do(lifecycle.fault, jobs.claim(), INFRA, LIMITS)
        with jobs.sessions.read() as session:
            # Upwards: the question comes a moment after the answer was written.
            pauses.append(ceil(session.scalar(select(JobRow.not_before - db_now()).where(JobRow.id == job_id))))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert jobs.do(lifecycle.claim, "w", 60) is None


def test_a_fault_that_says_how_often_it_may_be_met_ends_the_job_then(jobs: Jobs):
    refused = Failure("infra", "dataset_forbidden", "No.", "Ask.", "dataset", attempts=3)
    started, checked = jobs.checked(), jobs.submit()
    for failure in (INFRA, refused, refused):
        assert jobs.status(checked) == "validating" and jobs.status(started) == "queued"
        with jobs.sessions.write() as session:
            session.execute(update(JobRow).values(not_before=0))
        jobs.do(lifecycle.postpone, jobs.do(lifecycle.claim_preflight, "checker", 60), failure, LIMITS)
        jobs.do(lifecycle.fault, jobs.claim(), failure, LIMITS)
    for job_id in (checked, started):
        assert jobs.status(job_id) == "failed" and jobs.row(job_id).error == refused.shown()


def test_a_check_that_cannot_be_made_is_postponed(jobs: Jobs):
    job_id = jobs.submit()
    claim = jobs.do(lifecycle.claim_preflight, "checker", 60)
    jobs.do(lifecycle.postpone, claim, INFRA, LIMITS)
    assert jobs.status(job_id) == "validating" and jobs.do(lifecycle.claim_preflight, "checker", 60) is None


def test_a_lost_checker_gives_way(jobs: Jobs):
    job_id = jobs.submit()
    jobs.do(lifecycle.claim_preflight, "checker", 60)
    assert jobs.do(lifecycle.claim_preflight, "other", 60) is None
    jobs.end_lease(job_id)
    assert jobs.expire(job_id) == "validating"
    assert jobs.do(lifecycle.claim_preflight, "other", 60).job_id == job_id


def test_a_live_lease_does_not_expire(jobs: Jobs):
    claim = jobs.running()
    assert jobs.expire(claim.job_id) is None
    assert jobs.status(claim.job_id) == "running"


def test_events_and_metrics_share_one_sequence_without_gaps(jobs: Jobs):
    claim = jobs.running()
    for step in range(1, 4):
        jobs.do(
            lifecycle.advance, claim, progress={"step": step}, events=[Event("note", f"{step}")],
            metrics=[MetricPoint(step, {"loss": 1 / step}), MetricPoint(step, {"loss": 2.0}, "eval")],
        )  # fmt: skip
    with jobs.sessions.read() as session:
        changes = queries.changes(session, claim.job_id, after=0)
        row = jobs.row(claim.job_id)
        part = queries.changes(session, claim.job_id, after=5, limit=4)
    assert [cursor for cursor, _, _ in changes] == list(range(1, row.seq + 1))
    assert [cursor for cursor, _, _ in part] == [6, 7, 8, 9]


def test_metrics_of_a_repeated_step_come_from_the_last_attempt(jobs: Jobs):
    first = jobs.running()
    for step in (1, 2, 3):
        jobs.do(lifecycle.advance, first, metrics=[MetricPoint(step, {"loss": 9.0})])
    jobs.end_lease(first.job_id)
    jobs.expire(first.job_id)
    second = jobs.claim()
    for step in (2, 3):
        jobs.do(lifecycle.advance, second, metrics=[MetricPoint(step, {"loss": 5.0})])
    with jobs.sessions.read() as session:
        points = queries.metrics(session, first.job_id).data
    assert [(point.step, point.values["loss"]) for point in points] == [(1, 9.0), (2, 5.0), (3, 5.0)]


def test_a_failed_transaction_leaves_nothing(jobs: Jobs):
    with pytest.raises(RuntimeError), jobs.sessions.write() as session:
        lifecycle.submit(session, "t", SPEC)
        raise RuntimeError("the request broke")
    with jobs.sessions.read() as session:
        assert queries.page(session, "t").data == []


def test_paging_by_key(jobs: Jobs):
    ids = sorted((jobs.submit(metadata={"team": "a" if number % 2 else "b"}) for number in range(7)), reverse=True)
    with jobs.sessions.read() as session:
        first = queries.page(session, "t", limit=3)
        second = queries.page(session, "t", limit=3, after=first.next)
        last = queries.page(session, "t", limit=3, after=second.next)
        some = queries.page(session, "t", Selection(metadata={"team": "a"}))
        none = queries.page(session, "t", Selection(status=["running"]))
    assert [job.id for page in (first, second, last) for job in page.data] == ids
    assert (first.has_more, last.has_more, last.next) == (True, False, None)
    assert len(some.data) == 3 and none.data == []


def test_every_edge_starts_and_ends_in_a_known_state():
    known = {"validating", "queued", "running", "paused"} | states.TERMINAL
    for edges in states.EDGES.values():
        for source, targets in edges.items():
            assert source in known - states.TERMINAL and targets <= known
