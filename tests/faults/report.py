"""The report of many runs: one JSON line for each seed and database, and the table that sums them up."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.campaign import Outcome
from tests.faults.recovery import percentile

WRONGS = ("lost", "doubled", "wrong", "stale", "left", "stuck")


def append(path: Path, outcome: Outcome, num_faults: int) -> None:
    """Add a run to the report."""
    with path.open("a") as stream:
        stream.write(json.dumps({"asked": num_faults, **outcome.values()}, sort_keys=True) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a report."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_clean(run: dict[str, Any]) -> bool:
    """Whether nothing was wrong in a run."""
    return not any(run[name] for name in WRONGS)


def line(outcome: Outcome) -> str:
    """Return one line on a run."""
    faults, jobs = sum(outcome.faults.values()), sum(outcome.jobs.values())
    verdict = "clean" if outcome.clean else ", ".join(f"{len(getattr(outcome, name))} {name}" for name in WRONGS)
    return (
        f"seed {outcome.seed} over {outcome.database}: {faults} faults, {jobs} jobs, "
        f"{outcome.attempts} attempts, {outcome.seconds:.0f} s: {verdict}"
    )


def show(runs: list[dict[str, Any]]) -> None:
    """Print the table of kinds, and what they did to the jobs."""
    console = Console()
    by_kind: dict[str, list[float]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for run in runs:
        counts.update(run["faults"])
        for kind, seconds in run["recovery_s"].items():
            by_kind[kind] += seconds
    table = Table("fault", "injected", "recovery p50 (s)", "p99 (s)", title="Faults by kind")
    for kind in sorted(counts):
        table.add_row(kind, str(counts[kind]), *_percentiles(by_kind[kind]))
    met = [
        value
        for kind, values in by_kind.items()
        if kind.split()[1] in ("trainer", "worker", "host")
        for value in values
    ]
    table.add_row("those that met a running job", str(sum(run["trainers_hit"] for run in runs)), *_percentiles(met))
    table.add_row("all", str(counts.total()), *_percentiles([value for values in by_kind.values() for value in values]))
    console.print(table)
    sums = Table("what", "number", title=f"{len(runs)} runs: {sum(run['seconds'] for run in runs) / 60:.0f} minutes")
    for name, number in _sums(runs).items():
        sums.add_row(name, str(number))
    console.print(sums)
    for run in runs:
        for name in WRONGS:
            for sentence in run[name]:
                console.print(f"seed {run['seed']} over {run['database']}, {name}: {sentence}", markup=False)


def _percentiles(values: list[float]) -> tuple[str, str]:
    return (f"{percentile(values, 0.5):.1f}", f"{percentile(values, 0.99):.1f}") if values else ("", "")


def _sums(runs: list[dict[str, Any]]) -> dict[str, int]:
    jobs: Counter[str] = Counter()
    for run in runs:
        jobs.update(run["jobs"])
    return {
        "faults that met a running trainer": sum(run["trainers_hit"] for run in runs),
        "jobs accepted": jobs.total(),
        **{f"jobs {status}": count for status, count in sorted(jobs.items())},
        "attempts": sum(run["attempts"] for run in runs),
        "steps computed": sum(run["steps"] for run in runs),
        "steps computed again": sum(run["steps_repeated"] for run in runs),
        "stale writes refused": sum(run["refused_stale_writes"] for run in runs),
        "jobs lost": sum(len(run["lost"]) for run in runs),
        "jobs doubled": sum(len(run["doubled"]) for run in runs),
        "results wrong": sum(len(run["wrong"]) for run in runs),
        "stale writes accepted": sum(len(run["stale"]) for run in runs),
        "processes left": sum(len(run["left"]) for run in runs),
        "workers stuck": sum(len(run["stuck"]) for run in runs),
        "runs without a full disk": sum(1 for run in runs if not run["disk"]),
    }
