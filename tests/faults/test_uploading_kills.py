"""A worker that is killed while it uploads a checkpoint leaves one that is whole, or none that anybody would take."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter

import pytest

from common import audit
from common.jobs import queries
from tests.faults.evidence import read_trail
from tests.faults.judged import TENANT, Judged
from tests.faults.uploading import PART_BYTES, worker_that_uploads
from tests.servers import S3

# Two parts, sent by threads that do not wait for each other.
BALLAST_BYTES = PART_BYTES + 2**20
_START_S = 60.0
# A busy machine may be slower than when it was measured, and the row comes after the upload.
_BEYOND = 1.3


class Torn(Exception):
    """An object that a manifest lists is not there, or is another."""


class Uploads:
    """One job, whose workers die over its checkpoints again and again."""

    def __init__(self, judged: Judged, s3: S3, kills: int):
        self._judged, self._client = judged, s3.client()
        self._context = judged.bench.context
        self._bucket = self._context.settings.s3_bucket
        self.stages: Counter[str] = Counter()
        # Checkpoints lie two steps apart: workers that die at their first and second in turn come so far at most.
        self.job_id = judged.submit(steps=3 * kills + 10, ballast_bytes=BALLAST_BYTES)
        judged.bench.check()

    def measure(self, number: int) -> float:
        """Let a worker upload its checkpoint `number` undisturbed; return how many seconds that took. Then it dies."""
        with worker_that_uploads(self._context.settings, number) as (_, heard):
            self._await(heard, "begun")
            begun = time.monotonic()
            self._await(heard, "ended")
            took = time.monotonic() - begun
        self._judged.expire(self.job_id)
        return took

    def kill(self, number: int, after_s: float) -> None:
        """Kill a worker so long after it began to upload its checkpoint `number`, and look at what it left."""
        highest = self._recorded()
        with worker_that_uploads(self._context.settings, number) as (process, heard):
            self._await(heard, "begun")
            threading.Event().wait(after_s)
            process.kill()
            process.join()
            told = heard.poll() and self._said(heard) == "ended"
        epoch = self._judged.bench.row(self.job_id).epoch
        begun = [step.step for step in read_trail(self._judged.trail) if (step.what, step.epoch) == ("started", epoch)]
        assert begun == [highest], f"attempt {epoch} went on from {begun}, and step {highest} was recorded"
        self.stages[self._stage(epoch, told)] += 1
        self._judged.expire(self.job_id)

    @staticmethod
    def _await(heard, word: str) -> None:
        assert heard.poll(_START_S), f"the worker did not say {word!r}"
        assert heard.recv() == word

    @staticmethod
    def _said(heard) -> str | None:
        try:
            return heard.recv()
        except EOFError:
            return None

    def _recorded(self) -> int:
        """Return the highest step that has a row; each attempt must go on from there."""
        with self._context.read() as session:
            return max((found.step for found in queries.checkpoints(session, self.job_id)), default=0)

    def _stage(self, epoch: int, told: bool) -> str:
        """Return how far the upload had come, by what lies in the store. What has a manifest must be whole."""
        attempt = f"{TENANT}/{self.job_id}/a{epoch}/"
        listed = self._client.list_objects_v2(Bucket=self._bucket, Prefix=attempt).get("Contents", [])
        folders: dict[str, set[str]] = {}
        for item in listed:
            folder, _, name = item["Key"].rpartition("/")
            folders.setdefault(f"{folder}/", set()).add(name)
        with self._context.read() as session:
            known = {found.prefix: found.manifest_sha256 for found in queries.checkpoints(session, self.job_id)}
        for prefix in [*known, *(prefix for prefix, names in folders.items() if "manifest.json" in names)]:
            self._read(prefix, known.get(prefix))
        if told:
            return "recorded"
        loose = {prefix: names for prefix, names in folders.items() if prefix not in known}
        if any("manifest.json" in names for names in loose.values()):
            return "whole, without a row"
        if loose:
            return "half uploaded"
        return "parts of a file" if self.parts() else "nothing yet"

    def _read(self, prefix: str, manifest_sha256: str | None) -> None:
        """Compare a checkpoint in the store with its manifest, and that with its row."""
        manifest = self._body(f"{prefix}manifest.json")
        if manifest_sha256 not in (None, hashlib.sha256(manifest).hexdigest()):
            raise Torn(f"{prefix}manifest.json is not what its row says")
        for name, entry in json.loads(manifest)["files"].items():
            body = self._body(prefix + name)
            if (len(body), hashlib.sha256(body).hexdigest()) != (entry["bytes"], entry["sha256"]):
                raise Torn(f"{prefix}{name} is not what its manifest says")

    def _body(self, key: str) -> bytes:
        try:
            return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        except self._client.exceptions.NoSuchKey as error:
            raise Torn(f"{key} is not there") from error

    def parts(self) -> int:
        """Return how many uploads of files in parts were begun and not completed."""
        return len(self._client.list_multipart_uploads(Bucket=self._bucket).get("Uploads", []))


@pytest.mark.timeout(3600)
def test_no_kill_leaves_an_upload_that_is_resumed_from_by_halves(
    judged: Judged, s3: S3, request: pytest.FixtureRequest
):
    kills, seed = request.config.getoption("uploading_kills", 10), random.randrange(10**6)
    moments, uploads = random.Random(seed), Uploads(judged, s3, kills)
    # The first one makes the connections too.
    upload_s = [uploads.measure(number) for number in (1, 2)]
    for kill in range(kills):
        which = kill % 2
        uploads.kill(which + 1, _BEYOND * upload_s[which] * (kill + moments.random()) / kills)
    judged.finish()
    print(json.dumps({"seed": seed, "upload_s": upload_s, "stages": uploads.stages}))
    assert judged.bench.row(uploads.job_id).status == "succeeded", f"seed {seed}"
    verdict = judged.verdict()
    assert verdict.clean, f"seed {seed}: {verdict}"
    assert uploads.stages["parts of a file"] + uploads.stages["half uploaded"] >= kills / 5, uploads.stages
    audit.collect(judged.bench.context, older_than_s=0)
    assert not uploads.parts() and not audit.audit(judged.bench.context).orphans
