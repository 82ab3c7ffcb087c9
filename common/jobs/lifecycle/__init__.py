"""The only writer of a job's status.

Each verb is one guarded UPDATE, whose WHERE names the legal from-states and, for a worker's verbs, the epoch and a
lease that is alive by the database's clock, plus one event row in the same transaction. Zero rows raises. Nothing here
commits: the caller's `Context.write()` does, and rings the bell afterwards.

    user.py   submit  reorder  pause  resume  request_cancel  retry
    export.py a user's too: export
    check.py  a preflight worker's: claim_preflight  checking  accept  reject  postpone
    run.py    a GPU worker's: claim  renew  advance  checkpointed  publish  fail  fault  release
    sweep.py  the sweeper's: expire
"""

from common.jobs.lifecycle.check import accept, checking, claim_preflight, postpone, reject
from common.jobs.lifecycle.export import export
from common.jobs.lifecycle.run import (
    advance,
    checkpointed,
    claim,
    fail,
    fault,
    publish,
    release,
    renew,
)
from common.jobs.lifecycle.sweep import expire
from common.jobs.lifecycle.terms import Claim, Event, Failure, Limits, MetricPoint, Published, backoff_s
from common.jobs.lifecycle.user import pause, reorder, request_cancel, resume, retry, submit
from common.jobs.line import PREFER_HELD_BASE_S

__all__ = [
    "PREFER_HELD_BASE_S", "Claim", "Event", "Failure", "Limits", "MetricPoint", "Published", "accept", "advance",
    "backoff_s", "checking", "checkpointed", "claim", "claim_preflight", "expire", "export", "fail", "fault", "pause",
    "postpone", "publish", "reject", "release", "renew", "reorder", "request_cancel", "resume", "retry", "submit",
]  # fmt: skip
