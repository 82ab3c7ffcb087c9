"""A user of the service over HTTP: keeps submitting jobs, changes its mind, and never gives a request up.

It knows the API and nothing else. Every answer goes into the journal: what was accepted must end.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from tests.faults.journal import Journal

_TIMEOUT_S = 10.0
_AGAIN_S = 0.2
_LOOK_S = 0.3
_LIVE = 6
_WISHES = ("cancel", "pause", "pause", "resume", "resume", "resume")
# What the data or the trainer of some jobs is made to do, and the code with which such a job must fail; None: it must
# succeed all the same. The weights are in parts of a hundred.
_WAYS: dict[str, tuple[int, dict[str, str], str | None]] = {
    "plain": (78, {}, None),
    "bad row": (4, {}, "bad_row"),
    "diverge": (4, {"fault": "diverge", "fault_at": "5"}, "diverged"),
    "crash": (5, {"fault": "crash", "fault_at": "4", "fault_attempts": "1"}, None),
    "oom": (5, {"fault": "oom", "fault_at": "3", "fault_attempts": "1"}, None),
    "device": (4, {"fault": "device", "fault_at": "4", "fault_attempts": "1"}, None),
}


class User:
    """Works on a thread of its own, from `start` until `finish`."""

    def __init__(self, port: int, key: str, journal: Journal, trail: Path, randomness: random.Random):
        self._port = port
        self._key = key
        self._journal = journal
        self._trail = trail
        self._random = randomness
        self._datasets: dict[str, str] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, name="user", daemon=True)

    def start(self) -> None:
        """Upload the datasets and begin to submit jobs."""
        for name in ("good", "bad"):
            self._datasets[name] = self._upload(name)
        self._thread.start()

    def finish(self, deadline: float) -> list[str]:
        """Submit no more, resume what is paused, and wait; return the jobs that have not ended by `deadline`."""
        self._stopped.set()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        while time.monotonic() < deadline:
            live = self._jobs("validating", "queued", "running", "paused")
            if not live:
                return []
            for job in live:
                if job["desired"] == "pause" or job["status"] == "paused":
                    self._wish("resume", job["id"])
            time.sleep(_LOOK_S)
        return [job["id"] for job in self._jobs("validating", "queued", "running", "paused")]

    def _live(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            live = self._jobs("validating", "queued", "running")
            if len(live) < _LIVE:
                self._submit()
            if self._random.random() < 0.12:
                verb = self._random.choice(_WISHES)
                others = self._jobs("paused") if verb == "resume" else live
                if others:
                    self._wish(verb, self._random.choice(others)["id"])

    def _submit(self) -> None:
        ways = list(_WAYS)
        way = self._random.choices(ways, [_WAYS[name][0] for name in ways])[0]
        _, behaviour, code = _WAYS[way]
        steps, seed = self._random.randint(10, 70), self._random.randint(0, 9999)
        spec = {
            "model": "tiny",
            "dataset": self._datasets["bad" if way == "bad row" else "good"],
            "seed": seed,
            "hyperparameters": {"max_steps": steps, "save_steps": self._random.randint(2, 8)},
            "metadata": {**behaviour, "step_s": f"{self._random.uniform(0.02, 0.1):.3f}", "trail": str(self._trail)},
        }
        key, begun, tries = uuid.uuid4().hex, time.monotonic(), 1
        while True:
            asked = time.monotonic()
            status, job = self._call("POST", "/jobs", json.dumps(spec).encode(), **{"Idempotency-Key": key})
            if status == 201:
                break
            self._journal.write("refused", status=status, seconds=time.monotonic() - asked, answer=job)
            tries += 1
            time.sleep(_AGAIN_S)
        now = time.monotonic()
        self._journal.write(
            "accepted", job=job["id"], key=key, tries=tries, seconds=now - asked, whole_s=now - begun, way=way,
            seed=seed, steps=steps, code=code, data=None if way == "bad row" else _DATA["good"],
        )  # fmt: skip

    def _wish(self, verb: str, job_id: str) -> None:
        status, _ = self._call("POST", f"/jobs/{job_id}/{verb}", b"")
        self._journal.write("wish", verb=verb, job=job_id, status=status)

    def _jobs(self, *statuses: str) -> list[dict[str, Any]]:
        path = "/jobs?limit=100&" + "&".join(f"status={status}" for status in statuses)
        while True:
            status, answer = self._call("GET", path)
            if status == 200:
                return list(answer["data"])
            time.sleep(_AGAIN_S)

    def _upload(self, name: str) -> str:
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}.jsonl"\r\n\r\n'
        body = f"{head}{_DATA[name]}\r\n--{mark}--\r\n".encode()
        kind = f"multipart/form-data; boundary={mark}"
        status, answer = self._call("POST", "/datasets", body, **{"Content-Type": kind})
        assert status in (200, 201), f"the upload was answered with {status}: {answer}"
        return f"dataset:{answer['id']}"

    def _call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Return the status and the answer; status 0 means that nobody answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"} | headers
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return 0, repr(error)
        finally:
            connection.close()


_DATA = {
    "good": "".join(f'{{"text": "row {number} of the data"}}\n' for number in range(20)),
    "bad": '{"text": "fine"}\n{"text": \n',
}
