"""Checkpoints that are complete or absent: every file hashed into a manifest, synced, and renamed into place.

The library writes straight into the folder that it later resumes from; killed in between, it leaves a folder that it
would happily resume from with a fresh optimizer. So what it writes is sealed first, and only sealed folders are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from common.errors import InfraError

MANIFEST = "manifest.json"
# What a resumed run cannot do without; the library would replace a missing one by a fresh state, silently.
_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", *_STATE)
# Of a full fine-tune.
MODEL = ("model.safetensors", "config.json", *_STATE)
# The weights of the best evaluation so far, where these will be published.
BEST_WEIGHTS = "best.safetensors"
# Also written by the library, and no part of the state: a pickle of its arguments.
_KEPT = {*ADAPTER, *MODEL, "scaler.pt", BEST_WEIGHTS}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: where the run was, of which configuration, and its files with sizes and hashes."""

    step: int
    max_steps: int
    epoch: float
    config_hash: str
    versions: dict[str, str]
    threads: int
    counters: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = 1


class BadCheckpoint(InfraError):
    """A checkpoint that must not be resumed from: the next older one may be good."""

    code = "bad_checkpoint"


class Unsealed(InfraError):
    """What the library has saved is no checkpoint."""

    code = "checkpoint_incomplete"


def seal(written: Path, target: Path, manifest: Manifest) -> Path:
    """Turn the folder `written` by the library into the checkpoint `target`.

    Returns `target`. After a crash at any point `target` is complete or absent.

    Raises:
        Unsealed: the library left out a file.
        OSError: the disk is full.
    """
    for path in sorted(written.iterdir()):
        if path.name not in _KEPT:
            path.unlink()
    files = {path.name: describe(path) for path in sorted(written.iterdir())}
    if missing := _missing(set(files)):
        raise Unsealed(f"the checkpoint of step {manifest.step} lacks {', '.join(missing)}")
    write_synced(written / MANIFEST, json.dumps({**asdict(manifest), "files": files}, indent=1, sort_keys=True))
    for path in written.iterdir():
        _sync(path)
    _sync(written)
    written.rename(target)
    _sync(target.parent)
    return target


def all_finite(folder: Path) -> bool:
    """Return whether every stored weight in `folder` is a number, reading one tensor at a time."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if not all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys()):  # noqa: SIM118
                return False
    return True


def verify(folder: Path, expected_hash: str | None = None) -> Manifest:
    """Return the manifest of the checkpoint in `folder`, after checking every file against it.

    Raises:
        BadCheckpoint: it is incomplete, altered, or of another configuration.
    """
    manifest = _read_manifest(folder)
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    listed = set(manifest.files)
    if lacking := sorted((listed - names) | set(_missing(listed))):
        raise BadCheckpoint(f"the checkpoint {folder.name} is incomplete: {', '.join(lacking)} missing")
    if foreign := sorted(names - listed):
        raise BadCheckpoint(f"the checkpoint {folder.name} holds files that its manifest does not list: {foreign}")
    for name, facts in manifest.files.items():
        if describe(folder / name) != facts:
            raise BadCheckpoint(f"the checkpoint {folder.name} is damaged: {name} is not what was written")
    if expected_hash is not None and manifest.config_hash != expected_hash:
        raise BadCheckpoint(f"the checkpoint {folder.name} belongs to a run with another configuration")
    return manifest


def _missing(names: set[str]) -> list[str]:
    """Return what a checkpoint with these files lacks, as one of an adapter, or of a model."""
    return sorted(set(MODEL if names & (set(MODEL) - set(ADAPTER)) else ADAPTER) - names)


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"the checkpoint {folder.name} is incomplete: it has no {MANIFEST}") from error
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"the checkpoint {folder.name} has a broken {MANIFEST}: {error}") from error


def describe(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_synced(path: Path, text: str) -> None:
    """Write `text` to `path` and wait until the disk has it."""
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
