"""The lease of a running attempt: renewed in the background, and the self-fence when that fails.

The fence is a moment in monotonic time taken from *before* the last good renewal: this process and its child stop by
themselves before the database gives the job to somebody else, however long the database cannot be reached.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from common.context import Context
from common.errors import LeaseLost
from common.jobs import lifecycle
from common.jobs.lifecycle import Claim

RENEWALS_PER_LEASE = 8
FENCE_SHARE = 5 / 6
_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The attempt must stop: `wish` is pause, cancel, drain or lost."""

    def __init__(self, wish: str):
        super().__init__(wish)
        self.wish = wish


class Heart:
    """Renews `claim` until closed. `changed` is set whenever the user's wish changes or the lease is lost."""

    def __init__(self, context: Context, claim: Claim, claimed_at: float, draining: threading.Event):
        self._context = context
        self._claim = claim
        self._draining = draining
        self._closed = threading.Event()
        self._lost = threading.Event()
        self.claimed_at = claimed_at
        self.desired = claim.desired
        self.fence = claimed_at + claim.lease_s * FENCE_SHARE
        self.on_renewed: Callable[[float], None] = lambda fence: None
        self._thread = threading.Thread(target=self._beat, name=f"heart-{claim.job_id}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop renewing."""
        self._closed.set()
        self._thread.join()

    @property
    def lost(self) -> bool:
        """Whether the lease is gone, or may be gone: nothing may be written any more."""
        return self._lost.is_set() or time.monotonic() >= self.fence

    @property
    def wish(self) -> str:
        """What is wanted of the attempt now: run, pause, cancel, drain or lost, the most pressing first."""
        if self.lost:
            return "lost"
        if self.desired == "cancel":
            return "cancel"
        if self.desired == "pause":
            return "pause"
        return "drain" if self._draining.is_set() else "run"

    def check(self) -> None:
        """Raise Interrupted unless the attempt should go on."""
        if (wish := self.wish) != "run":
            raise Interrupted(wish)

    def check_mere_life(self) -> None:
        """Raise Interrupted if the lease is lost or the worker drains: a check of a job is too short to pause."""
        if (wish := self.wish) in ("lost", "drain"):
            raise Interrupted(wish)

    def _beat(self) -> None:
        while not self._closed.wait(self._claim.lease_s / RENEWALS_PER_LEASE):
            before = time.monotonic()
            try:
                with self._context.write() as session:
                    self.desired = lifecycle.renew(session, self._claim)
            except LeaseLost:
                self._lost.set()
                return
            except Exception as error:  # whatever the database's driver raises: the fence ends it if it lasts
                _log.warning("%s: the lease was not renewed (%s)", self._claim.job_id, type(error).__name__)
                continue
            self.fence = before + self._claim.lease_s * FENCE_SHARE
            self.on_renewed(self.fence)
