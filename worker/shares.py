"""How much of a worker's time each tenant had of late: whoever had least comes next, so that no tenant's queue of slow
checks and previews keeps the others waiting.

Each worker counts for itself and in memory: a check leaves no row that says how long it took, and needs none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# Half of what a tenant has had is forgotten after so long.
HALF_S = 600.0
_FORGOTTEN_S = 1.0


class Shares:
    """Seconds by tenant, which fade."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._spent: dict[str, float] = {}
        self._at = now()

    @contextmanager
    def spending(self, tenant: str) -> Iterator[None]:
        """Count the time in the block as the tenant's."""
        began = self._now()
        try:
            yield
        finally:
            self._fade()
            self._spent[tenant] = self._spent.get(tenant, 0.0) + self._now() - began

    def spent(self) -> Mapping[str, int]:
        """Return the whole seconds of each tenant that had some of late."""
        self._fade()
        return {tenant: int(seconds) for tenant, seconds in self._spent.items()}

    def _fade(self) -> None:
        now = self._now()
        kept = 0.5 ** ((now - self._at) / HALF_S)
        self._at = now
        faded = {tenant: seconds * kept for tenant, seconds in self._spent.items()}
        self._spent = {tenant: seconds for tenant, seconds in faded.items() if seconds >= _FORGOTTEN_S}
