"""From the working folder to the store: checkpoints and artifacts, each under its attempt's own prefix, and each with
its manifest last, so that what lies there without a manifest was never published. And back, verified by manifest.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.db.rows import JobRow
from common.errors import InfraError, NotFound
from common.jobs.lifecycle import Claim, Published
from common.storage import keys
from common.storage.store import Store, sha256_of
from worker.trainer.protocol import MANIFEST_FILE, TrainSpec


class NothingMade(InfraError):
    """A trainer that says it is done has left nothing to publish."""

    code = "nothing_made"
    attempts = 3


@dataclass(frozen=True)
class Uploaded:
    """A checkpoint in the store: its prefix, the hash of its manifest, and its size in bytes."""

    prefix: str
    manifest_sha256: str
    bytes: int


def checkpoint(store: Store, claim: Claim, folder: Path) -> Uploaded:
    """Upload a complete checkpoint, its manifest last."""
    prefix = keys.checkpoint(claim.tenant, claim.job_id, claim.epoch, folder.name)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = folder / MANIFEST_FILE
    for path in [*(path for path in files if path != manifest), manifest]:
        store.put_file(prefix + path.relative_to(folder).as_posix(), path)
    return Uploaded(prefix, sha256_of(manifest), sum(path.stat().st_size for path in files))


def restore(store: Store, prefix: str, manifest_sha256: str, folder: Path, config_hash: str) -> str | None:
    """Download a checkpoint into `folder`; return why it cannot be gone on from, or None.

    It must be whole (every file of its manifest, hash by hash) and of a run with this `config_hash`.
    """
    folder.mkdir(parents=True)
    try:
        manifest = store.get_bytes(prefix + MANIFEST_FILE)
        if hashlib.sha256(manifest).hexdigest() != manifest_sha256:
            return "it is not whole"
        known = json.loads(manifest)
        if known["config_hash"] != config_hash:
            return "it belongs to a run with other settings, another base or other data"
        for name, entry in known["files"].items():
            store.get_file(prefix + name, folder / name)
            if sha256_of(folder / name) != entry["sha256"]:
                return "it is not whole"
    except NotFound:
        return "it is not whole"
    (folder / MANIFEST_FILE).write_bytes(manifest)
    return None


def adapter(store: Store, job: JobRow, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Download the adapter that `job` published, or the `wanted` names of it, into `folder`; it is only read.

    Raises:
        InfraError: a file is not the one that was published (`artifact_altered`), or the store is away.
    """
    body = store.get_bytes(str(job.manifest_key))
    if hashlib.sha256(body).hexdigest() != job.manifest_sha256:
        raise InfraError(f"the manifest of {job.id} is not the one that was published", code="artifact_altered")
    prefix = str(job.manifest_key).removesuffix(keys.MANIFEST)
    for entry in json.loads(body)["files"]:
        name = entry["name"]
        if name.startswith("adapter/") and wanted(name):
            path = folder / name.removeprefix("adapter/")
            store.get_file(prefix + name, path)
            if sha256_of(path) != entry["sha256"]:
                raise InfraError(f"{name} of {job.id} was altered in the store", code="artifact_altered")


def artifacts(store: Store, claim: Claim, spec: TrainSpec, out: Path, report: dict[str, Any]) -> Published:
    """Upload everything under `out`, an adapter as one archive too, and the manifest last.

    Raises:
        NothingMade: the trainer wrote neither an adapter nor a model, or not the models that an export asks for.
    """
    has_adapter = (out / "adapter" / "adapter_model.safetensors").is_file()
    models = spec.job["export"] if spec.adapter else () if has_adapter else ("model",)
    for name in models:
        if not (out / name / "config.json").is_file():
            raise NothingMade(f"the trainer ended without an adapter or its {name}")
    prefix = keys.attempt(claim.tenant, claim.job_id, claim.epoch)
    archive = archive_folder(out / "adapter", out.parent / keys.ADAPTER_ARCHIVE) if has_adapter else None
    entries = [
        _put(store, prefix, path, path.relative_to(out).as_posix()) for path in sorted(out.rglob("*")) if path.is_file()
    ]
    packed = {"archive": _public(_put(store, prefix, archive, keys.ADAPTER_ARCHIVE))} if archive else {}
    body = json.dumps(
        {
            "job_id": claim.job_id,
            "attempt": claim.epoch,
            "spec": spec.job,
            "base": vars(spec.base) | {"path": None},
            "dataset_sha256": spec.train_sha256,
            "source_job": spec.source_job,
            "versions": report.get("versions", {}),
            "files": [_public(entry) for entry in entries],
        }
        | packed,
        indent=1,
        sort_keys=True,
    ).encode()
    store.put_bytes(prefix + keys.MANIFEST, body)
    digest = hashlib.sha256(body).hexdigest()
    manifest = {"name": keys.MANIFEST, "key": prefix + keys.MANIFEST, "bytes": len(body), "sha256": digest}
    return Published(prefix + keys.MANIFEST, digest, [*entries, manifest])


def archive_folder(folder: Path, target: Path) -> Path:
    """Write `folder` as a .tar.gz whose bytes depend on nothing but its files: no time, owner or order of the disk."""
    with (
        target.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="", compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                item = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
                item.size, item.mode = path.stat().st_size, 0o644
                with path.open("rb") as stream:
                    tar.addfile(item, stream)
    return target


def _put(store: Store, prefix: str, path: Path, name: str) -> dict[str, Any]:
    key = prefix + name
    store.put_file(key, path)
    return {"name": name, "key": key, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _public(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "key"}
