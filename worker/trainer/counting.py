"""Counts the rows of a part as training would, several processes at once where the file is large."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from worker.data.source import Problems, Share
from worker.ml.census import Census
from worker.ml.parts import Part
from worker.trainer.forks import spread
from worker.trainer.gauge import Gauge

# Below that a fork costs more than it saves.
_LARGE_BYTES = 1 << 20


def count(part: Part, gauge: Gauge, processes: int = 1) -> dict[str, Any]:
    """Return the report on the rows of `part`, and leave its census filled.

    Raises:
        InvalidInput: with every bad row in its message, or because nothing is left.
    """
    if part.source.path.stat().st_size < _LARGE_BYTES:
        processes = 1

    watch = gauge.watch(part)

    def work(index: int) -> tuple[Census, Problems]:
        problems = Problems()
        # Every process reads through the whole file, and they are about equally fast: one of them tells.
        source = replace(part.source, share=Share(index, processes), watch=watch if index == 0 else None)
        for _ in part.counted(source, problems):
            pass
        return part.census, problems

    if processes == 1:
        found = work(0)[1]
    else:
        found = Problems()
        for census, problems in spread(work, processes):
            part.census.merge(census)
            found.merge(problems)
    part.settle(found)
    return part.census.report()
