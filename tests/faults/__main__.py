"""`python -m tests.faults`: many seeded runs, each appended to a report. Stop it any time; it goes on where it was."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tests.faults import report
from tests.faults.campaign import run

_DATABASES = {"both": ("sqlite", "postgres"), "sqlite": ("sqlite",), "postgres": ("postgres",)}


def main() -> int:
    """Run what the report does not have yet; return 1 if anything is wrong in it."""
    chosen = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    databases = _DATABASES[chosen.databases]
    num_faults = max(1, round(chosen.faults / (chosen.seeds * len(databases))))
    wanted = [
        (seed, database)
        for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds)
        for database in databases
    ]
    done = {(entry["seed"], entry["database"]) for entry in report.read(chosen.report) if entry["asked"] >= num_faults}
    print(f"{len(wanted)} runs of {num_faults} faults, of which {len(done & set(wanted))} are in {chosen.report}")
    try:
        for seed, database in wanted:
            if (seed, database) in done:
                continue
            outcome = run(seed, database, num_faults, mean_s=chosen.mean, keep=chosen.keep)
            report.append(chosen.report, outcome, num_faults)
            print(report.line(outcome), flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        return 130
    entries = [entry for entry in report.read(chosen.report) if (entry["seed"], entry["database"]) in wanted]
    report.show(entries)
    return 0 if all(map(report.is_clean, entries)) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=2000, help="faults of all runs together")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--databases", choices=tuple(_DATABASES), default="both")
    parser.add_argument("--mean", type=float, default=1.1, metavar="SECONDS", help="mean pause between faults")
    parser.add_argument("--report", type=Path, default=Path("docs/faults-report.json"), help="JSON lines, one a run")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the logs of runs that went wrong here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
