"""Spreads work over forked processes that share what the parent has loaded, within the parent's bounds."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from worker.trainer.lifeline import die_with_parent

# A process with tokenizer and libraries has about one gigabyte of address space, most of it shared.
_SPACE_BYTES = 2 << 30

T = TypeVar("T")


def allowed_processes() -> int:
    """Return how many processes may work at once: one for each core, as far as the limit on address space reaches."""
    cores, limit = len(os.sched_getaffinity(0)), resource.getrlimit(resource.RLIMIT_AS)[0]
    return cores if limit == resource.RLIM_INFINITY else max(1, min(cores, limit // _SPACE_BYTES))


def spread(work: Callable[[int], T], processes: int) -> list[T]:
    """Return the results of `work(0)` to `work(processes - 1)`, each from a process of its own.

    The limit on address space is divided between them. They end with this process: its parent ends its whole group.

    Raises:
        The first error of any of them; RuntimeError where one died without a word.
    """
    context = multiprocessing.get_context("fork")
    started = []
    for index in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_run, args=(work, index, processes, theirs), daemon=True)
        child.start()
        theirs.close()
        started.append((child, ours))
    try:
        return [_result(child, ours) for child, ours in started]
    finally:
        for child, ours in started:
            child.kill()
            child.join()
            ours.close()


def _run(work: Callable[[int], object], index: int, processes: int, pipe: Connection) -> None:
    die_with_parent()
    limit, most = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (limit // processes, most))
    try:
        pipe.send((work(index), None))
    except BaseException as error:
        pipe.send((None, error))


def _result(child: multiprocessing.process.BaseProcess, pipe: Connection) -> Any:
    try:
        value, error = pipe.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"a process of the check died with {child.exitcode}") from None
    if error is not None:
        raise error
    return value
