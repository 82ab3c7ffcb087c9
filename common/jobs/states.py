"""The states of a job and every legal edge. Nothing else knows edges.

submit ─► validating ── accept ─► queued ── claim ─► running ── publish ─► succeeded
              │                   ▲ │ ▲                │ │ │
              │ reject            │ │ └ release, expire┘ │ └── fail ─────► failed
              ▼              resume │ pause              │ release, expire
            failed                │ ▼                    ▼ (the user's wish)
                                 paused ◄────────── paused | cancelled

An export of a finished job needs no check: it begins as queued.

cancel leads from validating, queued and paused to cancelled at once; a running job gets the wish `desired = cancel`
and is settled by its worker's `release` or, if that is gone, by `expire`. Pause of a validating or running job is
such a wish too. Terminal: succeeded, failed, cancelled. They never leave.
"""

from __future__ import annotations

from typing import Literal

from common.schemas.jobs import TERMINAL as TERMINAL

Verb = Literal["accept", "reject", "claim", "publish", "fail", "release", "expire", "pause", "resume", "cancel"]

# verb -> {from-state: to-states}. `release` and `expire` choose the to-state from what the user wishes.
EDGES: dict[Verb, dict[str, frozenset[str]]] = {
    "accept": {"validating": frozenset({"queued", "paused"})},
    "reject": {"validating": frozenset({"failed"})},
    "claim": {"queued": frozenset({"running"})},
    "publish": {"running": frozenset({"succeeded"})},
    "fail": {"running": frozenset({"failed"})},
    "release": {"running": frozenset({"queued", "paused", "cancelled"})},
    "expire": {"running": frozenset({"queued", "paused", "cancelled"})},
    "pause": {"queued": frozenset({"paused"})},
    "resume": {"paused": frozenset({"queued"})},
    "cancel": {state: frozenset({"cancelled"}) for state in ("validating", "queued", "paused")},
}

# What the user wishes decides where an interrupted run goes.
SETTLED: dict[str, str] = {"run": "queued", "pause": "paused", "cancel": "cancelled"}


def sources(verb: Verb) -> tuple[str, ...]:
    """Return the states that `verb` may leave."""
    return tuple(EDGES[verb])


def targets(verb: Verb) -> frozenset[str]:
    """Return the states that `verb` may enter."""
    return frozenset().union(*EDGES[verb].values())
