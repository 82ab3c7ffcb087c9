"""How fresh a client's picture of a job is: its ETag, and when another look is worth it."""

from __future__ import annotations

from datetime import UTC, datetime
from zlib import crc32

from common.schemas.jobs import JobRead

_LEAST_S, _MOST_S = 1.0, 60.0
# Where nothing tells when something will have happened.
_RETRY_AFTER_S = {"validating": 2, "queued": 5, "running": 5, "paused": 60}


def tag(job: JobRead, version: int) -> str:
    """Return the job's ETag: its version and, while it waits, its place, which moves without it."""
    if job.waits_for is None:
        return f'"{version}"'
    place = f"{job.position} {job.waits_for.message} {job.expected_start}"
    return f'"{version}-{crc32(place.encode()):08x}"'


def unchanged(job: JobRead, version: int, if_none_match: str | None, *, default: bool) -> bool:
    """Return whether the header names the job as it is; `default` where there is no header."""
    if if_none_match is None:
        return default
    tags = {each.strip().removeprefix("W/") for each in if_none_match.split(",")}
    return bool(tags & {"*", tag(job, version)})


def retry_after_s(job: JobRead) -> int | None:
    """Return in how many seconds something is likely to have happened; None for a job that has ended."""
    if job.status not in _RETRY_AFTER_S:
        return None
    left_s = job.eta_s
    if job.waits_for is not None:
        moment = job.waits_for.until or job.expected_start
        left_s = None if moment is None else (moment - datetime.now(UTC)).total_seconds()
    return _RETRY_AFTER_S[job.status] if left_s is None else round(min(max(left_s, _LEAST_S), _MOST_S))
