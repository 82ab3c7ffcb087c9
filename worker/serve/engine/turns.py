"""Whose answers are written next: each tenant's first before anybody's second, so that none waits behind a queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from worker.serve.engine.answer import Answer


class Turns:
    """Remembers which tenant was served last, of those that have answers waiting."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._num_batches = 0

    def order(self, waiting: Sequence[Answer]) -> list[Answer]:
        """Return the answers in the order in which they should be written."""
        before: Counter[str] = Counter()
        keys = []
        for answer in waiting:
            tenant = answer.ask.tenant
            keys.append((before[tenant], self._served.get(tenant, 0)))
            before[tenant] += 1
        return [waiting[index] for index in sorted(range(len(waiting)), key=keys.__getitem__)]

    def note(self, batch: Sequence[Answer], waiting: Sequence[Answer]) -> None:
        """Note that `batch` is written now; whoever has nothing `waiting` is forgotten, and comes first again."""
        self._num_batches += 1
        present = {answer.ask.tenant for answer in waiting}
        now = dict.fromkeys((answer.ask.tenant for answer in batch), self._num_batches)
        self._served = {tenant: number for tenant, number in (self._served | now).items() if tenant in present}
