"""One run: a stack, a user, a schedule of faults, time to recover, and a verdict."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import journal as journals
from tests.faults.checker import Checker
from tests.faults.evidence import Bucket, Database
from tests.faults.injection import Injector
from tests.faults.journal import Journal
from tests.faults.recovery import recoveries
from tests.faults.schedule import schedule
from tests.faults.service import processes_of
from tests.faults.stack import LEASE_S, Stack, own_folder, running, waited_for
from tests.faults.user import User

SETTLE_S = 120.0
_IDLE_S = 40.0
_SILENT_S = 15.0
_REFUSED = re.compile(r"the lease is lost|no longer owns|has ended$|given up", re.MULTILINE)


@dataclass
class Outcome:
    """What a run did and how it was judged; `recovery_s` are seconds from a fault to the next progress, by kind."""

    seed: int
    database: str
    faults: dict[str, int] = field(default_factory=dict)
    trainers_hit: int = 0
    jobs: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    refused_stale_writes: int = 0
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    steps_repeated: int = 0
    attempts: int = 0
    seconds: float = 0.0
    disk: bool = False

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.lost or self.doubled or self.wrong or self.stale or self.left or self.stuck)

    def values(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def run(seed: int, database: str, num_faults: int, *, mean_s: float = 1.3, keep: Path | None = None) -> Outcome:
    """Run one seed over one database. `keep` is a folder that gets all logs if anything is wrong."""
    outcome, begun = Outcome(seed, database), time.monotonic()
    with own_folder() as folder:
        outside = folder / "outside"
        outside.mkdir()
        with running(folder, database, random.Random(f"{seed} {database} keeper")) as stack:
            _disturb(stack, outside, outcome, num_faults, mean_s)
            _judge(stack, outside, outcome)
        waited_for(lambda: not processes_of(folder), 10)
        outcome.left = processes_of(folder)
        outcome.seconds = round(time.monotonic() - begun, 1)
        if keep is not None and not outcome.clean:
            _keep(folder, keep / f"{seed}-{database}")
        return outcome


def _disturb(stack: Stack, outside: Path, outcome: Outcome, num_faults: int, mean_s: float) -> None:
    journal = Journal(outside / "journal.jsonl")
    randomness = random.Random(f"{outcome.seed} {outcome.database} user")
    user = User(stack.api_port, stack.key, journal, outside / "trail", randomness)
    user.start()
    outcome.disk = stack.tmpfs
    faults = schedule(outcome.seed, outcome.database, num_faults, mean_s=mean_s, lease_s=LEASE_S, with_disk=stack.tmpfs)
    Injector(stack, journal, random.Random(f"{outcome.seed} {outcome.database} moments")).run(faults)
    stack.heal()
    user.finish(time.monotonic() + SETTLE_S)


def _judge(stack: Stack, outside: Path, outcome: Outcome) -> None:
    direct = stack.direct
    bucket = Bucket(direct.s3_endpoint_url, direct.s3_access_key_id, direct.s3_secret_access_key, direct.s3_bucket)
    waited_for(lambda: all(service.running and service.is_ready() for service in stack.services.values()), 30)
    database = Database(direct.database_url)
    waited_for(lambda: not _stuck(database), _IDLE_S)
    outcome.stuck = _stuck(database)
    checker = Checker(database, bucket, outside / "journal.jsonl", outside / "trail")
    verdict = checker.judge()
    outcome.lost, outcome.doubled = verdict.lost, verdict.doubled
    outcome.wrong, outcome.stale = verdict.wrong, verdict.stale
    faults = journals.entries(outside / "journal.jsonl", "fault")
    outcome.faults = dict(Counter(f"{fault['what']} {fault['whom']}" for fault in faults))
    outcome.trainers_hit = sum(1 for fault in faults if fault["job"])
    outcome.jobs = dict(Counter(row["status"] for row in checker.rows.values()))
    outcome.attempts = sum(row["attempts"] for row in checker.rows.values())
    outcome.steps, outcome.steps_repeated = checker.repeated_steps()
    outcome.recovery_s = recoveries(faults, checker.trail, checker.audit)
    logs = [service.said() for name, service in stack.services.items() if name.startswith(("train", "preflight"))]
    outcome.refused_stale_writes = sum(len(_REFUSED.findall(log)) for log in logs)


def _stuck(database: Database) -> list[str]:
    """Return the workers that do not say that they are idle, when nothing is left to do."""
    latest = {row["name"]: row for row in database.rows("SELECT * FROM workers ORDER BY started_at")}
    silent = time.time() - _SILENT_S
    return [
        f"{name} was last heard as {row['state']}, with {row['job_id']}, {time.time() - row['heartbeat_at']:.0f} s ago"
        for name, row in latest.items()
        if row["state"] != "idle" or row["heartbeat_at"] < silent
    ]


def _keep(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in [*folder.glob("*.log"), *folder.glob("*.db*"), *(folder / "outside").iterdir()]:
        if path.is_file():
            shutil.copy(path, target)
